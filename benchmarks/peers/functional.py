"""The input gradient by `torch.func.grad`, of the summed scores: one pass for the batch.

`vmap(grad)`, sample by sample, is the same for critics that score each sample by itself, and cannot do the others.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .implementation import Implementation


def penalty_at(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    x_hat = torch.lerp(real, fake, alpha)
    gradients = torch.func.grad(lambda x: critic(x).sum())(x_hat)
    return (torch.linalg.vector_norm(gradients.flatten(1), dim=1) - 1).square().mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    alpha = torch.rand((len(real), *[1] * (real.ndim - 1)), device=real.device).to(real.dtype)
    return penalty_at(critic, real, fake, alpha)


def peer() -> Implementation:
    return Implementation(gradient_penalty)
