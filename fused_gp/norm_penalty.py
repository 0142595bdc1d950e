"""The penalty on the norm of each sample's gradient, fused, with double backward."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import arguments
from .backends import backend_for
from .form import PenaltyForm, accumulation_type
from .function import FusedFunction
from .rows import storage_order, to_rows, unit_stride


@overload
def gradient_norm_penalty(gradients: Tensor, *, return_norms: Literal[False] = False, **options: Any) -> Tensor: ...
@overload
def gradient_norm_penalty(
    gradients: Tensor, *, return_norms: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def gradient_norm_penalty(  # type: ignore[misc]  # the overloads leave the options to this signature
    gradients: Tensor,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    squared: bool = False,
    eps: float = 1e-12,
    grad_scale: float | None = None,
    weight: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
    return_norms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Penalise each sample's gradient norm for its distance from `target`.

    .. math::
        n_i = \sqrt{\kappa^2 \textstyle\sum g_i^2 + \epsilon}, \qquad \kappa = 1 / \text{grad\_scale}

        \varphi_i = (n_i - t)^2 \quad\text{or, one-sided,}\quad \max(n_i - t, 0)^2
        \quad\text{or, squared,}\quad \kappa^2 \textstyle\sum g_i^2

    and the result is weight times the mean (sum, or none) of :math:`\varphi` over the samples. Sums are accumulated
    in fp32 (fp64 for fp64), whatever the input type. With ``eps=0`` a sample whose gradient is all zero has derivative
    zero, in every order, where ``Tensor.norm`` gives NaN.

    Args:
        gradients: (B, ...) input gradients, one sample each; fp16, bf16, fp32 or fp64, any memory format.
        target: the norm t to reach, >= 0. With 0 the squared form is computed, which has no root and no eps.
        one_sided: penalise only norms above the target (WGAN-LP).
        squared: the squared norm itself (R1, R2, zero-centred penalties); target, one_sided and eps are not used.
        eps: added inside the root, >= 0.
        grad_scale: the factor the scores were multiplied by before differentiation, taken out again here. > 0.
        weight: the coefficient of the penalty, often called lambda.
        reduction: "mean", "sum" or "none".
        backend: "auto" (Triton on CUDA, ROCm and XPU tensors, plain torch elsewhere), "triton" or "torch".
        return_norms: also return the norms :math:`n_i`, for logging. The backward needs them unchanged: copy them
            before you change them in place.

    Returns:
        The penalty, a scalar, or (B,) with reduction "none"; with `return_norms`, the pair of it and the norms, (B,),
        detached. fp32, or fp64 for fp64 gradients.

    Differentiable in reverse mode, to every order: backward and double backward are fused, higher orders plain torch.

    Raises:
        TypeError, ValueError: an argument is not of the kind above.

    From Gulrajani et al., "Improved Training of Wasserstein GANs", 2017 (two-sided); Petzka et al., "On the
    regularization of Wasserstein GANs", 2018 (one-sided); Mescheder et al., "Which Training Methods for GANs do
    actually Converge?", 2018 (squared).
    """
    arguments.samples("gradients", gradients)
    arguments.flag("return_norms", return_norms)
    form = arguments.form(
        target, one_sided, eps, weight, reduction, rows=gradients.shape[0], squared=squared, grad_scale=grad_scale
    )
    penalty, norms = penalise_rows(gradients, form, backend_for(backend, gradients))
    return (penalty, norms) if return_norms else penalty


def penalise_rows(gradients: Tensor, form: PenaltyForm, ops: Any) -> tuple[Tensor, Tensor]:
    """The op on checked arguments: penalty and norms."""
    return NormPenalty.apply(to_rows(gradients, storage_order(gradients), gradients.shape[0]), form, ops)


class NormPenalty(FusedFunction):
    """(R, N) gradients -> penalty and norms, the norms without a derivative of their own."""

    @staticmethod
    def forward(gradients: Tensor, form: PenaltyForm, ops: Any) -> tuple[Tensor, Tensor]:
        return ops.penalty_forward(gradients, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gradients, ctx.form, ctx.ops = inputs
        norms = output[1]
        ctx.mark_non_differentiable(norms)
        ctx.save_for_backward(gradients, norms)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        gradients, norms = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph
            gradients_grad = NormPenaltyBackward.apply(gradients, norms, upstream, ctx.form, ctx.ops)
        else:
            gradients_grad = ctx.ops.penalty_backward(gradients, norms, upstream, ctx.form)
        return gradients_grad, None, None


class NormPenaltyBackward(FusedFunction):
    """dg = a scale kappa^2 w g. `norms` is a function of `gradients`, and no input of its own."""

    @staticmethod
    def forward(gradients: Tensor, norms: Tensor, upstream: Tensor, form: PenaltyForm, ops: Any) -> Tensor:
        return ops.penalty_backward(gradients, norms, upstream, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        gradients, norms, upstream, ctx.form, ctx.ops = inputs
        ctx.save_for_backward(gradients, norms, upstream)

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor) -> Any:
        gradients, norms, upstream = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate a third time
            gradients_grad, upstream_grad = differentiable_double_backward(gradients, upstream, cotangents, ctx.form)
        else:
            gradients_grad, upstream_grad = ctx.ops.penalty_double_backward(
                gradients, norms, upstream, unit_stride(cotangents), ctx.form, ctx.needs_input_grad[2]
            )
        return gradients_grad, None, upstream_grad, None, None


def differentiable_double_backward(
    gradients: Tensor, upstream: Tensor, cotangents: Tensor, form: PenaltyForm
) -> tuple[Tensor, Tensor]:
    """The double backward in torch operations: dg = a scale kappa^2 [w u + (w'/n) s g], da = scale w s."""
    dtype = accumulation_type(gradients.dtype)
    g = gradients.to(dtype) * form.kappa
    u = cotangents.to(dtype) * form.kappa
    s = (g * u).sum(1)
    if form.squared:
        w, bend = torch.full_like(s, 2.0), None
    else:
        n_squared = g.square().sum(1) + form.eps
        n = torch.where(n_squared == 0, 1.0, n_squared).sqrt()  # no root of zero: its derivative would be NaN below
        flat = (n_squared == 0) | (n <= form.target) if form.one_sided else n_squared == 0
        w = torch.where(flat, 0.0, 2 * (n - form.target) / n)
        # (w'/n) s g = (2 t / n) (s / n) (g / n), in this order: 2 t / n^3 alone overflows for small n.
        inverse = torch.where(flat, 0.0, 1 / n)
        bend = (2 * form.target * inverse * (s * inverse))[:, None] * (g * inverse[:, None])
    a = (upstream * (form.scale * form.kappa)).expand_as(s)[:, None]
    gradients_grad = a * w[:, None] * u if bend is None else a * (w[:, None] * u + bend)
    upstream_grad = form.scale * w * s
    return gradients_grad.to(gradients.dtype), upstream_grad.sum() if form.reduce else upstream_grad
