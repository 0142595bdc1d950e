"""Interpolation between rows, its adjoint, and central differences around rows: one launch, each element moved once."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tiles import LENGTHS, multiple_of, pointers, tile, tile_of, vector_of


@triton.jit(do_not_specialize_on_alignment=LENGTHS)
def interpolate_kernel(
    real, fake, alpha, out, rows, width, tiles, real_stride, fake_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # out_i = alpha_i fake_i + (1 - alpha_i) real_i, in the precision of alpha. Exact at alpha = 0 and alpha = 1.
    acc = alpha.dtype.element_ty
    width = multiple_of(width, VECTOR)
    real_stride, fake_stride = multiple_of(real_stride, VECTOR), multiple_of(fake_stride, VECTOR)
    row, in_batch, begin, mask = tile_of(tl.program_id(0), rows, width, tiles, ROWS, COLS)
    x = tl.load(pointers(real, row, real_stride, begin, COLS), mask=mask, other=0.0).to(acc)
    y = tl.load(pointers(fake, row, fake_stride, begin, COLS), mask=mask, other=0.0).to(acc)
    a = tl.load(alpha + row, mask=in_batch, other=0.0)[:, None]
    tl.store(pointers(out, row, width, begin, COLS), a * y + (1.0 - a) * x, mask=mask)


@triton.jit(do_not_specialize_on_alignment=LENGTHS)
def interpolate_adjoint_kernel(
    cotangent, alpha, real_grad, fake_grad, rows, width, tiles, stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # real_grad_i = (1 - alpha_i) cotangent_i,  fake_grad_i = alpha_i cotangent_i; a grad that is None is not written.
    acc = alpha.dtype.element_ty
    width, stride = multiple_of(width, VECTOR), multiple_of(stride, VECTOR)
    row, in_batch, begin, mask = tile_of(tl.program_id(0), rows, width, tiles, ROWS, COLS)
    c = tl.load(pointers(cotangent, row, stride, begin, COLS), mask=mask, other=0.0).to(acc)
    a = tl.load(alpha + row, mask=in_batch, other=0.0)[:, None]
    if real_grad is not None:
        tl.store(pointers(real_grad, row, width, begin, COLS), (1.0 - a) * c, mask=mask)
    if fake_grad is not None:
        tl.store(pointers(fake_grad, row, width, begin, COLS), a * c, mask=mask)


@triton.jit(do_not_specialize_on_alignment=LENGTHS)
def perturb_kernel(
    points, gradients, column, plus, minus, rows, width, tiles, points_stride, gradients_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # plus_i = points_i + c_i gradients_i,  minus_i = points_i - c_i gradients_i, in the precision of c.
    acc = column.dtype.element_ty
    width = multiple_of(width, VECTOR)
    points_stride, gradients_stride = multiple_of(points_stride, VECTOR), multiple_of(gradients_stride, VECTOR)
    row, in_batch, begin, mask = tile_of(tl.program_id(0), rows, width, tiles, ROWS, COLS)
    x = tl.load(pointers(points, row, points_stride, begin, COLS), mask=mask, other=0.0).to(acc)
    g = tl.load(pointers(gradients, row, gradients_stride, begin, COLS), mask=mask, other=0.0).to(acc)
    c = tl.load(column + row, mask=in_batch, other=0.0)[:, None]
    tl.store(pointers(plus, row, width, begin, COLS), x + c * g, mask=mask)
    tl.store(pointers(minus, row, width, begin, COLS), x - c * g, mask=mask)


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """(R, N) rows with unit inner stride, (R, 1) alpha in the accumulation type -> new (R, N)."""
    rows, width = real.shape
    out = real.new_empty(rows, width)
    itemsize, real_stride, fake_stride = real.itemsize, real.stride()[0], fake.stride()[0]
    tiling = tile(rows, width, itemsize)
    vector = vector_of(itemsize, width | real_stride | fake_stride)
    launch(
        interpolate_kernel, tiling.programs,
        (real, fake, alpha, out),
        (rows, width, tiling.tiles, real_stride, fake_stride),
        (), (tiling.rows, tiling.cols, vector),
    )  # fmt: skip
    return out


def interpolate_adjoint(
    cotangent: Tensor, alpha: Tensor, real_needed: bool, fake_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(R, N) cotangent of the interpolation -> the gradients asked for, of real and of fake."""
    rows, width = cotangent.shape
    real_grad = cotangent.new_empty(rows, width) if real_needed else None
    fake_grad = cotangent.new_empty(rows, width) if fake_needed else None
    itemsize, stride = cotangent.itemsize, cotangent.stride()[0]
    tiling = tile(rows, width, itemsize)
    vector = vector_of(itemsize, width | stride)
    launch(
        interpolate_adjoint_kernel, tiling.programs,
        (cotangent, alpha, real_grad, fake_grad), (rows, width, tiling.tiles, stride),
        (), (tiling.rows, tiling.cols, vector),
    )  # fmt: skip
    return real_grad, fake_grad


def perturb(points: Tensor, gradients: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """(R, N) rows and gradients, (R, 1) column in the accumulation type -> points + column gradients, and minus it."""
    rows, width = points.shape
    plus, minus = points.new_empty(rows, width), points.new_empty(rows, width)
    itemsize, points_stride, gradients_stride = points.itemsize, points.stride()[0], gradients.stride()[0]
    tiling = tile(rows, width, itemsize)
    vector = vector_of(itemsize, width | points_stride | gradients_stride)
    launch(
        perturb_kernel, tiling.programs,
        (points, gradients, column, plus, minus),
        (rows, width, tiling.tiles, points_stride, gradients_stride),
        (), (tiling.rows, tiling.cols, vector),
    )  # fmt: skip
    return plus, minus
