"""A null device records launches, ends with its context, and needs compiled kernels."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget

from fused_gp.kernels.null_device import null_device

pytestmark = pytest.mark.xdist_group("null_device")  # the worker runs once


def test_tensors_of_a_real_device_are_recorded_too(recorded):
    assert recorded["real_device_tensors"] == 2


def test_drivers_are_restored(recorded):
    assert recorded["active_drivers"] == [[0, 1, True, True], True]


def test_interpreted_kernels_are_refused():
    with (
        pytest.raises(RuntimeError, match=r"compiled kernels.*TRITON_INTERPRET=1"),
        null_device(GPUTarget("cuda", 90, 32)),
    ):
        pass
