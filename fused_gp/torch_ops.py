"""The functions of `fused_gp.kernels` in plain torch, for tensors that no Triton device holds.

On a CPU, a large new tensor costs more than the arithmetic that fills it, so each function makes no tensor of the
rows' size beyond those it returns (the double backward makes one). They know no autograd. Formulas: `kernels/`.
"""

import torch
from torch import Tensor

from .form import PenaltyForm, accumulation_type

# vector_norm adds up a row in a few fp32 lanes: its error reaches 1e-6 at 200,000 elements and 4e-4 at 10^7. Norms
# of chunks of this many elements, then the norm of those norms, keep it near 1e-7 at every length.
CHUNK = 8192


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """(R, N) rows, (R,) alpha in the accumulation type -> new (R, N)."""
    weight = alpha[:, None]
    if real.dtype == weight.dtype:
        return torch.lerp(real, fake, weight)
    return torch.lerp(real.to(weight.dtype), fake.to(weight.dtype), weight).to(real.dtype)


def interpolate_adjoint(
    cotangent: Tensor, alpha: Tensor, real_needed: bool, fake_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(R, N) cotangent of the interpolation -> the gradients asked for, of real and of fake."""
    real_grad = _scaled(cotangent, 1 - alpha) if real_needed else None
    fake_grad = _scaled(cotangent, alpha) if fake_needed else None
    return real_grad, fake_grad


def penalty_forward(gradients: Tensor, form: PenaltyForm) -> tuple[Tensor, Tensor]:
    """(R, N) rows -> (penalty, norms): a scalar or (R,), and (R,), in the accumulation type."""
    norms = _row_norms(gradients)
    if form.kappa != 1:
        norms *= form.kappa
    if form.squared:
        value = norms.square()
    else:
        if form.eps:
            norms = norms.square_().add_(form.eps).sqrt_()
        value = _excess(norms, form).square_()
    value *= form.scale
    return (value.sum() if form.reduce else value), norms


def penalty_backward(gradients: Tensor, norms: Tensor, upstream: Tensor, form: PenaltyForm) -> Tensor:
    """Upstream, a scalar or (R,) -> (R, N), the gradient of the penalty."""
    return _scaled(gradients, _row_weight(norms, form).mul_(upstream).mul_(form.scale * form.kappa**2))


def penalty_double_backward(
    gradients: Tensor, norms: Tensor, upstream: Tensor, cotangents: Tensor, form: PenaltyForm, upstream_needed: bool
) -> tuple[Tensor, Tensor | None]:
    """(R, N) cotangents of the backward -> gradients of its `gradients` and, where needed, of its `upstream`."""
    weight = _row_weight(norms, form)
    factor = upstream * (form.scale * form.kappa**2)
    dots = None
    if upstream_needed or not form.squared:
        dots = torch.mul(gradients.to(norms.dtype), cotangents).sum(1).mul_(form.kappa**2)
    upstream_grad = None
    if upstream_needed and dots is not None:
        upstream_grad = (weight * dots).mul_(form.scale)
        upstream_grad = upstream_grad.sum() if form.reduce else upstream_grad
    if form.squared or dots is None:
        return _scaled(cotangents, weight * factor), upstream_grad
    # (w'/n) s g = (2 t / n) (s / n) (g / n), in this order: 2 t / n^3 alone overflows for small n.
    inverse = torch.where(_flat(norms, form), 0.0, norms.reciprocal())
    bend = (2 * form.target) * inverse * (dots * inverse) * factor
    grad = torch.mul(gradients, inverse[:, None]).mul_(bend[:, None])
    return grad.addcmul_(cotangents, (weight * factor)[:, None]).to(gradients.dtype), upstream_grad


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """Each row times its factor, in the factor's precision, rounded once to the rows' type."""
    if rows.dtype == factor.dtype:
        return rows * factor[:, None]
    return torch.mul(rows, factor[:, None], out=torch.empty_like(rows))


def _row_norms(rows: Tensor) -> Tensor:
    dtype = accumulation_type(rows.dtype)
    width = rows.shape[1]
    if width <= 2 * CHUNK or dtype == torch.float64:
        return torch.linalg.vector_norm(rows, 2, 1, dtype=dtype)
    whole = width // CHUNK * CHUNK
    chunks = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, CHUNK)), 2, 2, dtype=dtype)
    if whole < width:
        rest = torch.linalg.vector_norm(rows[:, whole:], 2, 1, True, dtype=dtype)
        chunks = torch.cat((chunks, rest), 1)
    return torch.linalg.vector_norm(chunks, 2, 1)


def _excess(norms: Tensor, form: PenaltyForm) -> Tensor:
    difference = norms - form.target
    return difference.clamp_(min=0) if form.one_sided else difference  # clamp keeps NaN


def _flat(norms: Tensor, form: PenaltyForm) -> Tensor:
    """Rows where w' is zero: n = 0, or, one-sided, n <= t. False for NaN, which stays NaN."""
    return norms <= form.target if form.one_sided else norms == 0


def _row_weight(norms: Tensor, form: PenaltyForm) -> Tensor:
    if form.squared:
        return torch.full_like(norms, 2.0)
    weight = _excess(norms, form).div_(norms).mul_(2)
    return weight if form.eps >= 1e-30 else weight.masked_fill_(norms == 0, 0)  # no zero norms above such an eps
