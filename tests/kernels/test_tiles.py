"""Tiles of a reduction: as few programs as possible, and none without a tile of its own."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_reductions_run_in_few_programs_and_each_has_work(itemsize):
    """The last program sums one partial of each in one tile; a program without a tile of its own would do nothing."""
    from fused_gp.kernels.tiles import PROGRAMS, reduction_tile

    for rows, width in (
        (1, 1), (1, 10**8), (4, 65536), (64, 12288), (64, 196608), (1023, 5000), (2047, 10**5), (2048, 10**5),
        (10**5, 1), (10**5, 784), (10**5, 3072), (2**31 + 7, 3),
    ):  # fmt: skip
        tiling = reduction_tile(rows, width, itemsize)
        covered = tiling.rows * tiling.blocks
        assert tiling.splits == 1 or covered == 1
        assert tiling.programs == -(-rows // covered) * tiling.splits <= PROGRAMS
        assert tiling.tiles == -(-width // tiling.cols)
        # Few enough, and no fewer.
        assert 2 * tiling.programs >= min(PROGRAMS, -(-rows // tiling.rows) * tiling.tiles)
        assert (tiling.splits - 1) * tiling.cols < width
