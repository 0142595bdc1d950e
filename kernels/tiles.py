"""Launch settings: how an (rows, width) problem is cut into programs.

A small fixed table instead of an autotuner: a setting that changed from run to run would change the order of
summation, and with it the last bits of every penalty.
"""

from typing import NamedTuple

# Four warps, each thread with four 16-byte loads in flight: 128 threads x 64 bytes.
NUM_WARPS = 4
TILE_BYTES = 8192

# Rows alone fill a large GPU (132 to 304 compute units, several programs on each) from about this many programs on.
FILL_PROGRAMS = 1024

# Below this many elements a slice is too short to pay for its partial sum. On a cycle-level model of a V100, summing
# 4 rows of 65,536 floats took 23,380 cycles with 1 program per row, 2,999 with 16 and 2,598 with 32 (this slice).
MIN_SLICE = 2048

# The last program to finish sums a row's partials in one tile, so their number is bounded.
MAX_SPLITS = 1024


class Tiling(NamedTuple):
    """A program covers `rows` rows; it walks its slice of each in steps of `cols` elements."""

    rows: int
    cols: int
    splits: int = 1


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. On the host `triton.cdiv` takes longer than a launch may: it is there for kernels too."""
    return -(-a // b)


def _power_of_two_up_to(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


def tile(rows: int, width: int, itemsize: int) -> Tiling:
    """For kernels that write every element: one tile per program, several short rows in one tile."""
    elements = TILE_BYTES // itemsize
    cols = min(elements, _power_of_two_from(width))
    return Tiling(min(elements // cols, _power_of_two_from(rows)), cols)


def reduction_tile(rows: int, width: int, itemsize: int) -> Tiling:
    """For row sums: rows that fit one tile share a program; a longer row is split where rows do not fill the chip."""
    tiling = tile(rows, width, itemsize)
    if tiling.rows > 1 or rows >= FILL_PROGRAMS:
        return tiling
    splits = min(FILL_PROGRAMS // rows, width // max(MIN_SLICE, tiling.cols), MAX_SPLITS)
    return tiling._replace(splits=_power_of_two_up_to(max(splits, 1)))
