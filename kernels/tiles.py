"""Launch settings: how an (rows, width) problem is cut into programs.

A small fixed table instead of an autotuner: a setting that changed from run to run would change the order of
summation, and with it the last bits of every penalty.
"""

from typing import NamedTuple

import triton
import triton.language as tl

NUM_WARPS = 4
TILE_BYTES = 8192
PROGRAMS = 2048


class Tiling(NamedTuple):
    """Tiles of `rows` x `cols`. In a reduction `splits` programs share the tiles of a row, or one walks `blocks` tiles
    of different rows, one after the other.
    """

    rows: int
    cols: int
    splits: int = 1
    blocks: int = 1


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. On the host `triton.cdiv` takes longer than a launch may: it is there for kernels too."""
    return -(-a // b)


def power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


def tile(rows: int, width: int, itemsize: int) -> Tiling:
    """For kernels that write every element: one tile per program, several short rows in one tile."""
    elements = TILE_BYTES // itemsize
    cols = min(elements, power_of_two_from(width))
    return Tiling(min(elements // cols, power_of_two_from(rows)), cols)


def reduction_tile(rows: int, width: int, itemsize: int) -> Tiling:
    """For row sums: at most `PROGRAMS` programs, and as many as that where there are tiles for them."""
    tiling = tile(rows, width, itemsize)
    groups = cdiv(rows, tiling.rows)
    if groups >= PROGRAMS or tiling.rows > 1:
        return tiling._replace(blocks=cdiv(groups, PROGRAMS))
    return tiling._replace(splits=min(PROGRAMS // rows, cdiv(width, tiling.cols)))


@triton.jit
def tile_of(program, rows, width, tiles, ROWS: tl.constexpr, COLS: tl.constexpr):
    # A program's tile: its rows, which of them exist, the column at which it begins, and which elements exist.
    # Where tensors pass 2^31 elements, so may each of these products; inside a tile 32 bits do.
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = (program % tiles).to(tl.int64) * COLS
    return row, row < rows, begin, mask_of(row < rows, begin, width, COLS)


@triton.jit
def mask_of(in_batch, begin, width, COLS: tl.constexpr):
    left = tl.minimum(width - begin, COLS).to(tl.int32)
    return in_batch[:, None] & (tl.arange(0, COLS) < left)[None, :]


@triton.jit
def pointers(tensor, row, stride, begin, COLS: tl.constexpr):
    # Pointers to a tile: one 64-bit address for each row, to which the columns are added.
    return (tensor + row * stride + begin)[:, None] + tl.arange(0, COLS)[None, :]
