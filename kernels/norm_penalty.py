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

Where several tensors make up a row, each launch of a reduction carries the sums of the tensors before it on, and the
last one takes the root.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_gp.form import PenaltyForm, accumulation_type

from .launch import arrival_counter, launch
from .tiles import LENGTHS, mask_of, multiple_of, pointers, reduction_tile, tile, tile_of, vector_of

Rows = Sequence[Tensor]  # (R, N) each, of one R


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
    # w(n). A zero row (n = 0, with eps = 0) has w = 0: it is at the minimum of its own n.
    if SQUARED:
        return tl.full(n.shape, 2.0, n.dtype)
    else:
        return tl.where(n == 0.0, 0.0, 2.0 * excess(n, target, ONE_SIDED) / tl.where(n == 0.0, 1.0, n))


@triton.jit
def load_kappa(kappa, kappa_at, acc: tl.constexpr):
    # kappa: a number, or the element of a tensor, where it is on the device only (a GradScaler's).
    if kappa_at is None:
        return tl.full((), kappa, acc)
    else:
        return tl.load(kappa_at).to(acc)


@triton.jit
def finish_rows(
    total, row, mask, norms, carried, sums, penalty, eps, target, scale,
    ONE_SIDED: tl.constexpr, SQUARED: tl.constexpr, DOUBLE: tl.constexpr, LAST: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    # From a row's sum to its norm and penalty; returns its share of the scaled sum over rows.
    if carried is not None:
        total += tl.load(carried + row, mask=mask, other=0.0)
    if sums is not None:
        tl.store(sums + row, total, mask=mask)
    value = total * scale
    if LAST:
        if DOUBLE:
            n = tl.load(norms + row, mask=mask, other=1.0)
            value *= row_weight(n, target, ONE_SIDED, SQUARED)
        elif SQUARED:
            tl.store(norms + row, root(total), mask=mask)
        else:
            n = root(total + eps)
            tl.store(norms + row, n, mask=mask)
            difference = excess(n, target, ONE_SIDED)
            value = difference * difference * scale
    if penalty is not None and not REDUCE:
        tl.store(penalty + row, value, mask=mask)
    return tl.where(mask, value, 0.0)


@triton.jit(do_not_specialize_on_alignment=LENGTHS)
def reduce_rows_kernel(
    gradients, cotangents, norms, carried, sums, penalty, partials, arrived, kappa_at,
    rows, width, tiles, splits, blocks, gradients_stride, cotangents_stride,
    kappa: tl.float64, eps: tl.float64, target: tl.float64, scale: tl.float64,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, SPLITS: tl.constexpr,
    ONE_SIDED: tl.constexpr, SQUARED: tl.constexpr, LAST: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    # Without cotangents: sum x^2 per row. With them: kappa^2 <g, u>. The sums carried from other tensors of the row are
    # added; `sums`, where given, receives the total. The last tensor's launch computes norms and penalty from it, or,
    # with cotangents, the gradient of the upstream factor (in `penalty`).
    acc = norms.dtype.element_ty
    kappa = load_kappa(kappa, kappa_at, acc)
    eps = tl.full((), eps, acc)
    target = tl.full((), target, acc)
    scale = tl.full((), scale, acc)
    DOUBLE: tl.constexpr = cotangents is not None
    width = multiple_of(width, VECTOR)
    gradients_stride, cotangents_stride = multiple_of(gradients_stride, VECTOR), multiple_of(cotangents_stride, VECTOR)

    program = tl.program_id(0)
    share = tl.zeros((ROWS,), acc)
    for block in range(blocks):
        row = ((program // splits).to(tl.int64) * blocks + block) * ROWS + tl.arange(0, ROWS)
        in_batch = row < rows
        split = program % splits
        begin = split.to(tl.int64) * COLS
        mask = mask_of(in_batch, begin, width, COLS)
        g = tl.load(pointers(gradients, row, gradients_stride, begin, COLS), mask=mask, other=0.0)
        if DOUBLE:
            u = tl.load(pointers(cotangents, row, cotangents_stride, begin, COLS), mask=mask, other=0.0)
        lanes = tl.zeros((ROWS, COLS), acc)
        for _ in range(split, tiles, splits):
            # The next tile is loaded while this one is summed. ptxas, to save registers, otherwise waits for each of a
            # thread's loads before it issues the next.
            begin += splits * COLS
            mask = mask_of(in_batch, begin, width, COLS)
            next_g = tl.load(pointers(gradients, row, gradients_stride, begin, COLS), mask=mask, other=0.0)
            x = g.to(acc) * kappa
            if DOUBLE:
                next_u = tl.load(pointers(cotangents, row, cotangents_stride, begin, COLS), mask=mask, other=0.0)
                lanes += x * (u.to(acc) * kappa)
                u = next_u
            else:
                lanes += x * x
            g = next_g
        total = tl.sum(lanes, axis=1)

        if SPLITS == 1:
            share += finish_rows(
                total, row, in_batch, norms, carried, sums, penalty, eps, target, scale,
                ONE_SIDED, SQUARED, DOUBLE, LAST, REDUCE,
            )  # fmt: skip
        else:
            tl.store(partials + row * SPLITS + split, total)  # ROWS and blocks are 1 here
    if SPLITS == 1 and REDUCE:
        if arrived is None:  # this is the only program
            tl.store(penalty, tl.sum(share, axis=0))
        else:
            tl.store(partials + program, tl.sum(share, axis=0))

    if arrived is not None:
        # The last program to arrive finishes. What makes every partial sum visible to it:
        #   the store       plain, by a thread that Triton chooses;
        #   the barrier     orders the stores of all the program's threads before the arrival, which one of them makes;
        #   the arrival     a release: a program that observes it observes what came before it, the other threads'
        #                   stores included; and an acquire: this program observes what came before the arrivals
        #                   counted so far (each acquired the one before it). Which program is the last is known only
        #                   afterwards, so all of them acquire;
        #   a barrier       Triton's own, between the thread that arrived and those that receive the count;
        #   the loads       plain: the acquire invalidated the processor's cache.
        # All other loads and stores are of memory that one program alone uses.
        tl.debug_barrier()
        programs = tl.num_programs(0)
        if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == programs - 1:
            grand_total = tl.full((), 0.0, acc)
            BLOCK: tl.constexpr = 1024 if acc == tl.float64 else 2048  # 8192 bytes at once, as everywhere
            if SPLITS == 1:
                for first in range(0, programs, BLOCK):
                    index = first + tl.arange(0, BLOCK)
                    grand_total += tl.sum(tl.load(partials + index, mask=index < programs, other=0.0), axis=0)
            else:
                FEW: tl.constexpr = BLOCK // SPLITS if SPLITS < BLOCK else 1
                for first in range(0, rows, FEW):
                    each = (first + tl.arange(0, FEW)).to(tl.int64)
                    known = each < rows
                    split = tl.arange(0, SPLITS)[None, :]
                    # Those past the last split were not written. They are loaded and left out, so that loads are wide.
                    sums_of = tl.load(partials + each[:, None] * SPLITS + split, mask=known[:, None], other=0.0)
                    row_sums = tl.sum(tl.where(split < splits, sums_of, 0.0), axis=1)
                    grand_total += tl.sum(
                        finish_rows(
                            row_sums, each, known, norms, carried, sums, penalty, eps, target, scale,
                            ONE_SIDED, SQUARED, DOUBLE, LAST, REDUCE,
                        ), axis=0,
                    )  # fmt: skip
            if REDUCE:
                tl.store(penalty, grand_total)


@triton.jit(do_not_specialize_on_alignment=LENGTHS)
def scale_rows_kernel(
    gradients, cotangents, norms, dots, upstream, kappa_at, out,
    rows, width, tiles, gradients_stride, cotangents_stride, upstream_stride,
    kappa: tl.float64, target: tl.float64, scale: tl.float64,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr, ONE_SIDED: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    # Without cotangents: a scale kappa^2 w g. With them: a scale kappa^2 [w u + (w'/n) s g].
    acc = norms.dtype.element_ty
    kappa = load_kappa(kappa, kappa_at, acc)
    target = tl.full((), target, acc)
    scale = tl.full((), scale, acc)
    width = multiple_of(width, VECTOR)
    gradients_stride, cotangents_stride = multiple_of(gradients_stride, VECTOR), multiple_of(cotangents_stride, VECTOR)

    row, in_batch, begin, mask = tile_of(tl.program_id(0), rows, width, tiles, ROWS, COLS)
    if cotangents is not None:
        u = tl.load(pointers(cotangents, row, cotangents_stride, begin, COLS), mask=mask, other=0.0).to(acc)
    if cotangents is None or not SQUARED:
        g = tl.load(pointers(gradients, row, gradients_stride, begin, COLS), mask=mask, other=0.0).to(acc)

    # kappa multiplies g, u and a one by one: its square can leave the range of fp32 where these products do not.
    a = tl.load(upstream + row * upstream_stride, mask=in_batch, other=0.0) * scale * kappa
    n = tl.load(norms + row, mask=in_batch, other=1.0)
    w = (a * row_weight(n, target, ONE_SIDED, SQUARED))[:, None]
    if cotangents is None:
        value = w * (g * kappa)
    else:
        value = w * (u * kappa)
        if not SQUARED:
            # (w'/n) s g = (2 t / n) (s / n) (g / n), in this order: 2 t / n^3 alone overflows for small n.
            flat = n == 0.0
            if ONE_SIDED:
                flat = n <= target
            inverse = 1.0 / tl.where(flat, 1.0, n)
            s = tl.load(dots + row, mask=in_batch, other=0.0)
            curvature = tl.where(flat, 0.0, a * (2.0 * target * inverse) * (s * inverse))
            value += curvature[:, None] * (g * kappa * inverse[:, None])
    if out.dtype.element_ty != acc:  # a half tensor beside a fp64 one: there is no direct cast from fp64 to bf16
        value = value.to(tl.float32)
    tl.store(pointers(out, row, width, begin, COLS), value, mask=mask)


def penalty_forward(gradients: Rows, form: PenaltyForm) -> tuple[Tensor, Tensor]:
    """(R, N) rows of one tensor or several -> penalty, a scalar or (R,), and norms, (R,), in the accumulation type."""
    norms = gradients[0].new_empty(form.rows, dtype=accumulation_type(*[g.dtype for g in gradients]))
    penalty = norms.new_empty(() if form.reduce else norms.shape)
    _reduce_rows(gradients, None, norms, None, penalty, form)
    return penalty, norms


def penalty_backward(gradients: Rows, norms: Tensor, upstream: Tensor, form: PenaltyForm) -> list[Tensor]:
    """Upstream, a scalar or (R,) -> the gradients of the penalty, (R, N) each."""
    return [_scale_rows(g, None, norms, None, upstream, form) for g in gradients]


def penalty_double_backward(
    gradients: Rows, norms: Tensor, upstream: Tensor, cotangents: Rows, form: PenaltyForm, upstream_needed: bool
) -> tuple[list[Tensor], Tensor | None]:
    """(R, N) cotangents of the backward -> gradients of its `gradients` and, where needed, of its `upstream`."""
    dots = torch.empty_like(norms)
    upstream_grad = norms.new_empty(upstream.shape) if upstream_needed else None
    if upstream_needed or not form.squared:  # squared has w' = 0: its dots are not needed
        _reduce_rows(gradients, cotangents, norms, dots, upstream_grad, form)
    pairs = zip(gradients, cotangents, strict=True)
    return [_scale_rows(g, u, norms, dots, upstream, form) for g, u in pairs], upstream_grad


def _reduce_rows(
    gradients: Rows, cotangents: Rows | None, norms: Tensor, dots: Any, penalty: Tensor | None, form: PenaltyForm
) -> None:
    """One launch per tensor; the last finishes the rows."""
    kappa, kappa_at = _kappa(form)
    carried = None
    last = len(gradients) - 1
    for index, g in enumerate(gradients):
        u = None if cotangents is None else cotangents[index]
        sums = dots if index == last else torch.empty_like(norms)
        result = penalty if index == last else None
        rows, width = g.shape
        itemsize, stride, u_stride = g.itemsize, g.stride()[0], 0 if u is None else u.stride()[0]
        reduce = form.reduce and result is not None
        tiling = reduction_tile(rows, width, itemsize)
        programs, splits, slots = tiling.programs, tiling.splits, tiling.slots
        vector = vector_of(itemsize, width | stride | u_stride)
        partial = programs > 1 and (reduce or splits > 1)  # there are partial sums, which the last program adds up
        launch(
            reduce_rows_kernel, programs,
            (
                g, u, norms, carried, sums, result,
                norms.new_empty(rows * slots if slots > 1 else programs) if partial else None,
                arrival_counter(g.device) if partial else None, kappa_at,
            ),
            (rows, width, tiling.tiles, splits, tiling.blocks, stride, u_stride),
            (kappa, form.eps, form.target, form.scale),
            (
                tiling.rows, tiling.cols, vector, slots,
                form.one_sided, form.squared, index == last, reduce,
            ),
        )  # fmt: skip
        carried = sums


def _scale_rows(
    gradients: Tensor, cotangents: Tensor | None, norms: Tensor, dots: Any, upstream: Tensor, form: PenaltyForm
) -> Tensor:
    rows, width = gradients.shape
    kappa, kappa_at = _kappa(form)
    upstream = upstream.resolve_neg()
    out = gradients.new_empty(rows, width)
    itemsize, stride = gradients.itemsize, gradients.stride()[0]
    u_stride = 0 if cotangents is None else cotangents.stride()[0]
    tiling = tile(rows, width, itemsize)
    vector = vector_of(itemsize, width | stride | u_stride)
    launch(
        scale_rows_kernel, tiling.programs,
        (gradients, cotangents, norms, dots, upstream, kappa_at, out),
        (
            rows, width, tiling.tiles, stride, u_stride,
            upstream.stride()[0] if upstream.ndim else 0,
        ),
        (kappa, form.target, form.scale),
        (tiling.rows, tiling.cols, vector, form.one_sided, form.squared),
    )  # fmt: skip
    return out


def _kappa(form: PenaltyForm) -> tuple[float, Tensor | None]:
    """kappa as a number for the kernel, or as the tensor it reads."""
    if isinstance(form.kappa, Tensor):
        return 1.0, form.kappa
    return 1.0 if form.kappa is None else form.kappa, None
