"""The call that replaces the fifteen lines: critic, real and fake samples in, penalty out."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from . import arguments
from .backends import backend_for
from .form import PenaltyForm
from .interpolation import interpolate_rows
from .norm_penalty import penalise_rows


@overload
def fused_gradient_penalty(
    critic: Callable[..., Tensor], real: Tensor, fake: Tensor, *, return_norms: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def fused_gradient_penalty(
    critic: Callable[..., Tensor], real: Tensor, fake: Tensor, *, return_norms: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def fused_gradient_penalty(  # type: ignore[misc]  # the overloads leave the options to this signature
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    alpha: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    target: float = 1.0,
    one_sided: bool = False,
    eps: float = 1e-12,
    weight: float = 1.0,
    reduction: str = "mean",
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    backend: str = "auto",
    return_norms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The gradient penalty of a critic between real and fake samples.

    .. math::
        \hat x_i = \alpha_i \tilde x_i + (1 - \alpha_i) x_i, \qquad
        g = \frac{\partial}{\partial \hat x} \sum D(\hat x), \qquad
        n_i = \sqrt{\textstyle\sum g_i^2 + \epsilon}, \qquad
        P = \text{weight} \cdot \operatorname*{mean}_i\, (n_i - t)^2

    with :math:`x` real, :math:`\tilde x` fake and one :math:`\alpha_i \sim U[0, 1)` per sample. Add it to the critic's
    loss::

        loss = fake_score.mean() - real_score.mean() + fused_gradient_penalty(critic, real, fake, weight=10)

    Args:
        critic: callable that takes the interpolated samples and returns one tensor with at least one score per
            sample: (B,), (B, 1), or a map of patches. All its elements are summed. It runs once.
        real: (B, ...) fp16, bf16, fp32 or fp64, any number of dimensions from 1, any memory format.
        fake: tensor of the same shape, dtype and device. Detach it in the critic's step; attached to a generator,
            the penalty's gradient flows into it.
        alpha: where between real (0) and fake (1), instead of at random: a number in [0, 1], or a floating tensor of
            shape (), (B,) or (B, 1, ..., 1).
        generator: where alpha is drawn from, exactly as ``torch.rand(B, 1, ..., 1, generator=generator)`` draws it,
            before the critic runs. Codes with alpha on *real* get the same numbers with real and fake swapped.
        target: the norm t to reach, >= 0.
        one_sided: penalise only norms above the target, max(n - t, 0)^2 (WGAN-LP).
        eps: added inside the root, >= 0; with 0 a zero gradient has derivative zero, not NaN.
        weight: the coefficient of the penalty, often called lambda.
        reduction: "mean", "sum" or "none" over the samples.
        critic_args, critic_kwargs: further arguments of the critic, such as labels.
        backend: "auto" (Triton on CUDA, ROCm and XPU tensors, plain torch elsewhere), "triton" or "torch".
        return_norms: also return the norms :math:`n_i`, for logging.

    Returns:
        The penalty, a scalar, or (B,) with reduction "none"; with `return_norms`, the pair of it and the norms, (B,),
        detached. fp32, or fp64 for fp64 samples. Under ``torch.no_grad()`` or ``inference_mode()`` it is the value
        alone, without a graph.

    Differentiable in reverse mode, to every order in which the critic is. No tensor of the caller's is changed, no
    ``.grad`` written.

    Raises:
        TypeError: an argument is not of the kind above, or the critic returns something other than one tensor.
        ValueError: shapes, devices or values do not fit, or the scores do not depend on the samples.

    Warns, once per critic, when a module has batch normalisation in training mode: the gradient of a summed score is
    the gradient of each sample's score only where samples do not see one another.

    From Gulrajani et al., "Improved Training of Wasserstein GANs", 2017; one-sided: Petzka et al., "On the
    regularization of Wasserstein GANs", 2018.
    """
    arguments.critic(critic, critic_args, critic_kwargs)
    arguments.pair(real, fake)
    arguments.flag("return_norms", return_norms)
    arguments.generator(generator, real.device)
    if alpha is not None and generator is not None:
        raise ValueError("generator draws alpha, so give one of the two, got both alpha and generator")
    form = arguments.form(target, one_sided, eps, weight, reduction, rows=real.shape[0])
    ops = backend_for(backend, real)
    _warn_of_batch_norm(critic)

    if torch.is_grad_enabled():
        penalty, norms = _penalty_and_norms(critic, real, fake, alpha, generator, form, critic_args, critic_kwargs, ops)
    else:  # the penalty is a value then, but the input gradient inside it still needs a graph for a while
        with torch.inference_mode(False), torch.enable_grad():
            real, fake = real.detach(), fake.detach()
            # Labels made under inference_mode cannot be saved for a backward; their copies can.
            critic_args, critic_kwargs = tree_map_only(
                Tensor, lambda t: t.clone() if t.is_inference() else t, (critic_args, critic_kwargs)
            )
            penalty, norms = _penalty_and_norms(
                critic, real, fake, alpha, generator, form, critic_args, critic_kwargs, ops, create_graph=False
            )
            penalty = penalty.detach()
    return (penalty, norms) if return_norms else penalty


