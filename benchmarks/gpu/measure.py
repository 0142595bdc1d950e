"""A phase that measures: the cases of some suites, in the order of their worth, for as long as there is time.

python -m benchmarks.gpu.measure SUITE [SUITE ...] --device cuda --out FILE --until 1795824000

A case that fails is a row that says so, and the next one goes on. What ends the process is not tried again when it is
started anew with the same file: that goes on after it, as after an error that leaves the device unusable.
"""

import argparse
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkout, intervals, provenance, results, runner, timing
from benchmarks.cases import SUITES
from benchmarks.cases.bytes_moved import copy_bandwidth
from benchmarks.cases.case import Case
from benchmarks.correctness import first_line
from benchmarks.names import COMPILED, COMPILED_CALL, OURS, SNIPPET, is_ours

Row = dict[str, Any]

# Exit statuses: something of ours failed; the time was over; the device must be left and entered again.
FAILED, NOT_ALL, START_AGAIN = 1, 74, 75
TIMED = 0.4  # of a case's share of the time; the rest is for references and first calls
DIED = "the process ended in the middle of it"


def cases(suites: Iterable[str], tiny: bool) -> list[Case]:
    """Of devices; or for a rehearsal each kind at a tiny size."""
    every = [case for suite in suites for case in SUITES[suite].cases("cuda")]
    if not tiny:
        return every
    return list({case.key: case for case in [case.at_tiny_size() for case in every if case.tiny]}.values())


def measure(chosen: list[Case], device: str, end: float, path: Path, part: str = "", rounds: int | None = None) -> int:
    """Into the file, as they come, until a time. `part` distinguishes the parts in which one case is measured twice.

    The file also says which cases are `planned`, `begun` and `ended`.
    """
    about: dict[str, Any] = {"planned": [], "begun": [], "ended": []}
    rows: list[Row] = []
    if path.exists():
        about, rows = results.load_about(path), results.load(path)
    of_all = provenance.provenance(device) | {"machine": provenance.machine(device)}
    jobs = {f"{part}{case.key}": case for case in chosen}
    about["planned"] += [name for name in jobs if name not in about["planned"]]
    for name in [name for name in about["begun"] if name in jobs and name not in about["ended"]]:
        rows.append(jobs[name].about | of_all | {"implementation": OURS, "failed": DIED})
        about["ended"].append(name)
    left = [name for name in jobs if name not in about["begun"]]
    results.save(path, rows, **about)
    if left and any(case.bytes_moved() for case in chosen) and "copy_gb_s" not in about:
        about["copy_gb_s"] = copy_bandwidth(device)
    for number, name in enumerate(left):
        remaining = end - time.time()
        if remaining <= 0:
            print(f"{len(left) - number} of {len(jobs)} cases were not reached", flush=True)
            return NOT_ALL
        print(f"{number + 1}/{len(left)} {name}, {remaining:.0f} s left", flush=True)
        about["begun"].append(name)
        results.save(path, rows, **about)
        case = jobs[name]
        budget = min(case.budget, TIMED * remaining / (len(left) - number))
        try:
            copying = about.get("copy_gb_s")
            found = runner.measure(case, device, budget, rounds, copying, intervals.LEAST, keep_going=True)
        except Exception as failure:
            traceback.print_exc()
            found = [case.about | {"implementation": OURS, "failed": first_line(failure)}]
        known = {(*results.case_key(row), row["implementation"]) for row in rows}
        rows += [of_all | row for row in found if (*results.case_key(row), row["implementation"]) not in known]
        about["ended"].append(name)
        results.save(path, rows, **about)
        if not usable(device):
            return START_AGAIN
    return FAILED if any("failed" in row and is_ours(row["implementation"]) for row in rows) else 0


def usable(device: str) -> bool:
    """Whether the device still works for this process; the next case has all its memory then."""
    try:
        timing.synchronize(device)
    except RuntimeError:
        return False
    if device != "cpu":
        torch.get_device_module(device).empty_cache()
    return True


def first_calls(chosen: list[Case], device: str) -> None:
    """Nothing is timed or kept but what compilers keep: their caches on disk."""
    for case in [case for case in chosen if case.compiled_ways()]:
        print(f"first calls of {case.key}", flush=True)
        torch._dynamo.reset()
        with case.prepared(device) as inputs:
            for name, make in case.compiled_ways().items():
                try:
                    case.enter(make(), inputs).check()
                except Exception as failure:  # the phase that measures it will say so
                    print(f"{name}: {first_line(failure)}", flush=True)
        usable(device)


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.measure")
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since 1970; then no case begins any more")
    parser.add_argument("--eager", action="store_true", help="without what has to be compiled")
    parser.add_argument("--compiled", action="store_true", help="what has to be compiled, beside ours and the snippet")
    parser.add_argument("--first-calls", metavar="I/N", help="of every Nth case, to fill the compilers' caches")
    options = parser.parse_args()
    checkout.find_kernels()
    rehearsal = options.device == "cpu"
    if rehearsal:  # the same graphs, run without the minute that their C++ takes
        torch.compile = partial(torch.compile, backend="aot_eager")
    chosen = cases(options.suites, tiny=rehearsal)
    if options.eager:
        chosen = [replace(case, compiling=False) for case in chosen]
    if options.compiled:
        # Those with attention last: they take the longest to compile, and the others need not wait for them.
        chosen = sorted((case for case in chosen if case.compiling), key=lambda case: getattr(case, "attention", False))
        chosen = [replace(case, only=(SNIPPET, OURS, COMPILED, COMPILED_CALL)) for case in chosen]
    if options.first_calls:
        at, step = map(int, options.first_calls.split("/"))
        penalties = [case for case in chosen if case.suite == "penalties" and case.compiling]
        others = [case for case in chosen if case.suite != "penalties"]
        first_calls([*penalties[at::step], *others[at::step]], options.device)
        return 0
    part, rounds = "compiled: " if options.compiled else "", intervals.LEAST if rehearsal else None
    return measure(chosen, options.device, options.until, options.out, part, rounds)


if __name__ == "__main__":
    raise SystemExit(main())
