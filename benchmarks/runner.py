"""The one runner: check, time and measure cases, and write the rows as they come."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import cold, intervals, launches, memory, peak_memory, progress, provenance, results, timing
from benchmarks.cases.bytes_moved import copy_bandwidth
from benchmarks.cases.case import Case, Step
from benchmarks.correctness import CorrectnessCheck, first_line
from benchmarks.names import TWO_OPS
from benchmarks.timing import Timing

Row = dict[str, Any]


def run(cases: list[Case], device: str, budget: float, rounds: int | None, unfinished: Path) -> list[Row]:
    """The rows; those that are measured are in the file `unfinished` if the run breaks off.

    `budget` is the part of each case's budget that is used.
    """
    about = provenance.provenance(device)
    rows: list[Row] = []
    if any("compiled" in name for case in cases for name in case.implementations()):
        _warm_compiler()
    copy_gb_s = copy_bandwidth(device) if any(case.bytes_moved() for case in cases) else None
    for case in progress.track([(case.key, case) for case in cases]):
        rows += [row | about for row in measure(case, device, budget * case.budget, rounds, copy_gb_s)]
        results.save(unfinished, rows)
    for _ in add_peaks(rows, cases, device):
        results.save(unfinished, rows)
    return rows


def measure(
    case: Case, device: str, budget: float, rounds: int | None, copy_gb_s: float | None,
    least: int = timing.ROUNDS[0], keep_going: bool = False,
) -> list[Row]:  # fmt: skip
    """Of one case; with `keep_going` what fails is a row that says so, ours too."""
    if not case.timed:
        machine = {"machine": provenance.machine(device)}
        return [case.about | {"implementation": name} | machine for name in case.implementations()]
    torch._dynamo.reset()  # no case's graphs count against another's
    with case.prepared(device) as inputs:
        check = CorrectnessCheck(case, inputs, device, keep_going)
        entered = {name: check.enter(name, make) for name, make in case.implementations().items()}
        steps = {name: step for name, (step, _) in entered.items() if step}
        rows = [row for _, row in entered.values()]
        baselines = case.baselines(inputs)
        rows += [case.about | {"implementation": name} for name in baselines]
        steps |= baselines
        copies = case.copies(inputs, device)
        replays, uncaptured = _replays(case, copies, check, steps, device)
        for row in rows:
            if row["implementation"] in uncaptured:
                row["failed"] = uncaptured[row["implementation"]]
                del steps[row["implementation"]]
        number, timings = timing.interleaved(steps, device, budget, rounds, case.clock, replays, least)
        clocks = {} if device == "cpu" else {"clocks": provenance.recent_clocks(device)}
        beside = _beside_times(steps, device) if device != "cpu" else {}
        for row in rows:
            row["machine"] = provenance.machine(device)
            name = row["implementation"]
            if name in timings:
                row |= {
                    "rounds": len(timings[name]),
                    "steps": number[name],
                    **_times(name, timings, case, device, name in replays),
                }
                if device != "cpu":
                    row |= clocks | beside[name]
                moved = case.bytes_moved()
                if moved is not None:
                    busy = row["ms" if device == "cpu" else "device_ms"][0]
                    row |= {"bytes": moved, "gb_s": 1e-6 * moved / busy, "copy_gb_s": copy_gb_s}
                    row |= {"cold": case.is_cold(inputs, device)} if copies else {}
    return rows


WAITS = 1.2  # times as long as the whole is the host's part of a step that waits for the device


def _waits(found: list[Timing]) -> bool:
    return intervals.median([(timing.host or 0.0) / timing.total for timing in found]).value > WAITS


def _times(name: str, timings: dict[str, list[Timing]], case: Case, device: str, replayed: bool) -> Row:
    """Medians with their intervals: milliseconds, and the ratios to other implementations, taken round by round."""

    def ms(what: str) -> list[float]:
        return [1e3 * seconds for seconds in intervals.median([getattr(timing, what) for timing in timings[name]])]

    def ratio(base: str, what: str) -> list[float]:
        pairs = zip(timings[name], timings[base], strict=True)
        return list(intervals.median([getattr(a, what) / getattr(b, what) for a, b in pairs]))

    bases = [base for base in case.bases if base in timings and base != name]
    row: Row = {"ms": ms("total"), **{f"over {base}": ratio(base, "total") for base in bases}}
    if device == "cpu":
        return row | {"fresh_mb": 1e-6 * intervals.median([timing.fresh for timing in timings[name]]).value}
    if not replayed and _waits(timings[name]):
        return row | {"waits": True}  # in the middle of a step, for the device: neither is alone then
    row |= {"host_ms": ms("host"), "device_ms": ms("device")}
    bases = [base for base in bases if replayed or not _waits(timings[base])]
    return row | {f"device, over {base}": ratio(base, "device") for base in bases}


def _replays(
    case: Case, copies: list[Any], check: CorrectnessCheck, steps: dict[str, Step], device: str
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Of a case whose device time is taken from inputs in no cache; and what could not be captured, and why."""
    if not copies:
        return {}, {}
    baselines = [case.baselines(each) for each in copies]
    found, failed = {}, {}
    for name in steps:
        of = check.implementations.get(name)
        on_copies = [case.enter(of, each).step for each in copies] if of else [each[name] for each in baselines]
        try:
            found[name] = cold.replays(on_copies, device)
        except Exception as error:
            failed[name] = f"not captured in a CUDA graph: {first_line(error)}"
    return found, failed


def _beside_times(steps: dict[str, Step], device: str) -> dict[str, Row]:
    """Launches and peak memory. A profiler that does not work here, or a step for which there is no memory beside the
    others, costs these columns, and not the times.
    """
    found: dict[str, Row] = {name: {} for name in steps}
    try:
        for name, launched in launches.of(steps).items():
            found[name] |= launched
    except Exception as error:
        found = {name: {"not_counted": first_line(error)} for name in steps}
    for name, step in steps.items():
        try:
            found[name]["peak_mb"] = memory.peak(step, device) / 1e6
        except Exception as error:
            found[name]["no_peak"] = first_line(error)
    return found


def add_peaks(rows: list[Row], cases: list[Case], device: str) -> Iterator[Row]:
    """Peak memory on a CPU, of the cases that ask for it; yields each row that has it now. On a device torch's
    allocator tells it beside the times.

    Nothing is timed meanwhile, so two processes at once do no harm.
    """
    if device != "cpu":
        return
    jobs = [
        (case, row)
        for case in cases
        for row in rows
        if case.memory
        and case.about.items() <= row.items()
        and ("ms" in row or not case.timed)
        and row["implementation"] != TWO_OPS
    ]
    with ThreadPoolExecutor(2) as pool:
        waiting = [(row, pool.submit(peak_memory.peak_mb, case, row["implementation"])) for case, row in jobs]
        labels = (f"memory: {case.key}, {row['implementation']}" for case, row in jobs)
        for row, peak in progress.track(list(zip(labels, waiting, strict=True))):
            row["peak_mb"] = peak.result()
            yield row


def _warm_compiler() -> None:
    """What the compiler does once in a process is not part of the first implementation's first call."""
    x = torch.ones(8, requires_grad=True)
    torch.compile(lambda x: x.sin().sum())(x).backward()
