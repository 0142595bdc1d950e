"""The functions of `fused_gp.kernels` in plain torch, for tensors on devices without Triton.

On a CPU, allocating a large tensor costs more than the arithmetic that fills it, so the functions allocate nothing of
the rows' size but what they return; intermediate results of half types and of sums of products are made block by block.
No autograd in here. Formulas: `kernels/norm_penalty.py`.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from numpy import float32
from torch import Tensor

from ..form import PenaltyForm, accumulation_type

Rows = Sequence[Tensor]  # (R, N) each, of one R

# Elements of a block of fp32 copies and intermediate results: 2 MB. With more, malloc returns memory to the system in
# between, and page faults take as long as the arithmetic.
BLOCK = 2**19

# vector_norm sums a row in a few fp32 lanes: its error reaches 2e-6 at 200,000 elements and 4e-4 at 10^7. Norms of
# chunks of this many elements, then the norm of those norms, keep it near 1e-7 at every length.
CHUNK = 4096


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """(R, N) rows, (R, 1) alpha in the accumulation type -> new (R, N)."""
    if real.dtype == alpha.dtype:
        return torch.lerp(real, fake, alpha)
    out = torch.empty_like(real)
    for part, x, y, a in _blocks(out, real, fake, alpha):
        part.copy_(x.to(a.dtype).lerp_(y.to(a.dtype), a))
    return out


def interpolate_adjoint(
    cotangent: Tensor, alpha: Tensor, real_needed: bool, fake_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(R, N) cotangent of the interpolation -> the gradients asked for, of real and of fake."""
    real_grad = _scaled(cotangent, 1 - alpha) if real_needed else None
    return real_grad, _scaled(cotangent, alpha) if fake_needed else None


def perturb(points: Tensor, gradients: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """(R, N) rows and gradients, (R, 1) column in the accumulation type -> points + column gradients, and minus it."""
    if points.dtype == column.dtype:
        return torch.addcmul(points, gradients, column), torch.addcmul(points, gradients, column, value=-1)
    plus, minus = torch.empty_like(points), torch.empty_like(points)
    for up, down, x, g, c in _blocks(plus, minus, points, gradients, column):
        x, g = x.to(c.dtype), g.to(c.dtype)
        up.copy_(torch.addcmul(x, g, c))
        down.copy_(x.addcmul_(g, c, value=-1))
    return plus, minus


def penalty_forward(gradients: Rows, form: PenaltyForm) -> tuple[Tensor, Tensor]:
    """(R, N) rows of one tensor or several -> penalty, a scalar or (R,), and norms, (R,), in the accumulation type."""
    norms = _row_norms(gradients)
    if form.kappa is not None:
        norms *= form.kappa
    target, root, scale, _ = _constants(form, norms)
    if form.squared:
        distance = norms
    else:
        # n = sqrt(||g||^2 + eps) as hypot(||g||, sqrt(eps)): one operation, which does not overflow. torch.sqrt gives
        # more than 2048 numbers to all threads of MKL, and on busy cores takes milliseconds.
        if form.eps:
            norms = torch.hypot(norms, root if isinstance(root, Tensor) else norms.new_full((), root))
        distance = _excess(norms, target, form.one_sided)
    penalty = torch.dot(distance, distance) if form.reduce else distance.square()
    return penalty.mul_(scale), norms


def penalty_backward(gradients: Rows, norms: Tensor, upstream: Tensor, form: PenaltyForm) -> list[Tensor]:
    """Upstream, a scalar or (R,) -> the gradients of the penalty, (R, N) each."""
    weight = row_factor(norms, upstream, form)
    return [_scaled(g, weight) for g in gradients]


def penalty_double_backward(
    gradients: Rows, norms: Tensor, upstream: Tensor, cotangents: Rows, form: PenaltyForm, upstream_needed: bool
) -> tuple[list[Tensor], Tensor | None]:
    """(R, N) cotangents of the backward -> gradients of its `gradients` and, where needed, of its `upstream`."""
    weight = row_factor(norms, upstream, form)
    if form.squared and not upstream_needed:
        return [_scaled(u, weight) for u in cotangents], None
    dots = _dots(gradients[0], cotangents[0], norms.dtype)
    for g, u in zip(gradients[1:], cotangents[1:], strict=True):
        dots += _dots(g, u, norms.dtype)
    if form.kappa is not None:
        dots.mul_(form.kappa).mul_(form.kappa)

    upstream_grad = None
    if upstream_needed:
        target, _, _, twice = _constants(form, norms)
        upstream_grad = dots * twice
        upstream_grad = upstream_grad if form.squared else upstream_grad.mul_(_half_w(norms, target, form))
        upstream_grad = upstream_grad.sum() if form.reduce else upstream_grad
    if form.squared:
        return [_scaled(u, weight) for u in cotangents], upstream_grad

    # (w'/n) s g = (2 t / n) (s / n) (g / n), in this order: 2 t / n^3 alone overflows for small n.
    flat = norms <= form.target if form.one_sided else norms == 0  # false for NaN, which stays NaN
    inverse = norms.reciprocal().masked_fill_(flat, 0.0)
    curvature = (upstream * inverse).mul_(2 * form.target * form.scale) * (dots * inverse)
    if form.kappa is not None:
        curvature.mul_(form.kappa).mul_(form.kappa)
    columns = inverse[:, None], curvature[:, None], weight
    return [_second_order(g, u, *columns) for g, u in zip(gradients, cotangents, strict=True)], upstream_grad


def row_factor(norms: Tensor, upstream: Tensor, form: PenaltyForm) -> Tensor:
    """upstream * scale * kappa^2 * w(n), as a column, or as one number where all rows have the same."""
    target, _, _, twice = _constants(form, norms)
    factor = upstream * twice
    if form.kappa is not None:
        factor.mul_(form.kappa).mul_(form.kappa)
    if form.squared:  # w = 2
        return factor.unsqueeze(1) if factor.ndim else factor
    return _half_w(norms, target, form).mul_(factor).unsqueeze(1)


def _half_w(norms: Tensor, target: Tensor | float, form: PenaltyForm) -> Tensor:
    """w(n) / 2 = (n - t) / n, in few operations: at GAN sizes calling one takes longer than its arithmetic."""
    half = _excess(norms, target, form.one_sided).div_(norms)
    if form.eps >= 1e-30:  # no norm is zero
        return half
    if form.one_sided:
        return half.masked_fill_(norms == 0, 0)
    # -t / 0 = -inf where n = 0, and nowhere else. This is faster than a comparison, and NaN stays NaN.
    return half.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=0.0)


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Some rows of each at a time, few enough for intermediate results to stay in cache.

    A tensor subclass such as DTensor in one block: what is written to a part of it might be lost.
    """
    rows, width = tensors[0].shape
    step = max(1, BLOCK // width)
    if step >= rows or type(tensors[0]) is not Tensor:
        return [tensors]
    return zip(*[t.split(step) for t in tensors], strict=True)


def _concatenated(columns: list[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(columns)


def _scaled(rows: Tensor, column: Tensor) -> Tensor:
    """Each row times its element of the column, or all times one number, in the column's precision, rounded once."""
    if rows.dtype == column.dtype:
        return torch.mul(rows, column)
    out = torch.empty_like(rows)
    for part, x, factor in _blocks(out, rows, column.expand(rows.shape[0], 1)):
        part.copy_(x.to(factor.dtype).mul_(factor))
    return out


