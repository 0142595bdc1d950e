"""The form of most PyTorch collections: `norm(2, dim=1)` of the flattened gradient, and no epsilon.

They have alpha on real; it is on fake here, which costs the same, so that all compute the same numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .implementation import Implementation


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    return alpha * fake + ((1 - alpha) * real)


def norm_penalty(gradients: Tensor) -> Tensor:
    gradients = gradients.reshape(gradients.size(0), -1)
    return ((gradients.norm(2, dim=1) - 1) ** 2).mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    alpha = torch.rand((real.size(0), *[1] * (real.ndim - 1)), device=real.device).to(real.dtype)
    interpolates = interpolate(real, fake, alpha).requires_grad_(True)
    d_interpolates = critic(interpolates)
    gradients = torch.autograd.grad(
        outputs=d_interpolates,
        inputs=interpolates,
        grad_outputs=torch.ones_like(d_interpolates),
        create_graph=True,
        retain_graph=True,
        only_inputs=True,
    )[0]
    return norm_penalty(gradients)


def peer() -> Implementation:
    return Implementation(gradient_penalty, interpolate, norm_penalty)
