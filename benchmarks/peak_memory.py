"""Peak memory of one step of an implementation, on a CPU.

python -m benchmarks.peak_memory KEY IMPLEMENTATION
"""

import os
import subprocess
import sys

from benchmarks import memory
from benchmarks.cases import SUITES
from benchmarks.cases.case import Case, seeded


def peak_mb(case: Case, implementation: str) -> float:
    """Above what was held before, the inputs and the critic; what the step returns counts. In a process of its own."""
    words = [sys.executable, "-m", "benchmarks.peak_memory", case.key, implementation]
    done = subprocess.run(words, env=os.environ | memory.ENVIRONMENT, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def _peak_mb(case: Case, implementation: str) -> float:
    with case.prepared("cpu") as inputs:
        baselines = case.baselines(inputs)
        if implementation in baselines:
            step = baselines[implementation]
        else:
            step = case.enter(case.implementations()[implementation](), inputs).step
        for _ in range(2):
            seeded(step)
        return memory.peak(step, "cpu") / 1e6


def main(key: str, implementation: str) -> None:
    (case,) = (case for suite in SUITES.values() for case in suite.cases("cpu") if case.key == key)
    print(_peak_mb(case, implementation))


if __name__ == "__main__":
    main(*sys.argv[1:])
