"""The same functions in plain autograd, written to be read: the reference for tests, in fp64, and for benchmarks.

No fusion, no backends, no checks, no care for memory. Every step is a differentiable torch operation, so every order of
derivative is right by construction.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .form import accumulation_type


def interpolate(real: Any, fake: Any, alpha: Tensor | float) -> Any:
    """x_hat_i = alpha_i fake_i + (1 - alpha_i) real_i."""

    def between(x: Tensor, y: Tensor) -> Tensor:
        dtype = accumulation_type(x.dtype)
        a = alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=dtype)
        if a.ndim:  # one for each group of samples, repeated for its members
            a = a.flatten().repeat_interleave(len(x) // a.numel()).reshape(-1, *[1] * (x.ndim - 1))
        a = a.to(x.device, dtype)
        return (a * y.to(dtype) + (1 - a) * x.to(dtype)).to(x.dtype)

    return tree_map(between, real, fake)


def gradient_norm_penalty(
    gradients: Any,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    squared: bool = False,
    eps: float = 1e-12,
    grad_scale: float | Tensor | None = None,
    weight: float = 1.0,
    reduction: str = "mean",
    group_size: int = 1,
    return_norms: bool = False,
) -> Any:
    """weight * mean_i (n_i - t)^2 with n_i = sqrt(sum g_i^2 + eps), the sum over all tensors and members of a group."""
    tensors = tree_leaves(gradients)
    dtype = accumulation_type(*[g.dtype for g in tensors])
    g = torch.cat([g.to(dtype).reshape(len(g) // group_size, -1) for g in tensors], 1)
    if grad_scale is not None:
        g = g / grad_scale
    square = (g * g).sum(1)
    if not (squared or target == 0):
        square = square + eps

    # sqrt has an infinite slope at zero. A zero row is at the minimum of its own norm: its derivative is zero, in every
    # order, which the choice between constants gives.
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


def input_gradient_penalty(
    outputs: Any, inputs: Any, *, output_weights: Any = None, grad_scale: float | Tensor | None = None, **options: Any
) -> Any:
    """The penalty on the gradient of the weighted sum of the outputs; an input they do not depend on has gradient 0."""
    outs, ins = tree_leaves(outputs), tree_leaves(inputs)
    factors = [1.0] * len(outs) if output_weights is None else tree_leaves(output_weights)
    total = sum((factor * out).sum() for factor, out in zip(factors, outs, strict=True))
    if grad_scale is not None:
        total = total * grad_scale
    gradients = torch.autograd.grad(total, ins, create_graph=True, materialize_grads=True)
    return gradient_norm_penalty(gradients, grad_scale=grad_scale, **options)


def fused_gradient_penalty(
    critic: Callable[..., Tensor],
    real: Any,
    fake: Any,
    *,
    alpha: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    group_size: int = 1,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The penalty on the gradient of the critic's summed scores at points between real and fake samples."""
    first = tree_leaves(real)[0]
    if alpha is None:
        shape = [len(first) // group_size] + [1] * (first.ndim - 1)
        alpha = torch.rand(shape, generator=generator, device=first.device)
    x_hat = interpolate(real, fake, alpha)
    x_hat = tree_map(lambda x: x if x.requires_grad else x.requires_grad_(), x_hat)
    scores = critic(x_hat, *critic_args, **(critic_kwargs or {}))
    return input_gradient_penalty(scores, x_hat, group_size=group_size, **options)


def dragan_penalty(
    critic: Callable[..., Tensor],
    real: Any,
    *,
    noise_scale: float = 0.5,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Any:
    """Between the real samples and themselves with noise of half their standard deviation."""

    def noisy(x: Tensor) -> Tensor:
        return x + noise_scale * x.std() * torch.empty_like(x).uniform_(generator=generator)

    return fused_gradient_penalty(critic, real, tree_map(noisy, real), generator=generator, **options)


def r1_penalty(
    critic: Callable[..., Tensor],
    real: Any,
    *,
    weight: float = 1.0,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """weight / 2 * mean_i of the squared norm of the gradient at the real samples."""
    x = tree_map(lambda t: t.view_as(t) if t.requires_grad else t.detach().requires_grad_(), real)
    scores = critic(x, *critic_args, **(critic_kwargs or {}))
    return input_gradient_penalty(scores, x, weight=weight / 2, target=0.0, **options)


def r2_penalty(critic: Callable[..., Tensor], fake: Any, **options: Any) -> Any:
    """The same at the fake samples."""
    return r1_penalty(critic, fake, **options)
