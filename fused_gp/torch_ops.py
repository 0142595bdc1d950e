"""The functions of `fused_gp.kernels` in plain torch, for tensors that no Triton device holds.

On a CPU, a large new tensor costs more than the arithmetic that fills it, so each function makes no tensor of the
rows' size beyond those it returns (half types make fp32 ones on the way). They know no autograd. Formulas: `kernels/`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from numpy import float32
from torch import Tensor

from .form import PenaltyForm, accumulation_type

# vector_norm adds up a row in a few fp32 lanes: its error reaches 2e-6 at 200,000 elements and 4e-4 at 10^7. Norms
# of chunks of this many elements, then the norm of those norms, keep it near 1e-7 at every length.
CHUNK = 4096


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """(R, N) rows, (R, 1) alpha in the accumulation type -> new (R, N)."""
    if real.dtype == alpha.dtype:
        return torch.lerp(real, fake, alpha)
    return torch.lerp(real.to(alpha.dtype), fake.to(alpha.dtype), alpha).to(real.dtype)


def interpolate_adjoint(
    cotangent: Tensor, alpha: Tensor, real_needed: bool, fake_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(R, N) cotangent of the interpolation -> the gradients asked for, of real and of fake."""
    real_grad = _scaled(cotangent, 1 - alpha) if real_needed else None
    fake_grad = _scaled(cotangent, alpha) if fake_needed else None
    return real_grad, fake_grad


