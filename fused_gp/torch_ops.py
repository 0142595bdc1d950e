"""The functions of `fused_gp.kernels` in plain torch, for tensors that no Triton device holds.

On a CPU, a large new tensor costs more than the arithmetic that fills it, so each function makes no tensor of the
rows' size beyond those it returns (the double backward makes one). They know no autograd. Formulas: `kernels/`.
"""

import torch
from torch import Tensor

from .form import PenaltyForm, accumulation_type

# vector_norm adds up a row in a few fp32 lanes: its error reaches 2e-6 at 200,000 elements and 4e-4 at 10^7. Norms
# of chunks of this many elements, then the norm of those norms, keep it near 1e-7 at every length.
CHUNK = 4096


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """(R, N) rows, (R,) alpha in the accumulation type -> new (R, N)."""
    weight = alpha.unsqueeze(1)
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
    if form.eps and not form.squared:
        eps = torch.full((), form.eps, dtype=norms.dtype, device=norms.device)
        norms = torch.addcmul(eps, norms, norms).sqrt_()
    distance = norms if form.squared else _excess(norms, form)
    penalty = torch.dot(distance, distance) if form.reduce else distance.square()
    return penalty.mul_(form.scale), norms


def penalty_backward(gradients: Tensor, norms: Tensor, upstream: Tensor, form: PenaltyForm) -> Tensor:
    """Upstream, a scalar or (R,) -> (R, N), the gradient of the penalty."""
    return _scaled(gradients, _weighted(upstream * (2 * form.scale * form.kappa**2), norms, form))


def penalty_double_backward(
    gradients: Tensor, norms: Tensor, upstream: Tensor, cotangents: Tensor, form: PenaltyForm, upstream_needed: bool
) -> tuple[Tensor, Tensor | None]:
    """(R, N) cotangents of the backward -> gradients of its `gradients` and, where needed, of its `upstream`."""
    factor = upstream * (2 * form.scale * form.kappa**2)
    weight = _weighted(factor, norms, form)
    if form.squared and not upstream_needed:
        return _scaled(cotangents, weight), None
    products = torch.mul(gradients.to(norms.dtype), cotangents)
    dots = products.sum(1).mul_(form.kappa**2)

    upstream_grad = None
    if upstream_needed:
        upstream_grad = _weighted(dots * (2 * form.scale), norms, form)
        upstream_grad = upstream_grad.sum() if form.reduce else upstream_grad
    if form.squared:
        return _scaled(cotangents, weight), upstream_grad

    # (w'/n) s g = (2 t / n) (s / n) (g / n), in this order: 2 t / n^3 alone overflows for small n.
    inverse = norms.reciprocal().masked_fill_(_flat(norms, form), 0.0)
    bend = (factor * inverse).mul_(form.target) * (dots * inverse)
    grad = torch.mul(gradients, inverse[:, None], out=products).mul_(bend[:, None])
    return grad.addcmul_(cotangents, weight[:, None]).to(gradients.dtype), upstream_grad


def _weighted(factor: Tensor, norms: Tensor, form: PenaltyForm) -> Tensor:
    """factor * w(n) / 2, where w(n) = 2 - 2 t / n. Few operations: at GAN sizes each costs more than its work."""
    if form.squared:
        return factor.expand_as(norms)
    weighted = torch.addcdiv(factor, factor, norms, value=-form.target)
    if form.one_sided or form.eps < 1e-30:  # such an eps leaves no norm at zero
        weighted.masked_fill_(_flat(norms, form), 0.0)
    return weighted


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """Each row times its factor, in the factor's precision, rounded once to the rows' type."""
    column = factor.unsqueeze(1)
    if rows.dtype == factor.dtype:
        return torch.mul(rows, column)
    return torch.mul(rows, column, out=torch.empty_like(rows))


def _row_norms(rows: Tensor) -> Tensor:
    dtype = accumulation_type(rows.dtype)
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
    difference = norms - form.target
    return difference.clamp_(min=0) if form.one_sided else difference  # clamp keeps NaN


def _flat(norms: Tensor, form: PenaltyForm) -> Tensor:
    """Rows where w' is zero: n = 0, or, one-sided, n <= t. False for NaN, which stays NaN."""
    return norms <= form.target if form.one_sided else norms == 0
