"""The gradient norm penalty on rows: a row reduction, and a row scaling. Each serves two orders of derivative.

Per row, with kappa = 1 / grad_scale and x = kappa g:

    n = sqrt(sum x^2 + eps)
    two-sided  phi = (n - t)^2            w = 2 (n - t) / n             w' = 2 t / n^2
    one-sided  phi = max(n - t, 0)^2      w = 2 max(n - t, 0) / n       w' = 2 t / n^2 where n > t, else 0
    squared    phi = sum x^2              w = 2                         w' = 0

    forward             n_i, phi_i and their scaled sum                                      reduce_rows
    backward            dg = a scale kappa^2 w g                                             scale_rows
    double backward     s = kappa^2 <g, u>,  da = scale w s                                  reduce_rows
                        dg = a scale kappa^2 [w u + (w'/n) s g]                              scale_rows
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_gp.form import PenaltyForm, accumulation_type

from .launch import arrivals, launch
from .tiles import reduction_tile, tile


@triton.jit
def excess(n, target, ONE_SIDED: tl.constexpr):
    # n - t, cut at zero when one-sided. `n <= t` is false for NaN, so that a NaN stays one.
    difference = n - target
    if ONE_SIDED:
        difference = tl.where(n <= target, 0.0, difference)
    return difference


@triton.jit
def root(x):
    # Correctly rounded, so that a norm that is exactly the target comes out so; tl.sqrt is approximate in fp32.
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def row_weight(n, target, ONE_SIDED: tl.constexpr, SQUARED: tl.constexpr):
    # w(n). A zero row (n = 0 needs eps = 0) has w = 0: it sits at the minimum of its own n.
    if SQUARED:
        return tl.full(n.shape, 2.0, n.dtype)
    else:
        return tl.where(n == 0.0, 0.0, 2.0 * excess(n, target, ONE_SIDED) / tl.where(n == 0.0, 1.0, n))


@triton.jit
def finish_rows(
    total, row, mask, norms, dots, penalty, eps, target, scale,
    ONE_SIDED: tl.constexpr, SQUARED: tl.constexpr, DOUBLE: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    # From a row's sum to what is kept of the row; returns its share of the scaled sum over rows.
    if DOUBLE:
        tl.store(dots + row, total, mask=mask)
        n = tl.load(norms + row, mask=mask, other=1.0)
        value = row_weight(n, target, ONE_SIDED, SQUARED) * total * scale
    elif SQUARED:
        tl.store(norms + row, root(total), mask=mask)
        value = total * scale
    else:
        n = root(total + eps)
        tl.store(norms + row, n, mask=mask)
        difference = excess(n, target, ONE_SIDED)
        value = difference * difference * scale
    if penalty is not None and not REDUCE:
        tl.store(penalty + row, value, mask=mask)
    return tl.where(mask, value, 0.0)


@triton.jit
def reduce_rows_kernel(
    gradients, cotangents, norms, dots, penalty, partials, arrived,
    rows, width, slice_width, gradients_stride, cotangents_stride,
    kappa: tl.float64, eps: tl.float64, target: tl.float64, scale: tl.float64,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr,
    ONE_SIDED: tl.constexpr, SQUARED: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    # Without cotangents: sum x^2 per row, then norms and penalty. With them: kappa^2 <g, u>, then dots and the
    # gradient of the upstream factor (in `penalty`).
    acc = norms.dtype.element_ty
    kappa = tl.full((), kappa, acc)
    eps = tl.full((), eps, acc)
    target = tl.full((), target, acc)
    scale = tl.full((), scale, acc)
    DOUBLE: tl.constexpr = cotangents is not None

    program = tl.program_id(0)
    row = (program // SPLITS * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_batch = row < rows
    begin = (program % SPLITS).to(tl.int64) * slice_width
    end = tl.minimum(begin + slice_width, width)

    sums = tl.zeros((ROWS, COLS), acc)
    for start in range(begin, end, COLS):
        col = start + tl.arange(0, COLS)
        mask = in_batch[:, None] & (col < width)[None, :]
        g = tl.load(gradients + row[:, None] * gradients_stride + col[None, :], mask=mask, other=0.0).to(acc) * kappa
        if DOUBLE:
            u = tl.load(cotangents + row[:, None] * cotangents_stride + col[None, :], mask=mask, other=0.0).to(acc)
            sums += g * (u * kappa)
        else:
            sums += g * g
    total = tl.sum(sums, axis=1)

    if SPLITS == 1:
        value = finish_rows(
            total, row, in_batch, norms, dots, penalty, eps, target, scale, ONE_SIDED, SQUARED, DOUBLE, REDUCE
        )
        if REDUCE:
            tl.store(partials + program, tl.sum(value, axis=0))
    else:
        tl.store(partials + program + tl.arange(0, 1), total)  # ROWS is 1 here

    if REDUCE or SPLITS > 1:
        # The last program to arrive finishes. The barrier puts every thread's partial before this program's arrival;
        # the arrival releases it, and acquires those of the programs that arrived earlier.
        tl.debug_barrier()
        programs = tl.num_programs(0)
        if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == programs - 1:
            grand_total = tl.full((), 0.0, acc)
            if SPLITS == 1:
                BLOCK: tl.constexpr = 1024
                for first in range(0, programs, BLOCK):
                    index = first + tl.arange(0, BLOCK)
                    grand_total += tl.sum(tl.load(partials + index, mask=index < programs, other=0.0), axis=0)
            else:
                FEW: tl.constexpr = 1024 // SPLITS
                for first in range(0, rows, FEW):
                    each = (first + tl.arange(0, FEW)).to(tl.int64)
                    known = each < rows
                    index = each[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
                    row_sums = tl.sum(tl.load(partials + index, mask=known[:, None], other=0.0), axis=1)
                    grand_total += tl.sum(
                        finish_rows(
                            row_sums, each, known, norms, dots, penalty, eps, target, scale,
                            ONE_SIDED, SQUARED, DOUBLE, REDUCE,
                        ), axis=0,
                    )  # fmt: skip
            if REDUCE:
                tl.store(penalty, grand_total)
            tl.store(arrived, 0)


@triton.jit
def scale_rows_kernel(
    gradients, cotangents, norms, dots, upstream, out,
    rows, width, tiles, gradients_stride, cotangents_stride, upstream_stride,
    kappa: tl.float64, target: tl.float64, scale: tl.float64,
    ROWS: tl.constexpr, COLS: tl.constexpr, ONE_SIDED: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    # Without cotangents: a scale kappa^2 w g. With them: a scale kappa^2 [w u + (w'/n) s g].
    acc = norms.dtype.element_ty
    kappa = tl.full((), kappa, acc)
    target = tl.full((), target, acc)
    scale = tl.full((), scale, acc)

    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = (tl.program_id(0) % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    in_batch = row < rows
    mask = in_batch[:, None] & (col < width)[None, :]

    a = tl.load(upstream + row * upstream_stride, mask=in_batch, other=0.0) * scale * (kappa * kappa)
    n = tl.load(norms + row, mask=in_batch, other=1.0)
    w = (a * row_weight(n, target, ONE_SIDED, SQUARED))[:, None]
    if cotangents is None:
        g = tl.load(gradients + row[:, None] * gradients_stride + col[None, :], mask=mask, other=0.0).to(acc)
        value = w * g
    else:
        u = tl.load(cotangents + row[:, None] * cotangents_stride + col[None, :], mask=mask, other=0.0).to(acc)
        value = w * u
        if not SQUARED:
            # (w'/n) s g = (2 t / n) (s / n) (g / n), in this order: 2 t / n^3 alone overflows for small n.
            g = tl.load(gradients + row[:, None] * gradients_stride + col[None, :], mask=mask, other=0.0).to(acc)
            flat = n == 0.0
            if ONE_SIDED:
                flat = n <= target
            inverse = 1.0 / tl.where(flat, 1.0, n)
            s = tl.load(dots + row, mask=in_batch, other=0.0)
            bend = tl.where(flat, 0.0, a * (2.0 * target * inverse) * (s * inverse))
            value += bend[:, None] * (g * inverse[:, None])
    tl.store(out + row[:, None] * width + col[None, :], value, mask=mask)


def penalty_forward(gradients: Tensor, form: PenaltyForm) -> tuple[Tensor, Tensor]:
    """(R, N) rows -> (penalty, norms): a scalar or (R,), and (R,), in the accumulation type."""
    norms = gradients.new_empty(gradients.shape[0], dtype=accumulation_type(gradients.dtype))
    penalty = norms.new_empty(() if form.reduce else norms.shape)
    _reduce_rows(gradients, None, norms, None, penalty, form)
    return penalty, norms


def penalty_backward(gradients: Tensor, norms: Tensor, upstream: Tensor, form: PenaltyForm) -> Tensor:
    """Upstream, a scalar or (R,) -> (R, N), the gradient of the penalty."""
    return _scale_rows(gradients, None, norms, None, upstream, form)


def penalty_double_backward(
    gradients: Tensor, norms: Tensor, upstream: Tensor, cotangents: Tensor, form: PenaltyForm, upstream_needed: bool
) -> tuple[Tensor, Tensor | None]:
    """(R, N) cotangents of the backward -> gradients of its `gradients` and, where needed, of its `upstream`."""
    dots = torch.empty_like(norms)
    upstream_grad = norms.new_empty(upstream.shape) if upstream_needed else None
    if upstream_needed or not form.squared:  # squared alone has w' = 0: its dots go nowhere
        _reduce_rows(gradients, cotangents, norms, dots, upstream_grad, form)
    return _scale_rows(gradients, cotangents, norms, dots, upstream, form), upstream_grad


def _reduce_rows(
    gradients: Tensor,
    cotangents: Tensor | None,
    norms: Tensor,
    dots: Tensor | None,
    penalty: Tensor | None,
    form: PenaltyForm,
) -> None:
    rows, width = gradients.shape
    reduce = form.reduce and penalty is not None
    tiling = reduction_tile(rows, width, gradients.element_size())
    programs = triton.cdiv(rows, tiling.rows) * tiling.splits
    slice_width = triton.cdiv(triton.cdiv(width, tiling.splits), tiling.cols) * tiling.cols
    finishes = reduce or tiling.splits > 1  # only then are there partial sums, and somebody to finish them
    launch(
        reduce_rows_kernel, programs, gradients,
        gradients, cotangents, norms, dots, penalty,
        norms.new_empty(programs) if finishes else None, arrivals(gradients.device) if finishes else None,
        rows, width, slice_width, gradients.stride(0), 0 if cotangents is None else cotangents.stride(0),
        form.kappa, form.eps, form.target, form.scale,
        ROWS=tiling.rows, COLS=tiling.cols, SPLITS=tiling.splits,
        ONE_SIDED=form.one_sided, SQUARED=form.squared, REDUCE=reduce,
    )  # fmt: skip


def _scale_rows(
    gradients: Tensor,
    cotangents: Tensor | None,
    norms: Tensor,
    dots: Tensor | None,
    upstream: Tensor,
    form: PenaltyForm,
) -> Tensor:
    rows, width = gradients.shape
    upstream = upstream.resolve_neg()
    out = gradients.new_empty(rows, width)
    tiling = tile(rows, width, gradients.element_size())
    tiles = triton.cdiv(width, tiling.cols)
    launch(
        scale_rows_kernel, triton.cdiv(rows, tiling.rows) * tiles, gradients,
        gradients, cotangents, norms, dots, upstream, out,
        rows, width, tiles, gradients.stride(0), 0 if cotangents is None else cotangents.stride(0),
        upstream.stride(0) if upstream.ndim else 0,
        form.kappa, form.target, form.scale,
        ROWS=tiling.rows, COLS=tiling.cols, ONE_SIDED=form.one_sided, SQUARED=form.squared,
    )  # fmt: skip
    return out
