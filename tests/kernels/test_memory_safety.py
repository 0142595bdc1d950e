"""No kernel accesses memory outside of its tensors, at every threshold of the launch settings."""

import signal
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

pytest.importorskip("triton", reason="Triton is not installed")


def run(case):
    command = [sys.executable, "-m", "tests.support.kernels.guarded_kernels", case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1], done.stderr[-3000:]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_no_access_outside_of_tensors(dtype):
    """A read outside faults, or gives NaN; a write outside faults too, or changes the bytes around the tensor."""
    code, last, error = run(dtype)
    assert code == 0, f"{signal.strsignal(-code) if code < 0 else error} in {last}"
    assert last.endswith("shapes")


def test_a_missing_mask_is_detected():
    code, last, _ = run("lost-mask")
    assert code == -signal.SIGSEGV
    assert last == "lost-mask"
