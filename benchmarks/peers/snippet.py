"""The gradient penalty as it is copied from one GAN repository to the next (the README's "before")."""

from collections.abc import Callable

import torch
from torch import Tensor

from .implementation import Implementation


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    return alpha * fake + (1 - alpha) * real


def norm_penalty(gradients: Tensor) -> Tensor:
    norms = torch.sqrt((gradients.flatten(1) ** 2).sum(1) + 1e-12)
    return ((norms - 1) ** 2).mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    alpha = torch.rand(real.size(0), *[1] * (real.ndim - 1), device=real.device).to(real.dtype)
    x_hat = interpolate(real, fake, alpha).requires_grad_(True)
    scores = critic(x_hat)
    gradients = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True, retain_graph=True)[0]
    return norm_penalty(gradients)


def peer() -> Implementation:
    return Implementation(gradient_penalty, interpolate, norm_penalty)
