"""The formula of TF-GAN's `wasserstein_gradient_penalty` in torch: real + alpha (fake - real), 1e-10 in the root."""

from collections.abc import Callable

import torch
from torch import Tensor

from .implementation import Implementation


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    differences = fake - real
    return real + alpha * differences


def norm_penalty(gradients: Tensor) -> Tensor:
    gradient_squares = gradients.square().sum(dim=tuple(range(1, gradients.ndim)))
    slopes = torch.sqrt(gradient_squares + 1e-10)
    return (slopes / 1.0 - 1.0).square().mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    alpha = torch.rand((len(real), *[1] * (real.ndim - 1)), device=real.device).to(real.dtype)
    interpolates = interpolate(real, fake, alpha).requires_grad_()
    (gradients,) = torch.autograd.grad(critic(interpolates).sum(), interpolates, create_graph=True)
    return norm_penalty(gradients)


def peer() -> Implementation:
    return Implementation(gradient_penalty, interpolate, norm_penalty)