def perturb(points: Tensor, gradients: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """(R, N) rows and gradients, (R, 1) column in the accumulation type -> points + column gradients, and minus it."""
    dtype = column.dtype
    x, g = points.to(dtype), gradients.to(dtype)
    plus, minus = torch.addcmul(x, g, column), torch.addcmul(x, g, column, value=-1)
    return plus.to(points.dtype), minus.to(points.dtype)


def penalty_forward(gradients: Sequence[Tensor], form: PenaltyForm) -> tuple[Tensor, Tensor]:
    """(R, N) rows of one tensor or several -> penalty, a scalar or (R,), and norms, (R,), in the accumulation type."""
    norms = _row_norms(gradients)
    if form.kappa is not None:
        norms *= form.kappa
    if form.eps and not form.squared:
        norms = _with_eps(norms, form.eps)
    distance = norms if form.squared else _excess(norms, form)
    penalty = torch.dot(distance, distance) if form.reduce else distance.square()
    return penalty.mul_(_number(form.scale, norms)), norms


def penalty_backward(gradients: Sequence[Tensor], norms: Tensor, upstream: Tensor, form: PenaltyForm) -> list[Tensor]:
    """Upstream, a scalar or (R,) -> the gradients of the penalty, (R, N) each."""
    weight = row_weight(norms, upstream, form)
    return [_scaled(g, weight) for g in gradients]


def penalty_double_backward(
    gradients: Sequence[Tensor],
    norms: Tensor,
    upstream: Tensor,
    cotangents: Sequence[Tensor],
    form: PenaltyForm,
    upstream_needed: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """(R, N) cotangents of the backward -> gradients of its `gradients` and, where needed, of its `upstream`."""
    weight = row_weight(norms, upstream, form)
    if form.squared and not upstream_needed:
        return [_scaled(u, weight) for u in cotangents], None
    products = [torch.mul(g.to(norms.dtype), u) for g, u in zip(gradients, cotangents, strict=True)]
    dots = products[0].sum(1)
    for product in products[1:]:
        dots += product.sum(1)
    if form.kappa is not None:
        dots.mul_(form.kappa).mul_(form.kappa)

    upstream_grad = None
    if upstream_needed:
        upstream_grad = dots * _number(2 * form.scale, norms)
        upstream_grad = upstream_grad if form.squared else upstream_grad.mul_(_half_w(norms, form))
        upstream_grad = upstream_grad.sum() if form.reduce else upstream_grad
    if form.squared:
        return [_scaled(u, weight) for u in cotangents], upstream_grad

    # (w'/n) s g = (2 t / n) (s / n) (g / n), in this order: 2 t / n^3 alone overflows for small n.
    flat = norms <= form.target if form.one_sided else norms == 0  # false for NaN, which stays NaN
    inverse = norms.reciprocal().masked_fill_(flat, 0.0)
    bend = (upstream * inverse).mul_(2 * form.target * form.scale) * (dots * inverse)
    if form.kappa is not None:
        bend.mul_(form.kappa).mul_(form.kappa)
    grads = []
    for g, u, product in zip(gradients, cotangents, products, strict=True):
        grad = torch.mul(g, inverse[:, None], out=product).mul_(bend[:, None])
        grads.append(grad.addcmul_(u, weight).to(g.dtype))
    return grads, upstream_grad


def row_weight(norms: Tensor, upstream: Tensor, form: PenaltyForm) -> Tensor:
    """upstream * scale * kappa^2 * w(n), as a column, or as one number where all rows have the same."""
    factor = upstream * _number(2 * form.scale, norms)
    if form.kappa is not None:
        factor.mul_(form.kappa).mul_(form.kappa)
    if form.squared:  # w = 2
        return factor.unsqueeze(1) if factor.ndim else factor
    return _half_w(norms, form).mul_(factor).unsqueeze(1)


def _half_w(norms: Tensor, form: PenaltyForm) -> Tensor:
    """w(n) / 2 = (n - t) / n. Few operations: at GAN sizes each costs more than its work."""
    half = _excess(norms, form).div_(norms)
    if form.eps >= 1e-30:  # such an eps leaves no norm at zero
        return half
    if form.one_sided:
        return half.masked_fill_(norms == 0, 0)
    # Where n = 0, and nowhere else, it is -t / 0 = -inf. Faster than comparing; NaN stays NaN.
    return half.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=0.0)


def _scaled(rows: Tensor, column: Tensor) -> Tensor:
    """Each row times its element of the column, or all times one number, in its precision, rounded once."""
    if rows.dtype == column.dtype:
        return torch.mul(rows, column)
    return torch.mul(rows, column, out=torch.empty_like(rows))


def _row_norms(gradients: Sequence[Tensor]) -> Tensor:
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
    width = rows.shape[1]
    if width <= CHUNK or dtype == torch.float64:
        return torch.linalg.vector_norm(rows, 2, 1, dtype=dtype)
    whole = width // CHUNK * CHUNK
    chunks = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, CHUNK)), 2, 2, dtype=dtype)
    if whole < width:
        rest = torch.linalg.vector_norm(rows[:, whole:], 2, 1, True, dtype=dtype)
        chunks = torch.cat((chunks, rest), 1)
    return torch.linalg.vector_norm(chunks, 2, 1)


def _excess(norms: Tensor, form: PenaltyForm) -> Tensor:
    difference = norms - _number(form.target, norms)
    return difference.clamp_(min=0) if form.one_sided else difference  # clamp keeps NaN


def _with_eps(norms: Tensor, eps: float) -> Tensor:
    """n = sqrt(||g||^2 + eps) as hypot(||g||, sqrt(eps)): one operation, which neither overflows nor waits.

    torch.sqrt hands more than 2048 numbers to all threads of MKL, and on busy cores takes milliseconds.
    """
    root = math.sqrt(eps if norms.dtype == torch.float64 else float32(eps))
    plain = type(norms) is Tensor and norms.is_cpu
    return torch.hypot(norms, _tensor(root, norms.dtype) if plain else norms.new_full((), root))


def _number(value: float, like: Tensor) -> Tensor | float:
    """For CPU tensors, a number as a tensor: torch otherwise makes one of it at every operation, which on small tensors
    takes longer than the operation. Other devices and other kinds of tensor (FakeTensor) get the number itself.
    """
    return _tensor(value, like.dtype) if type(like) is Tensor and like.is_cpu else value


@lru_cache(maxsize=256)
def _tensor(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")
