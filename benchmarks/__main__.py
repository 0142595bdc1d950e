"""Time fused_gp against what people use, on this machine.

    python -m benchmarks [--device cpu] [--quick] [--only TEXT] [--rounds N] [--out DIR]

A whole run goes to benchmarks/results/ (JSON and pictures), and from there to docs/benchmarks.md and the README. A
part of it, --quick or --only, goes to out/benchmarks/.
"""

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import (
    bandwidth,
    cases,
    footprint,
    intervals,
    measure,
    provenance,
    report,
    results,
    tables,
    terminal,
    timing,
)
from benchmarks.case import Case
from benchmarks.options import check_device
from benchmarks.penalty import TWO_OPS

BUDGET = {"op": 1.2, "penalty": 6.0, "training step": 8.0}  # seconds of rounds for a case
QUICK_BUDGET = {"op": 1.0, "penalty": 2.0, "training step": 3.0}


def run(
    chosen: list[Case], device: str, budget: dict[str, float], rounds: int | None, unfinished: Path
) -> list[dict[str, Any]]:
    """The rows; those of the cases that are done are in the file `unfinished` if the run breaks off."""
    about = provenance.provenance(device)
    rows = []
    if any("compiled" in name for case in chosen for name in case.contestants()):
        measure.warm_compiler()
    copy_gb_s = bandwidth.copy_bandwidth(device)
    for case in terminal.track([(case.key, case) for case in chosen]):
        rows += measure.measure(case, device, budget[case.group], rounds, copy_gb_s)
        results.save(unfinished, [row | about for row in rows])
    add_peaks(rows, [case for case in chosen if cases.measured_for_memory(case)], device)
    return [row | about for row in rows]


def add_peaks(rows: list[dict[str, Any]], chosen: list[Case], device: str) -> None:
    """Nothing is timed meanwhile, so two processes at once do no harm, except on a device, whose memory they share."""
    jobs = [
        (case, row)
        for case in chosen
        for row in rows
        if measure.about(case).items() <= row.items() and "ms" in row and row["contestant"] != TWO_OPS
    ]
    with ThreadPoolExecutor(2 if device == "cpu" else 1) as pool:
        waiting = [(row, pool.submit(footprint.peak_mb, case, row["contestant"], device)) for case, row in jobs]
        for row, peak in terminal.track([(f"memory: {row['contestant']}", (row, peak)) for row, peak in waiting]):
            row["peak_mb"] = peak.result()


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="a few cases, and nothing that has to be compiled")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    least, most = timing.ROUNDS
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"turns of each contestant, {intervals.LEAST} or more (default: {least} to {most}, by time)",
    )
    parser.add_argument("--out", type=Path, help="where JSON and pictures go")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < intervals.LEAST:
        parser.error(f"--rounds must be {intervals.LEAST} or more, which an interval needs, got {options.rounds}")
    check_device(parser, options.device)
    every = (cases.quick if options.quick else cases.cases)(options.device)
    chosen = [case for case in every if options.only in case.key]
    if not chosen:
        parser.error(f"no case has {options.only!r} in its name: {', '.join(case.key for case in every)}")
    whole = not (options.quick or options.only)
    folder = options.out or (results.COMMITTED if whole else Path("out/benchmarks"))

    path = folder / f"{options.device}.json"
    unfinished = (options.out or Path("out/benchmarks")) / f"{options.device}.unfinished.json"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # compile in this run what this run says the time of
        budget = QUICK_BUDGET if options.quick else BUDGET
        rows = run(chosen, options.device, budget, options.rounds, unfinished)
    results.save(path, rows)
    path.with_suffix(".png").unlink(missing_ok=True)  # the picture of another run
    unfinished.unlink()
    terminal.show(tables.tables(results.load(path)))
    if options.quick:
        print("--quick leaves out what has to be compiled: ours and the peers' under torch.compile")
    print(f"rows: {path}")
    report.draw(path)
    if folder == results.COMMITTED:
        report.write()


if __name__ == "__main__":
    main()
