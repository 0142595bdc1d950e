"""Peak memory of one step of a contestant.

python -m benchmarks.footprint KEY CONTESTANT
"""

import os
import subprocess
import sys

from benchmarks import memory, timing
from benchmarks.case import Case
from benchmarks.cases import cases
from benchmarks.measure import seeded


def peak_mb(case: Case, contestant: str, device: str) -> float:
    """Above what was held before, the inputs and the critic; what the step returns counts.

    On a device torch's allocator knows; on a CPU that takes a process of its own.
    """
    if device != "cpu":
        return _peak_mb(case, contestant, device)
    words = [sys.executable, "-m", "benchmarks.footprint", case.key, contestant]
    done = subprocess.run(words, env=os.environ | memory.ENVIRONMENT, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def _peak_mb(case: Case, contestant: str, device: str) -> float:
    inputs = case.inputs(device)
    yardsticks = case.yardsticks(inputs)
    if contestant in yardsticks:
        step = yardsticks[contestant]
    else:
        step = case.enter(case.contestants()[contestant](), inputs).step
    for _ in range(2):
        seeded(step)
    timing.synchronize(device)
    return memory.peak(step, device) / 1e6


def main(key: str, contestant: str) -> None:
    (case,) = (case for case in cases("cpu") if case.key == key)
    print(_peak_mb(case, contestant, "cpu"))


if __name__ == "__main__":
    main(*sys.argv[1:])
