"""Launch settings: how an (rows, width) problem is divided into programs.

Fixed rules instead of an autotuner: a setting that changed from run to run would change the order of summation, and
with it the last bits of every penalty.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

# A program is four warps, and a tile 8192 bytes of each tensor: 128 threads x 4 loads x 16 bytes. (Four wavefronts of
# 64 are 256 threads, of 2 loads each.)
#
# To use its whole bandwidth, a device needs bandwidth x latency bytes in flight (Little's law). With the makers'
# bandwidths, and a latency of 0.8 us under load (1 us on the MI300X):
#
#                bandwidth    processors    bytes in flight    per processor
#   A100 80 GB    2.0 TB/s       108            1.6 MB             15 KB
#   H100          3.35 TB/s      132            2.7 MB             20 KB
#   B200          8.0 TB/s       148            6.4 MB             43 KB
#   MI300X        5.3 TB/s       304            5.3 MB             17 KB
#
# A processor holds 5 to 16 programs at once, fewer where threads need more registers for their 32 to 128 bytes each: 48
# KB and more in flight on all four. `python -m fused_gp inspect` prints it for each kernel, and
# tests/kernels/test_compile_only.py compares it with this table.
NUM_WARPS = 4
TILE_BYTES = 8192

# In a reduction, 2048 programs with a tile each are 16.8 MB in flight: enough for all of them even where rows and
# splits give half as many. With more programs, and so more partial sums, the last one would have more to add up alone:
# 2048 are one tile, 16 a thread. On a cycle-level model of a V100, summing 4 rows of 65,536 floats took 23,380 cycles
# with 1 program per row, 2,999 with 16 and 2,598 with 32, each one tile long.
PROGRAMS = 2048


class Tiling(NamedTuple):
    """How many programs there are, and their tiles of `rows` x `cols` elements."""

    programs: int
    tiles: int  # along a row
    rows: int
    cols: int
    splits: int = 1  # in a reduction: the programs that share the tiles of a row
    blocks: int = 1  # in a reduction: the tiles of different rows that one program loops over

    @property
    def slots(self) -> int:
        """Of a row's partial sums in memory: a power of two, so that they are loaded at once."""
        return power_of_two_from(self.splits)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. On the host `triton.cdiv`, which serves kernels too, takes longer than a launch."""
    return -(-a // b)


def power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


# Training needs the same few tilings at every step, and computing one takes as long as allocating a tensor.
@lru_cache(maxsize=1024)
def tile(rows: int, width: int, itemsize: int) -> Tiling:
    """For kernels that write every element: one tile per program, several short rows in one tile."""
    elements = TILE_BYTES // itemsize
    cols = min(elements, power_of_two_from(width))
    tile_rows = min(elements // cols, power_of_two_from(rows))
    tiles = cdiv(width, cols)
    return Tiling(cdiv(rows, tile_rows) * tiles, tiles, tile_rows, cols)


@lru_cache(maxsize=1024)
def reduction_tile(rows: int, width: int, itemsize: int) -> Tiling:
    """For row sums: at most `PROGRAMS` programs, and as many as that where there are tiles for them."""
    tiling = tile(rows, width, itemsize)
    groups = cdiv(rows, tiling.rows)
    if groups >= PROGRAMS or tiling.rows > 1:
        blocks = cdiv(groups, PROGRAMS)
        return tiling._replace(programs=cdiv(groups, blocks), blocks=blocks)
    splits = min(PROGRAMS // rows, tiling.tiles)
    return tiling._replace(programs=rows * splits, splits=splits)


# Arguments that Triton does not specialise kernels on as multiples of 16: VECTOR tells what they are multiples of.
LENGTHS = ["width", "tiles", "splits", "blocks", "stride", "real_stride", "fake_stride", "points_stride",
           "gradients_stride", "cotangents_stride", "upstream_stride"]  # fmt: skip


def vector_of(itemsize: int, lengths: int) -> int:
    """The kernels' VECTOR: the largest number of elements, up to 16 bytes, that divides every length.

    The lengths, of a row and from row to row, are combined by bitwise or. Kernels load VECTOR elements at once where
    the tensor is aligned to 16 bytes. Triton itself checks only whether 16 divides a length: rows of 100 fp32 would be
    loaded one element at a time.
    """
    bits = lengths * itemsize | 16
    return (bits & -bits) // itemsize


@triton.jit
def multiple_of(length, VECTOR: tl.constexpr):
    # Rounded up to a multiple of VECTOR, which is 1, 2, 4 or 8. It is one already; this shows it to the compiler.
    SHIFT: tl.constexpr = VECTOR // 2 - VECTOR // 8
    return (length + (VECTOR - 1)) >> SHIFT << SHIFT


@triton.jit
def tile_of(program, rows, width, tiles, ROWS: tl.constexpr, COLS: tl.constexpr):
    # A program's tile: its rows, which of them exist, its first column, and which elements exist.
    # In tensors past 2^31 elements each of these products may be too; inside a tile 32 bits are enough.
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = (program % tiles).to(tl.int64) * COLS
    return row, row < rows, begin, mask_of(row < rows, begin, width, COLS)


@triton.jit
def mask_of(in_batch, begin, width, COLS: tl.constexpr):
    left = tl.minimum(width - begin, COLS).to(tl.int32)
    return in_batch[:, None] & (tl.arange(0, COLS) < left)[None, :]


@triton.jit
def pointers(tensor, row, stride, begin, COLS: tl.constexpr):
    # Pointers to a tile: one 64-bit address per row, plus the columns.
    return (tensor + row * stride + begin)[:, None] + tl.arange(0, COLS)[None, :]
