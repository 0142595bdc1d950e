"""Every kernel compiles for every GPU we name, with no GPU here, and comes out as it was meant."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SM = [75, 80, 86, 89, 90, 100, 120]
KERNELS = {"interpolate_kernel", "interpolate_adjoint_kernel", "reduce_rows_kernel", "scale_rows_kernel"}


@cache
def compiled(*target):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, *target], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("sm", SM)
def test_nvidia(sm):
    builds = compiled("cuda", str(sm), "32")
    assert {build["kernel"] for build in builds} == KERNELS
    assert {build["dtype"] for build in builds} == {"float64", "float32", "float16", "bfloat16"}
    for build in builds:
        assert build["binary"] > 0
        assert not build["local"], f"spills or local arrays in {build}"

        # Aligned rows are read 16 bytes at a time (and written so, where rows are written): a tile is 4 loads a thread.
        wide = ("v4.b32", "v2.b64")
        if build["aligned"]:
            assert sum(load.endswith(wide) for load in build["loads"]) >= 4 * build["reads"], build
            assert build["kernel"] == "reduce_rows_kernel" or any(s.endswith(wide) for s in build["stores"]), build

        # One arrival per program: it releases this program's partial sum and acquires the others'.
        arrivals = ["atom.global.gpu.acq_rel.add.u32"] if build["counts_arrivals"] else []
        assert build["atomics"] == arrivals, build


def test_amd():
    """One target of wavefronts of 64: the same kernels build."""
    builds = compiled("hip", "gfx942", "64")
    assert {build["kernel"] for build in builds} == KERNELS
    assert all(build["binary"] > 0 for build in builds)
