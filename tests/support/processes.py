"""Programs run in processes of their own, from the root of the checkout, where the kernels are not interpreted."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_compiled(*command, cwd=ROOT):
    """The finished process, with its output as text. Its environment lacks TRITON_INTERPRET, which conftest.py sets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=cwd)


def python_compiled(*arguments):
    """What Python prints when it is run with these arguments; it must succeed."""
    done = run_compiled(sys.executable, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout
