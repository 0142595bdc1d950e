"""How many kernels each op launches, and whether the ones launched directly are those that Triton would launch."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from triton.backends.compiler import GPUTarget

from fused_gp.kernels.null_device import null_device


@cache
def answers():
    """Of null_device_worker.py, where the kernels are compiled; in this process they are interpreted."""
    script = Path(__file__).with_name("null_device_worker.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


pytestmark = pytest.mark.xdist_group("null_device")  # the answers are worked out once


@pytest.mark.parametrize("tensors", [1, 2])
def test_launches_of_interpolation(tensors):
    steps = answers()["ops"][f"interpolate, {tensors}"]
    assert steps["forward"] == ["interpolate"] * tensors
    assert steps["backward"] == ["interpolate_adjoint"] * tensors
    assert steps["double"] == ["interpolate"] * tensors


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("form", [{}, {"one_sided": True, "reduction": "none"}, {"squared": True}], ids=str)
def test_launches_of_the_penalty_op(form, tensors):
    steps = answers()["ops"][f"penalty {form}, {tensors}"]
    assert steps["forward"] == ["reduce_rows"] * tensors
    assert steps["backward"] == steps["backward alone"] == ["scale_rows"] * tensors
    assert steps["double"] == ["reduce_rows"] * tensors + ["scale_rows"] * tensors


def test_launches_of_the_whole_penalty():
    """To the critic's weights; to a generator's; differentiated once more; without interpolation; of two inputs."""
    whole = answers()["penalties"]
    forward, double = ["interpolate", "reduce_rows"], ["reduce_rows", "scale_rows"]
    assert whole["penalty"] == {"forward": forward, "backward": ["scale_rows"]}
    assert whole["attached"] == {"forward": forward, "backward": ["scale_rows", "interpolate_adjoint"]}
    assert whole["twice"] == {"forward": forward, "backward": ["scale_rows"], "double": double}
    assert whole["r1"] == {"forward": ["reduce_rows"], "backward": ["scale_rows"]}
    assert whole["two inputs"] == {
        "forward": ["interpolate"] * 2 + ["reduce_rows"] * 2,
        "backward": ["scale_rows"] * 2,
    }


def test_a_lone_program_meets_nobody():
    """[programs, slots for partial sums, whether they count themselves]; nor do programs with nothing to add up."""
    assert answers()["lone"] == {
        "(2, 4), mean": [1, None, False],
        "(2, 4), none": [1, None, False],
        "(64, 2), mean": [1, None, False],
        "(64, 2), none": [1, None, False],
        "(3, 1500), mean": [3, 3, True],
        "(3, 1500), none": [3, None, False],
        "(1, 9000), mean": [5, 8, True],
        "(1, 9000), none": [5, 8, True],
    }


direct = pytest.mark.skipif(
    version("triton").split(".")[:2] not in (["3", "6"], ["3", "7"], ["3", "8"]),
    reason="in this release kernels are launched by Triton alone",
)


@direct
def test_kernel_is_tritons_choice():
    """Launched directly, on the same grid and arguments, is the kernel that Triton chooses, and chooses for itself."""
    known = answers()["fast"]
    for name, launch in known.items():
        assert launch["runs"] == 0, f"{name}: not launched directly"
        assert launch["kernel"], f"{name}: another kernel than Triton's"
        assert launch["call"], f"{name}: called otherwise than by Triton"
    twins = {"another aligned": "plain", "width of 16": "plain", "width of 32": "plain", "last 32-bit stride": "plain",
             "aligned 64-bit stride": "64-bit stride", "the same tile": "plain"}  # fmt: skip
    assert {name: launch["shared"] for name, launch in known.items()} == {name: twins.get(name, name) for name in known}


def test_few_kernels_serve_all_widths_and_addresses():
    """In vectors of 4, 2 and 1 elements; and one for tensors that begin at no multiple of 16 bytes."""
    assert answers()["variants"] == [3, 4]


@direct
def test_not_every_shape_is_kept():
    kept, by_triton = answers()["many"]
    assert 0 < kept <= 5
    assert by_triton == 0


def test_each_device_has_kernels_of_its_own():
    assert answers()["devices"] == {"second": True, "again": True, "arch": [90, 90, 80, 90], "other": True}


def test_tensors_of_a_real_device_are_recorded_too():
    assert answers()["elsewhere"] == 2


def test_launches_go_to_the_tensors_device_and_its_stream():
    assert answers()["current"] == [[1, 71], [1, 71], 0]


@direct
def test_triton_launches_where_somebody_watches():
    """Profilers and debuggers, and releases whose ways we do not know, get Triton's own launches."""
    runs = answers()["watched"]
    direct = {name for name in runs if runs[name] == 0}
    assert direct == {"plain", "plain again"}
    assert all(runs[name] == 2 for name in runs.keys() - direct)


def test_drivers_are_restored():
    assert answers()["drivers"] == [[0, 1, True, True], True]


def test_cpu_tensors_are_refused_elsewhere():
    assert "cannot run on cpu tensors" in answers()["refusal"]


def test_interpreted_kernels_are_refused():
    with (
        pytest.raises(RuntimeError, match=r"compiled kernels.*TRITON_INTERPRET=1"),
        null_device(GPUTarget("cuda", 90, 32)),
    ):
        pass
