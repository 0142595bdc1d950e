"""Points on the straight lines between real and fake samples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments, reference
from ..form import accumulation_type
from . import torch_ops
from .backends import backend_for
from .rows import from_rows, storage_order, to_rows, unit_stride


def interpolate(real: Any, fake: Any, alpha: Tensor | float, *, backend: str = "auto") -> Any:
    r"""Interpolate between real and fake samples, one :math:`\alpha` per sample.

    .. math:: \hat x_i = \alpha_i \tilde x_i + (1 - \alpha_i) x_i

    with :math:`x` real and :math:`\tilde x` fake; exactly real at 0 and exactly fake at 1. Computed in fp32 (fp64 for
    fp64 inputs) and rounded once.

    Args:
        real: (B, ...) tensor of fp16, bf16, fp32 or fp64, any number of dimensions from 1, any memory format; or a
            tuple, list or dict of such tensors with one B, which share the alpha of each sample.
        fake: the same, of the same shape, dtype and device.
        alpha: one number in [0, 1] for all samples, or a floating tensor of shape (), (B,) or (B, 1, ..., 1).
        backend: as in `fused_gradient_penalty`.

    Returns:
        A new tensor of the shape and dtype of `real`, in its memory format; or a tuple, list or dict of them, as given.

    Differentiable in real, fake and alpha, in reverse mode, to every order.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes, dtypes or devices differ, or the batch is empty.

    From Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, algorithm 1.
    """
    reals, fakes, structure = arguments.real_and_fake(real, fake)
    column = arguments.alpha(alpha, reals[0].shape[0], reals)
    return arguments.rebuild(interpolate_rows(reals, fakes, column, backend_for(backend, reals[0])), structure)


def interpolate_rows(reals: Sequence[Tensor], fakes: Sequence[Tensor], alpha: Tensor, ops: Any) -> list[Tensor]:
    """The op on checked arguments, tensor by tensor; alpha is (R, 1), one for each row of samples."""
    if ops is reference:
        return [reference.interpolate(real, fake, alpha) for real, fake in zip(reals, fakes, strict=True)]
    rows = alpha.shape[0]
    x_hats = []
    for real, fake in zip(reals, fakes, strict=True):
        dtype = accumulation_type(real.dtype)
        column = alpha if alpha.dtype == dtype else alpha.to(dtype)
        if ops is torch_ops and real.dtype == dtype:  # one differentiable operation for any memory format
            x_hats.append(torch.lerp(real, fake, _for_samples(column, real)))
            continue
        order = storage_order(real)
        real_rows, fake_rows = to_rows(real, order, rows), to_rows(fake, order, rows)
        if torch.is_grad_enabled() and (real.requires_grad or fake.requires_grad or alpha.requires_grad):
            x_hat = Interpolate.apply(real_rows, fake_rows, column, ops)
        else:  # the critic's step: nothing to differentiate, so no graph
            x_hat = ops.interpolate(real_rows, fake_rows, column)
        x_hats.append(from_rows(x_hat, order, real))
    return x_hats


def _for_samples(column: Tensor, samples: Tensor) -> Tensor:
    """(R, 1) -> (B, 1, ..., 1), each element for all samples of its group."""
    rows, batch = column.shape[0], samples.shape[0]
    if rows != batch:
        column = column.expand(rows, batch // rows)
    elif samples.ndim == 2:
        return column
    return column.reshape(batch, *[1] * (samples.ndim - 1))


class Interpolate(torch.autograd.Function):
    """Linear in (real, fake): its backward is the adjoint below, whose backward is this again, for every order."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, fake: Tensor, alpha: Tensor, ops: Any) -> Tensor:
        ctx.ops = ops
        # real and fake are needed for the gradient of alpha only, which is rarely asked for.
        ctx.save_for_backward(alpha, *((real, fake) if ctx.needs_input_grad[2] else ()))
        return ops.interpolate(real, fake, alpha)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        alpha, *ends = ctx.saved_tensors  # ends: real and fake, where alpha needs them
        real_needed, fake_needed, alpha_needed, _ = ctx.needs_input_grad
        real_grad = fake_grad = alpha_grad = None
        if (real_needed or fake_needed) and torch.is_grad_enabled():  # with create_graph
            real_grad, fake_grad = InterpolateAdjoint.apply(cotangent, alpha, real_needed, fake_needed, ctx.ops)
        elif real_needed or fake_needed:
            real_grad, fake_grad = ctx.ops.interpolate_adjoint(unit_stride(cotangent), alpha, real_needed, fake_needed)
        if alpha_needed:
            alpha_grad = alpha_gradient(cotangent, ends[0], ends[1], alpha.dtype)
        return real_grad, fake_grad, alpha_grad, None


class InterpolateAdjoint(torch.autograd.Function):
    """cotangent -> ((1 - alpha) cotangent, alpha cotangent), each only where needed."""

    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, alpha: Tensor, real_needed: bool, fake_needed: bool, ops: Any) -> Any:
        ctx.ops = ops
        ctx.save_for_backward(alpha, *((cotangent,) if ctx.needs_input_grad[1] else ()))
        ctx.set_materialize_grads(False)
        return ops.interpolate_adjoint(unit_stride(cotangent), alpha, real_needed, fake_needed)

    @staticmethod
    def backward(ctx: Any, real_cotangent: Any, fake_cotangent: Any) -> Any:  # either may be None
        alpha, *cotangent = ctx.saved_tensors
        real_given, fake_given = real_cotangent is not None, fake_cotangent is not None
        grad = alpha_grad = None
        if ctx.needs_input_grad[0] and real_given and fake_given:
            grad = Interpolate.apply(unit_stride(real_cotangent), unit_stride(fake_cotangent), alpha, ctx.ops)
        elif ctx.needs_input_grad[0] and (real_given or fake_given):
            given = real_cotangent if real_given else fake_cotangent
            grads = InterpolateAdjoint.apply(given, alpha, real_given, fake_given, ctx.ops)
            grad = grads[0] if real_given else grads[1]
        if ctx.needs_input_grad[1] and (real_given or fake_given):
            alpha_grad = alpha_gradient(cotangent[0], real_cotangent, fake_cotangent, alpha.dtype)
        return grad, alpha_grad, None, None, None


def alpha_gradient(cotangent: Tensor, real: Tensor | None, fake: Tensor | None, dtype: torch.dtype) -> Tensor:
    """<cotangent_i, fake_i - real_i>, None being zero, in differentiable torch operations."""
    span = (0 if fake is None else fake.to(dtype)) - (0 if real is None else real.to(dtype))
    return (cotangent.to(dtype) * span).sum(1, keepdim=True)
