"""The correctness check: value and gradients against the fp64 reference. Only what passes is timed."""

import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases.case import Case, Step, relative_error, seeded
from benchmarks.names import is_ours
from benchmarks.peers import Absent, Implementation

Row = dict[str, Any]


class Wrong(Exception):
    """An implementation that does not compute the formula."""


def first_line(failure: Exception) -> str:
    """Of its message."""
    return f"{type(failure).__name__}: {(str(failure).strip() or 'no message').splitlines()[0]}"


def error(results: list[Tensor], reference: list[Tensor]) -> float:
    """The larger of the value's and the gradients' relative errors; NaN, where there is one."""
    parts = [(results[:1], reference[:1]), (results[1:], reference[1:])]
    return float(np.max([relative_error(some, right) for some, right in parts if right]))


class CorrectnessCheck:
    """Of the implementations of one case, all from the same inputs and the same seed."""

    def __init__(self, case: Case, inputs: Any, device: str, keep_going: bool = False) -> None:
        self.case, self.inputs, self.device, self.keep_going = case, inputs, device, keep_going
        self.implementations: dict[str, Implementation] = {}  # those that were entered
        self.reference = case.reference(inputs)

    def enter(self, name: str, make: Callable[[], Implementation]) -> tuple[Step | None, Row]:
        """What is to be timed, and a row with the error and the seconds of the first call; of a peer that is wrong or
        cannot run, no step and the reason. If ours is wrong, that is raised, unless the run is to keep going.
        """
        row: Row = self.case.about | {"implementation": name}
        try:
            self.implementations[name] = implementation = make()
            entry = self.case.enter(implementation, self.inputs)
            start = time.perf_counter()
            # TF32 rounds to 10 bits, which turns the slope of a LeakyReLU here and there: with it, the weights'
            # gradients of a DCGAN are off by a hundredth, whoever computes them. Timed are torch's own settings.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                results = seeded(entry.check)
            timing.synchronize(self.device)
            row["first_call_s"] = time.perf_counter() - start
            if self.reference is not None:
                row["error"] = error(results, self.reference)
                allowed = self.case.tolerance(self.device, implementation)
                if not row["error"] <= allowed:  # NaN is not
                    raise Wrong(f"relative error {row['error']:.1e}, more than {allowed:.0e}")
            row |= self.case.extra_columns(implementation, self.inputs, results, self.reference)
        except Absent as absent:
            return None, row | {"absent": str(absent)}
        except Exception as failure:
            if is_ours(name) and not self.keep_going:
                raise
            if self.keep_going:
                traceback.print_exc()  # there may be no other occasion to see it
            return None, row | {"failed": first_line(failure)}
        return entry.step, row
