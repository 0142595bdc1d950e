"""Time fused_gp against what people use, on this machine.

python -m benchmarks SUITE [SUITE ...] [options]
python -m benchmarks compare A.json B.json
python -m benchmarks report [DIR]
python -m benchmarks gpu [options]
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from benchmarks import checkout, intervals, results, runner, timing
from benchmarks.cases import SUITES
from benchmarks.cases.case import Case
from benchmarks.gpu import command
from benchmarks.report import compare, page, terminal
from benchmarks.report.tables import tables

COMMANDS = {"compare": compare.main, "report": page.main, "gpu": command.main}
USAGE = """\
python -m benchmarks SUITE [SUITE ...] [--device cpu] [--quick] [--only TEXT] [--rounds N] [--out DIR]
       python -m benchmarks compare A.json B.json
       python -m benchmarks report [DIR]
       python -m benchmarks gpu [--device cuda] [--budget S] [--out DIR]"""
EPILOG = """\
suites:
{}

ops, penalties and training share one file of rows; the others have one each. The file goes to benchmarks/results/ if
all its suites were run whole on a CPU, and from there to docs/benchmarks.md and the README. That of a part, of a
device, or with --quick or --only, goes to out/benchmarks/.

other commands, with their own --help:
  compare     what changed between two runs beyond noise; ends with status 1 where it became worse
  report      write pictures and pages from the committed runs; of a run of `gpu`, commit it first
  gpu         everything of a device, in a few minutes: tests, ops, penalties, experiments"""
QUICK_BUDGET = 1 / 3


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[Case]]:
    """The options, and the cases that they choose."""
    listed = "\n".join(f"  {name:<12}{str(suite.__doc__).splitlines()[0]}" for name, suite in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", usage=USAGE, description=str(__doc__).splitlines()[0],
        epilog=EPILOG.format(listed), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("suites", nargs="+", choices=SUITES, metavar="SUITE", help="one or more; see below")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda is ROCm too (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="a few cases, and nothing that has to be compiled")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this, as 'MLP (64'")
    least, most = timing.ROUNDS
    rounds = f"number of timing rounds, {intervals.LEAST} or more (default: {least} to {most}, by time)"
    parser.add_argument("--rounds", type=int, metavar="N", help=rounds)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where JSON and pictures go")
    options = parser.parse_args(words)
    if options.rounds is not None and options.rounds < intervals.LEAST:
        parser.error(f"--rounds must be {intervals.LEAST} or more, which an interval needs, got {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA or ROCm device, and torch finds none")
    every: list[Case] = []
    for name in dict.fromkeys(options.suites):
        of_suite = SUITES[name].cases(options.device)
        if not of_suite:
            parser.error(f"{name} has no cases for --device {options.device}")
        every += of_suite
    if options.quick:
        every = [replace(case, compiling=False) for case in every if case.quick]
    chosen = [case for case in every if options.only in case.key]
    if not chosen:
        among = "of --quick " if options.quick else ""
        keys = "\n".join(case.key for case in every)
        parser.error(f"--only: no case {among}has {options.only!r} in its name:\n{keys}")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out must be a folder, got {options.out}: {error.strerror}")
    return options, chosen


def measure(options: argparse.Namespace, chosen: list[Case]) -> None:
    written = []
    # A first call compiles in the run that says how long it took.
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        for file, suites in results.FILES.items():
            cases = [case for case in chosen if case.suite in suites]
            if not cases:
                continue
            # A device's committed run is that of `gpu`.
            whole = set(suites) <= set(options.suites) and not (
                options.quick or options.only or options.device != "cpu"
            )
            folder = options.out or (results.COMMITTED if whole else results.UNCOMMITTED)
            path = folder / f"{file.format(device=options.device)}.json"
            unfinished = (options.out or results.UNCOMMITTED) / f"{path.stem}.unfinished.json"
            budget = QUICK_BUDGET if options.quick else 1.0
            results.save(path, runner.run(cases, options.device, budget, options.rounds, unfinished))
            unfinished.unlink()
            written.append(path)
    for path in written:
        rows = results.load(path)
        terminal.show(tables(rows))
        print(page.provenance(rows), f"rows: {path}", sep="\n")
        path.with_suffix(".png").unlink(missing_ok=True)  # the picture of another run
        page.draw(path)
    if options.quick:
        print("--quick leaves out what has to be compiled: ours and the peers' under torch.compile")
    if any(path.parent == results.COMMITTED for path in written):
        page.write()


def main(words: Sequence[str]) -> int:
    checkout.find_kernels()
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    measure(*parse(words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
