"""Interpolation between rows, its adjoint, and steps from rows to both sides: one launch, each element moved once."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tiles import cdiv, tile


@triton.jit
def interpolate_kernel(
    real, fake, alpha, out, rows, width, tiles, real_stride, fake_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    # out_i = alpha_i fake_i + (1 - alpha_i) real_i, in the precision of alpha. Exact at alpha = 0 and alpha = 1.
    acc = alpha.dtype.element_ty
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = (tl.program_id(0) % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < width)[None, :]

    a = tl.load(alpha + row, mask=row < rows, other=0.0)[:, None]
    x = tl.load(real + row[:, None] * real_stride + col[None, :], mask=mask, other=0.0).to(acc)
    y = tl.load(fake + row[:, None] * fake_stride + col[None, :], mask=mask, other=0.0).to(acc)
    tl.store(out + row[:, None] * width + col[None, :], a * y + (1.0 - a) * x, mask=mask)


@triton.jit
def interpolate_adjoint_kernel(
    cotangent, alpha, real_grad, fake_grad, rows, width, tiles, stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    # real_grad_i = (1 - alpha_i) cotangent_i,  fake_grad_i = alpha_i cotangent_i; a grad that is None is not written.
    acc = alpha.dtype.element_ty
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = (tl.program_id(0) % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < width)[None, :]

    a = tl.load(alpha + row, mask=row < rows, other=0.0)[:, None]
    c = tl.load(cotangent + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(acc)
    out = row[:, None] * width + col[None, :]
    if real_grad is not None:
        tl.store(real_grad + out, (1.0 - a) * c, mask=mask)
    if fake_grad is not None:
        tl.store(fake_grad + out, a * c, mask=mask)


@triton.jit
def perturb_kernel(
    points, gradients, column, plus, minus, rows, width, tiles, points_stride, gradients_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # plus_i = points_i + c_i gradients_i,  minus_i = points_i - c_i gradients_i, in the precision of c.
    acc = column.dtype.element_ty
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = (tl.program_id(0) % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < width)[None, :]

    c = tl.load(column + row, mask=row < rows, other=0.0)[:, None]
    x = tl.load(points + row[:, None] * points_stride + col[None, :], mask=mask, other=0.0).to(acc)
    g = tl.load(gradients + row[:, None] * gradients_stride + col[None, :], mask=mask, other=0.0).to(acc)
    out = row[:, None] * width + col[None, :]
    tl.store(plus + out, x + c * g, mask=mask)
    tl.store(minus + out, x - c * g, mask=mask)


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """(R, N) rows with unit inner stride, (R, 1) alpha in the accumulation type -> new (R, N)."""
    rows, width = real.shape
    out = real.new_empty(rows, width)
    tiling = tile(rows, width, real.element_size())
    tiles = cdiv(width, tiling.cols)
    launch(
        interpolate_kernel, cdiv(rows, tiling.rows) * tiles, out,
        real, fake, alpha, out, rows, width, tiles, real.stride(0), fake.stride(0), ROWS=tiling.rows, COLS=tiling.cols,
    )  # fmt: skip
    return out


def interpolate_adjoint(
    cotangent: Tensor, alpha: Tensor, real_needed: bool, fake_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(R, N) cotangent of the interpolation -> the gradients asked for, of real and of fake."""
    rows, width = cotangent.shape
    real_grad = cotangent.new_empty(rows, width) if real_needed else None
    fake_grad = cotangent.new_empty(rows, width) if fake_needed else None
    tiling = tile(rows, width, cotangent.element_size())
    tiles = cdiv(width, tiling.cols)
    launch(
        interpolate_adjoint_kernel, cdiv(rows, tiling.rows) * tiles, cotangent,
        cotangent, alpha, real_grad, fake_grad, rows, width, tiles, cotangent.stride(0),
        ROWS=tiling.rows, COLS=tiling.cols,
    )  # fmt: skip
    return real_grad, fake_grad


def perturb(points: Tensor, gradients: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """(R, N) rows and gradients, (R, 1) column in the accumulation type -> points + column gradients, and minus it."""
    rows, width = points.shape
    plus, minus = points.new_empty(rows, width), points.new_empty(rows, width)
    tiling = tile(rows, width, points.element_size())
    tiles = cdiv(width, tiling.cols)
    launch(
        perturb_kernel, cdiv(rows, tiling.rows) * tiles, points,
        points, gradients, column, plus, minus, rows, width, tiles, points.stride(0), gradients.stride(0),
        ROWS=tiling.rows, COLS=tiling.cols,
    )  # fmt: skip
    return plus, minus