def _dots(gradients: Tensor, cotangents: Tensor, dtype: torch.dtype) -> Tensor:
    """<g, u> of each row."""
    return _concatenated([(g.to(dtype) * u).sum(1) for g, u in _blocks(gradients, cotangents)])


def _second_order(gradients: Tensor, cotangents: Tensor, inverse: Tensor, curvature: Tensor, weight: Tensor) -> Tensor:
    """curvature (g / n) + weight u."""
    out = torch.empty_like(gradients)
    for part, g, u, i, c, w in _blocks(out, gradients, cotangents, inverse, curvature, weight):
        grad = part if part.dtype == i.dtype else torch.empty_like(part, dtype=i.dtype)
        torch.mul(g, i, out=grad).mul_(c).addcmul_(u, w)
        if grad is not part:
            part.copy_(grad)
    return out


def _row_norms(gradients: Rows) -> Tensor:
    """The norm of each row, over all tensors."""
    first = gradients[0]
    if len(gradients) == 1:
        return _norms_of_one(first, accumulation_type(first.dtype))
    dtype = accumulation_type(*[g.dtype for g in gradients])
    norms = _norms_of_one(first, dtype)
    for g in gradients[1:]:
        norms = torch.hypot(norms, _norms_of_one(g, dtype))
    return norms


def _norms_of_one(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if rows.dtype != dtype and rows.dtype != torch.float32:
        return _concatenated([_norms_of_one(x.to(dtype), dtype) for (x,) in _blocks(rows)])
    width = rows.shape[1]
    if width <= CHUNK or dtype == torch.float64:
        return torch.linalg.vector_norm(rows, 2, 1, dtype=dtype)
    whole = width // CHUNK * CHUNK
    chunked = rows if whole == width else rows[:, :whole]
    chunks = torch.linalg.vector_norm(chunked.view(rows.shape[0], -1, CHUNK), 2, 2, dtype=dtype)
    if whole < width:
        rest = torch.linalg.vector_norm(rows[:, whole:], 2, 1, True, dtype=dtype)
        chunks = torch.cat((chunks, rest), 1)
    return torch.linalg.vector_norm(chunks, 2, 1)


def _excess(norms: Tensor, target: Tensor | float, one_sided: bool) -> Tensor:
    difference = torch.sub(norms, target)
    return difference.clamp_(min=0) if one_sided else difference  # clamp keeps NaN


def _constants(form: PenaltyForm, norms: Tensor) -> Any:
    """target, sqrt(eps), scale and 2 scale.

    On the CPU as tensors: torch makes one of a number at every operation, which on small tensors takes longer than the
    operation. For other devices and tensor subclasses (FakeTensor) the numbers themselves.
    """
    if type(norms) is Tensor and norms.is_cpu:
        return _constant_tensors(form.target, form.eps, form.scale, norms.dtype)
    return form.target, _sqrt_eps(form.eps, norms.dtype), form.scale, 2 * form.scale


@lru_cache(maxsize=256)
def _constant_tensors(target: float, eps: float, scale: float, dtype: torch.dtype) -> list[Tensor]:
    numbers = target, _sqrt_eps(eps, dtype), scale, 2 * scale
    return [torch.tensor(number, dtype=dtype, device="cpu") for number in numbers]


def _sqrt_eps(eps: float, dtype: torch.dtype) -> float:
    return math.sqrt(eps if dtype == torch.float64 else float32(eps))
