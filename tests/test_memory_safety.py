"""Every kernel at every threshold, where a read or a write outside of a tensor does not go unnoticed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def run(case):
    script = Path(__file__).with_name("guarded_kernels.py")
    done = subprocess.run([sys.executable, script, case], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1], done.stderr[-3000:]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_nothing_outside_is_touched(dtype):
    """Reads outside end in a closed page, or give NaN; writes outside end there too, or are seen in the borders."""
    code, last, error = run(dtype)
    assert code == 0, f"{signal.strsignal(-code) if code < 0 else error} in {last}"
    assert last.endswith("shapes")


def test_a_lost_mask_is_noticed():
    code, last, _ = run("lost-mask")
    assert code == -signal.SIGSEGV
    assert last == "lost-mask"
