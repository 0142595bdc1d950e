"""The penalty on the norm of each sample's gradient, fused, with double backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments, reference
from ..form import PenaltyForm, accumulation_type
from .backends import backend_for
from .rows import storage_order, to_rows, unit_stride


def gradient_norm_penalty(
    gradients: Any,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    squared: bool = False,
    eps: float = 1e-12,
    grad_scale: Any = None,
    weight: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
    return_norms: bool = False,
) -> Any:
    r"""Penalise each sample's gradient norm for its distance from `target`.

    .. math::
        n_i = \sqrt{\kappa^2 \textstyle\sum g_i^2 + \epsilon}, \qquad \kappa = 1 / \text{grad\_scale}

        \varphi_i = (n_i - t)^2 \quad\text{or, one-sided,}\quad \max(n_i - t, 0)^2
        \quad\text{or, squared,}\quad \kappa^2 \textstyle\sum g_i^2

    and the result is weight times the mean (sum, or none) of :math:`\varphi` over the samples. Sums are accumulated
    in fp32 (fp64 for fp64), whatever the input type. With ``eps=0`` a sample whose gradient is all zero has derivative
    zero, in every order, where ``Tensor.norm`` gives NaN.

    Args:
        gradients: (B, ...) input gradients, one sample each; fp16, bf16, fp32 or fp64, any memory format. A tuple, list
            or dict of such tensors has one norm per sample, over all of them.
        target: the norm t to reach, >= 0. With 0 the squared form is computed, which has no root and no eps.
        one_sided: penalise only norms above the target (WGAN-LP).
        squared: the squared norm itself (R1, R2, zero-centred penalties); target, one_sided and eps are not used.
        eps: added inside the root, >= 0.
        grad_scale: the factor the scores were multiplied by before differentiation, taken out again here: a number > 0,
            a floating tensor of one element, or a GradScaler. None: they were not.
        weight: the coefficient of the penalty, often called lambda.
        reduction: "mean", "sum" or "none".
        backend, return_norms: as in `fused_gradient_penalty`.

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
    tensors, _ = arguments.samples("gradients", gradients)
    batch = tensors[0].shape[0]
    form = arguments.penalty_form(batch, target, one_sided, eps, weight, reduction, return_norms, squared=squared)
    if grad_scale is not None:
        form = arguments.gradient_scale(form, grad_scale, tensors)
    penalty, norms = norm_penalty_rows(tensors, form, backend_for(backend, tensors[0]))
    return (penalty, norms) if return_norms else penalty


def norm_penalty_rows(gradients: Sequence[Tensor], form: PenaltyForm, ops: Any) -> tuple[Tensor, Tensor]:
    """The op on checked arguments: penalty and norms, one norm per row over all the tensors."""
    if ops is reference:
        return reference.gradient_norm_penalty(
            gradients, target=form.target, one_sided=form.one_sided, squared=form.squared, eps=form.eps,
            grad_scale=None if form.kappa is None else 1 / form.kappa, weight=form.scale,
            reduction="sum" if form.reduce else "none", group_size=len(gradients[0]) // form.rows, return_norms=True,
        )  # fmt: skip
    rows = [to_rows(g, storage_order(g), form.rows) for g in gradients]
    if torch.is_grad_enabled() and any([g.requires_grad for g in rows]):
        return NormPenalty.apply(form, ops, *rows)
    return ops.penalty_forward(rows, form)  # no graph where none is needed


class NormPenalty(torch.autograd.Function):
    """(R, N) gradients, one tensor or several -> penalty and norms, the norms without a derivative of their own."""

    @staticmethod
    def forward(ctx: Any, form: PenaltyForm, ops: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        ctx.form, ctx.ops = form, ops
        penalty, norms = ops.penalty_forward(gradients, form)
        ctx.mark_non_differentiable(norms)
        ctx.set_materialize_grads(False)  # no zeros for the norms
        ctx.save_for_backward(norms, *gradients)
        return penalty, norms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> Any:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        norms, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph
            gradients_grads = NormPenaltyBackward.apply(ctx.form, ctx.ops, norms, upstream, *gradients)
        else:
            gradients_grads = ctx.ops.penalty_backward(gradients, norms, upstream, ctx.form)
        return None, None, *gradients_grads


class NormPenaltyBackward(torch.autograd.Function):
    """dg = a scale kappa^2 w g. `norms` depends on `gradients`: it is not an input of its own."""

    @staticmethod
    def forward(
        ctx: Any, form: PenaltyForm, ops: Any, norms: Tensor, upstream: Tensor, *gradients: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.form, ctx.ops = form, ops
        ctx.save_for_backward(norms, upstream, *gradients)
        return tuple(ops.penalty_backward(gradients, norms, upstream, form))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        norms, upstream, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated a third time
            gradients_grads, upstream_grad = differentiable_double_backward(gradients, upstream, cotangents, ctx.form)
        else:
            rows = [unit_stride(cotangent) for cotangent in cotangents]
            gradients_grads, upstream_grad = ctx.ops.penalty_double_backward(
                gradients, norms, upstream, rows, ctx.form, ctx.needs_input_grad[3]
            )
        return None, None, None, upstream_grad, *gradients_grads


def differentiable_double_backward(
    gradients: Sequence[Tensor], upstream: Tensor, cotangents: Sequence[Tensor], form: PenaltyForm
) -> tuple[list[Tensor], Tensor]:
    """The double backward in torch operations: dg = a scale kappa^2 [w u + (w'/n) s g], da = scale w s."""
    dtype = accumulation_type(*[g.dtype for g in gradients])
    kappa = 1 if form.kappa is None else form.kappa
    gs = [g.to(dtype) * kappa for g in gradients]
    us = [u.to(dtype) * kappa for u in cotangents]
    s = torch.stack([(g * u).sum(1) for g, u in zip(gs, us, strict=True)]).sum(0)
    if form.squared:
        w, curvatures = torch.full_like(s, 2.0), None
    else:
        n_squared = torch.stack([g.square().sum(1) for g in gs]).sum(0) + form.eps
        n = torch.where(n_squared == 0, 1.0, n_squared).sqrt()  # no root of zero: its derivative would be NaN below
        flat = (n_squared == 0) | (n <= form.target) if form.one_sided else n_squared == 0
        w = torch.where(flat, 0.0, 2 * (n - form.target) / n)
        # (w'/n) s g = (2 t / n) (s / n) (g / n), in this order: 2 t / n^3 alone overflows for small n.
        inverse = torch.where(flat, 0.0, 1 / n)
        curvature = (2 * form.target * inverse * (s * inverse))[:, None]
        curvatures = [curvature * (g * inverse[:, None]) for g in gs]
    a = (upstream * (form.scale * kappa)).expand_as(s)[:, None]
    slopes = [w[:, None] * u for u in us]
    if curvatures is not None:
        slopes = [slope + bend for slope, bend in zip(slopes, curvatures, strict=True)]
    gradients_grads = [(a * slope).to(g.dtype) for g, slope in zip(gradients, slopes, strict=True)]
    upstream_grad = form.scale * w * s
    return gradients_grads, upstream_grad.sum() if form.reduce else upstream_grad