def _penalty_and_norms(
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    alpha: Tensor | float | None,
    generator: torch.Generator | None,
    form: PenaltyForm,
    critic_args: Sequence[Any],
    critic_kwargs: Mapping[str, Any] | None,
    ops: Any,
    create_graph: bool = True,
) -> tuple[Tensor, Tensor]:
    """The call on checked arguments, alpha apart."""
    if alpha is None:
        # Before the critic runs: its dropout must not come between the seed and alpha. In the default dtype, as
        # everybody's torch.rand(B, 1, 1, 1): a seed gives the same numbers here and there.
        alpha = torch.rand((real.shape[0],) + (1,) * (real.ndim - 1), generator=generator, device=real.device)
    x_hat = interpolate_rows(real, fake, arguments.alpha(alpha, real), ops)
    if not x_hat.requires_grad:
        x_hat.requires_grad_()
    version = x_hat._version
    scores = critic(x_hat, *critic_args, **(critic_kwargs or {}))
    if x_hat._version != version:  # the gradient would silently be that with respect to what the critic made of it
        raise ValueError("critic must leave its input as it is, got one that changes it in place: inplace=True first?")
    return penalise_rows(_input_gradient(scores, x_hat, create_graph), form, ops)


def _input_gradient(scores: Tensor, x_hat: Tensor, create_graph: bool) -> Tensor:
    """d sum(scores) / d x_hat."""
    arguments.scores(scores, x_hat)
    gradients = None
    if scores.requires_grad:
        ones = torch.ones_like(scores)
        (gradients,) = torch.autograd.grad(scores, x_hat, ones, create_graph=create_graph, allow_unused=True)
    if gradients is None:
        raise ValueError(
            "critic must return scores that depend on the samples it is given, got scores that do not: "
            "is there a detach() or no_grad() inside it?"
        )
    return gradients


_seen: WeakSet[torch.nn.Module] = WeakSet()


def _warn_of_batch_norm(critic: Any) -> None:
    """Once per critic; one that was seen costs a look-up."""
    if not isinstance(critic, torch.nn.Module) or critic in _seen:
        return
    norms = {name: module for name, module in critic.named_modules() if isinstance(module, _BatchNorm)}
    training = [
        name or type(module).__name__
        for name, module in norms.items()
        if module.training or not module.track_running_stats  # both use the statistics of the batch
    ]
    if training or not norms:  # nothing more to say; batch norm in eval mode may yet be put in training mode
        _seen.add(critic)
    if training:
        warnings.warn(
            f"critic has batch normalisation in training mode ({', '.join(training)}): its samples see one another, "
            "so their gradient norms are not those of single samples. Use LayerNorm, GroupNorm or none, as the "
            "WGAN-GP paper does.",
            stacklevel=3,
        )
