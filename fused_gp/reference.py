"""The same functions in plain autograd: the truth that the fused ones are held to, written to be read.

No fusion, no backends, no checks, memory spent freely. Run in fp64 it judges every backend; run in the input's type
it is the baseline of the benchmarks. Every step is a differentiable torch operation, so every order of derivative is
right by construction.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .form import accumulation_type


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor | float) -> Tensor:
    """x_hat_i = alpha_i fake_i + (1 - alpha_i) real_i."""
    dtype = accumulation_type(real.dtype)
    if not isinstance(alpha, Tensor):
        alpha = torch.tensor(alpha, dtype=dtype)
    if alpha.ndim:
        alpha = alpha.reshape(-1, *[1] * (real.ndim - 1))
    alpha = alpha.to(real.device, dtype)
    return (alpha * fake.to(dtype) + (1 - alpha) * real.to(dtype)).to(real.dtype)


def gradient_norm_penalty(
    gradients: Tensor,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    squared: bool = False,
    eps: float = 1e-12,
    grad_scale: float | None = None,
    weight: float = 1.0,
    reduction: str = "mean",
    return_norms: bool = False,
) -> Any:
    """weight * mean_i (n_i - t)^2 with n_i = sqrt(sum g_i^2 + eps)."""
    g = gradients.to(accumulation_type(gradients.dtype)).reshape(len(gradients), -1)
    if grad_scale is not None:
        g = g / grad_scale
    square = (g * g).sum(1)
    if not (squared or target == 0):
        square = square + eps

    # sqrt has an infinite slope at zero. A zero row sits at the minimum of its own norm: its derivative is zero, in
    # every order, and choosing between constants gives it just that.
    zero = square == 0
    norms = torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())

    if squared or target == 0:
        penalty = square
    elif one_sided:
        penalty = (norms - target).clamp(min=0) ** 2
    else:
        penalty = (norms - target) ** 2
    if reduction != "none":
        penalty = penalty.mean() if reduction == "mean" else penalty.sum()
    penalty = weight * penalty
    return (penalty, norms.detach()) if return_norms else penalty


def fused_gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    alpha: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The penalty on the gradient of the critic's summed scores at points between real and fake samples."""
    if alpha is None:
        shape = [real.shape[0]] + [1] * (real.ndim - 1)
        alpha = torch.rand(shape, generator=generator, device=real.device)
    x_hat = interpolate(real, fake, alpha)
    if not x_hat.requires_grad:
        x_hat.requires_grad_()
    scores = critic(x_hat, *critic_args, **(critic_kwargs or {}))
    (gradients,) = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True)
    return gradient_norm_penalty(gradients, **options)
