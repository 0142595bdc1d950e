"""Measure a case: first that all give the right numbers, then their times."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import intervals, timing
from benchmarks.case import Case, Step
from benchmarks.ours import COMPILED, OURS, truth
from benchmarks.peers import Absent, Peer

SEED = 1
# Of values and gradients, relative to fp64 from the same rounded inputs, in the Euclidean norm. Peers round every
# intermediate result of a half type; and on a GPU torch's default for convolutions in fp32 is TF32, of 10 bits.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
TF32_TOLERANCE = 1e-2
Row = dict[str, Any]


class Wrong(Exception):
    """A contestant whose numbers are not those of the formula."""


def about(case: Case) -> Row:
    """What tells the rows of one case from those of the others."""
    return {
        "group": case.group, "case": case.name, "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
    }  # fmt: skip


def seeded(step: Step) -> list[Tensor]:
    torch.manual_seed(SEED)
    return step()


def error(results: list[Tensor], wanted: list[Tensor]) -> float:
    """The larger of the value's and the gradients' relative errors."""
    errors = []
    for some, right in ((results[:1], wanted[:1]), (results[1:], wanted[1:])):
        if right:
            a, b = (torch.cat([t.detach().double().flatten() for t in part]) for part in (some, right))
            errors.append(((a - b).norm() / b.norm()).item())
    return float(np.max(errors))  # NaN, where there is one


def tolerance(case: Case, device: str) -> float:
    if device != "cpu" and case.dtype == torch.float32 and case.group != "op":
        return TF32_TOLERANCE
    return TOLERANCE[case.dtype]


class Gate:
    """Lets a contestant pass whose numbers are right."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device, self.inputs = case, device, case.inputs(device)
        self.wanted = seeded(case.enter(truth(), case.exact(self.inputs)).check)
        self.about = about(case)

    def enter(self, name: str, make: Callable[[], Peer]) -> tuple[Step | None, Row]:
        """What is to be timed, and a row with the error and the seconds of the first call; of a peer that is wrong or
        cannot run, no step and the reason. Ours may fail nothing.
        """
        row: Row = self.about | {"contestant": name}
        try:
            entry = self.case.enter(make(), self.inputs)
            start = time.perf_counter()
            results = seeded(entry.check)
            timing.synchronize(self.device)
            row["first_call_s"] = time.perf_counter() - start
            row["error"] = error(results, self.wanted)
            allowed = tolerance(self.case, self.device)
            if not row["error"] <= allowed:  # NaN is not
                raise Wrong(f"relative error {row['error']:.1e}, more than {allowed:.0e}")
        except Absent as absent:
            return None, row | {"absent": str(absent)}
        except Exception as failure:
            if name.startswith(OURS):
                raise
            return None, row | {"failed": f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}"}
        return entry.step, row


def measure(case: Case, device: str, budget: float, rounds: int | None, copy_gb_s: float) -> list[Row]:
    torch._dynamo.reset()  # no case's graphs count against another's
    gate = Gate(case, device)
    entered = {name: gate.enter(name, make) for name, make in case.contestants().items()}
    steps = {name: step for name, (step, _) in entered.items() if step}
    rows = [row for _, row in entered.values()]
    yardsticks = case.yardsticks(gate.inputs)
    rows += [gate.about | {"contestant": name} for name in yardsticks]
    steps |= yardsticks
    number, turns = timing.interleaved(steps, device, budget, rounds)
    for row in rows:
        name = row["contestant"]
        if name not in turns:
            continue
        row |= {"rounds": len(turns[name]), "steps": number[name], "ms": _ms(turns[name], "wall")}
        if device != "cpu":
            row |= {"host_ms": _ms(turns[name], "host"), "device_ms": _ms(turns[name], "device")}
            row["launches"] = launches(steps[name])
        for rival in (OURS, COMPILED):
            if rival in turns and rival != name:
                row[f"over {rival}"] = _ratio(turns[name], turns[rival], "wall")
                if device != "cpu":
                    row[f"device, over {rival}"] = _ratio(turns[name], turns[rival], "device")
        moved = case.moved()
        if moved is not None:
            busy = row["ms" if device == "cpu" else "device_ms"][0]
            row |= {"bytes": moved, "gb_s": 1e-6 * moved / busy, "copy_gb_s": copy_gb_s}
    return rows


def launches(step: Callable[[], object]) -> int:
    """Kernels, copies and fills on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def _ms(turns: list[timing.Turn], what: str) -> list[float]:
    """Median, and its interval."""
    return [1e3 * seconds for seconds in intervals.median([getattr(turn, what) for turn in turns])]


def _ratio(theirs: list[timing.Turn], ours: list[timing.Turn], what: str) -> list[float]:
    """Theirs / ours, taken round by round: median, and its interval. Above 1 ours is faster."""
    return list(intervals.median([getattr(a, what) / getattr(b, what) for a, b in zip(theirs, ours, strict=True)]))


def warm_compiler() -> None:
    """What the compiler does once in a process is not the first contestant's."""
    x = torch.ones(8, requires_grad=True)
    torch.compile(lambda x: x.sin().sum())(x).backward()
