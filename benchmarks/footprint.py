"""Peak memory of one step of a contestant, in a process of its own.

python -m benchmarks.footprint DEVICE KEY CONTESTANT
"""

import os
import subprocess
import sys

from benchmarks import memory, timing
from benchmarks.case import Case
from benchmarks.cases import cases
from benchmarks.measure import seeded


def peak_mb(case: Case, contestant: str, device: str) -> float:
    """Above what the process held before, the inputs and the critic; what the step returns counts."""
    words = [sys.executable, "-m", "benchmarks.footprint", device, case.key, contestant]
    done = subprocess.run(words, env=os.environ | memory.ENVIRONMENT, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def main(device: str, key: str, contestant: str) -> None:
    (case,) = (case for case in cases(device) if case.key == key)
    inputs = case.inputs(device)
    yardsticks = case.yardsticks(inputs)
    if contestant in yardsticks:
        step = yardsticks[contestant]
    else:
        step = case.enter(case.contestants()[contestant](), inputs).step
    for _ in range(2):
        seeded(step)
    timing.synchronize(device)
    print(memory.peak(step, device) / 1e6)


if __name__ == "__main__":
    main(*sys.argv[1:])
