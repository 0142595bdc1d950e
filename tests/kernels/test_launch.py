"""How many kernels each op launches, and whether a direct launch does what a launch through Triton does."""

from importlib.metadata import version

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


pytestmark = pytest.mark.xdist_group("null_device")  # the worker runs once


@pytest.mark.parametrize("tensors", [1, 2])
def test_interpolation_launches_one_kernel_per_tensor(recorded, tensors):
    steps = recorded["launches_of_ops"][f"interpolate, {tensors}"]
    assert steps["forward"] == ["interpolate"] * tensors
    assert steps["backward"] == ["interpolate_adjoint"] * tensors
    assert steps["double"] == ["interpolate"] * tensors


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("form", [{}, {"one_sided": True, "reduction": "none"}, {"squared": True}], ids=str)
def test_penalty_op_launches_one_or_two_kernels_per_tensor(recorded, form, tensors):
    steps = recorded["launches_of_ops"][f"penalty {form}, {tensors}"]
    assert steps["forward"] == ["reduce_rows"] * tensors
    assert steps["backward"] == steps["backward alone"] == ["scale_rows"] * tensors
    assert steps["double"] == ["reduce_rows"] * tensors + ["scale_rows"] * tensors


def test_whole_penalty_launches_no_other_kernels(recorded):
    """Gradients of the critic's weights and of a generator's; a second derivative; no interpolation; two inputs."""
    penalties = recorded["launches_of_penalties"]
    forward, double = ["interpolate", "reduce_rows"], ["reduce_rows", "scale_rows"]
    assert penalties["penalty"] == {"forward": forward, "backward": ["scale_rows"]}
    assert penalties["attached"] == {"forward": forward, "backward": ["scale_rows", "interpolate_adjoint"]}
    assert penalties["twice"] == {"forward": forward, "backward": ["scale_rows"], "double": double}
    assert penalties["r1"] == {"forward": ["reduce_rows"], "backward": ["scale_rows"]}
    assert penalties["two inputs"] == {
        "forward": ["interpolate"] * 2 + ["reduce_rows"] * 2,
        "backward": ["scale_rows"] * 2,
    }


def test_programs_without_a_common_sum_have_no_partial_sums_and_no_counter(recorded):
    """[programs, slots for partial sums, whether there is a counter]"""
    assert recorded["reduction_memory"] == {
        "(2, 4), mean": [1, None, False],
        "(2, 4), none": [1, None, False],
        "(64, 2), mean": [1, None, False],
        "(64, 2), none": [1, None, False],
        "(3, 1500), mean": [3, 3, True],
        "(3, 1500), none": [3, None, False],
        "(1, 9000), mean": [5, 8, True],
        "(1, 9000), none": [5, 8, True],
    }


needs_direct_launches = pytest.mark.skipif(
    version("triton").split(".")[:2] not in (["3", "6"], ["3", "7"], ["3", "8"]),
    reason="in this release all launches go through Triton",
)


@needs_direct_launches
def test_direct_launches_are_those_of_triton(recorded):
    """The same compiled kernel, grid and arguments."""
    launches = recorded["direct_launches"]
    for name, launch in launches.items():
        assert launch["runs"] == 0, f"{name}: not launched directly"
        assert launch["kernel"], f"{name}: not the kernel that Triton launches"
        assert launch["call"], f"{name}: not the grid and arguments of Triton's launch"
    twins = {"another aligned": "plain", "width of 16": "plain", "width of 32": "plain", "last 32-bit stride": "plain",
             "aligned 64-bit stride": "64-bit stride", "the same tile": "plain"}  # fmt: skip
    assert {name: launch["shared"] for name, launch in launches.items()} == {
        name: twins.get(name, name) for name in launches
    }


def test_few_kernels_serve_all_widths_and_addresses(recorded):
    """One for each vector width, 4, 2 and 1 elements; and one for tensors not aligned to 16 bytes."""
    assert recorded["kernel_variants"] == [3, 4]


@needs_direct_launches
def test_the_number_of_kept_entries_is_bounded(recorded):
    entries, by_triton = recorded["compiled_entries"]
    assert 0 < entries <= 5
    assert by_triton == 0


def test_each_device_has_kernels_of_its_own(recorded):
    assert recorded["devices"] == {"second": True, "again": True, "arch": [90, 90, 80, 90], "other": True}


def test_launches_go_to_the_device_of_the_tensors_and_its_stream(recorded):
    assert recorded["current_device_and_stream"] == [[1, 71], [1, 71], 0]


@needs_direct_launches
def test_launches_go_through_triton_with_hooks_or_an_unknown_release(recorded):
    """Profilers and debuggers hook into Triton's own launches; unknown releases may launch differently."""
    runs = recorded["hooked_launches"]
    launched_directly = {name for name in runs if runs[name] == 0}
    assert launched_directly == {"plain", "plain again"}
    assert all(runs[name] == 2 for name in runs.keys() - launched_directly)


def test_cpu_tensors_are_refused_without_a_null_device(recorded):
    assert "cannot run on cpu tensors" in recorded["cpu_error"]
