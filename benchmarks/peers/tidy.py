"""The shortest form in torch: one operation for the interpolation, one for the norm."""

from collections.abc import Callable

import torch
from torch import Tensor

from .implementation import Implementation


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    return torch.lerp(real, fake, alpha)


def norm_penalty(gradients: Tensor) -> Tensor:
    return (torch.linalg.vector_norm(gradients.flatten(1), dim=1) - 1).square().mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    alpha = torch.rand((len(real), *[1] * (real.ndim - 1)), device=real.device).to(real.dtype)
    x_hat = torch.lerp(real, fake, alpha).requires_grad_()
    scores = critic(x_hat)
    (gradients,) = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True)
    return norm_penalty(gradients)


def peer() -> Implementation:
    return Implementation(gradient_penalty, interpolate, norm_penalty)
