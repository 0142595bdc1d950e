"""Time fused_gp against what people use, on this machine.

python -m benchmarks SUITE [SUITE ...] [options]
python -m benchmarks compare A.json B.json
python -m benchmarks report
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import intervals, results, runner, timing
from benchmarks.cases import SUITES
from benchmarks.cases.case import Case
from benchmarks.report import compare, page, terminal
from benchmarks.report.tables import tables

COMMANDS = {"compare": compare.main, "report": page.main}
USAGE = """\
python -m benchmarks SUITE [SUITE ...] [--device cpu] [--quick] [--only TEXT] [--rounds N] [--out DIR]
       python -m benchmarks compare A.json B.json
       python -m benchmarks report"""
EPILOG = """\
suites:
{}

ops, penalties and training share one file of rows; methods, systems and host have one each. The file goes to
benchmarks/results/ if all its suites were run whole, and from there to docs/benchmarks.md and the README. That of a
part, or with --quick or --only, goes to out/benchmarks/.

other commands, with their own --help:
  compare     what changed between two runs beyond noise; ends with status 1 where it became worse
  report      write pictures and pages from the committed runs"""


def _suite(text: str) -> str:
    if text not in SUITES:
        wanted = ", ".join(SUITES)
        raise argparse.ArgumentTypeError(f"no suite {text!r}: {wanted}; or, as the first word, {' or '.join(COMMANDS)}")
    return text


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[Case]]:
    """The options, and the cases that they choose."""
    assert __doc__ is not None
    listed = "\n".join(f"  {name:<12}{suite.what}" for name, suite in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", usage=USAGE, description=__doc__.splitlines()[0], epilog=EPILOG.format(listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("suites", nargs="+", type=_suite, metavar="SUITE", help="one or more; see below")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda is ROCm too (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="a few cases, and nothing that has to be compiled")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    least, most = timing.ROUNDS
    rounds = f"of timings, {intervals.LEAST} or more (default: {least} to {most}, by time)"
    parser.add_argument("--rounds", type=int, metavar="N", help=rounds)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where JSON and pictures go")
    options = parser.parse_args(words)
    if options.rounds is not None and options.rounds < intervals.LEAST:
        parser.error(f"--rounds must be {intervals.LEAST} or more, which an interval needs, got {options.rounds}")
    if options.device == "cuda":
        without = [name for name in options.suites if not SUITES[name].on_devices]
        if without:
            parser.error(f"{', '.join(without)}: the processor's time alone, without --device cuda")
        if not torch.cuda.is_available():
            parser.error("--device cuda needs a CUDA or ROCm device, and torch finds none")
    every = [case for name in dict.fromkeys(options.suites) for case in _cases(name, options.device, options.quick)]
    chosen = [case for case in every if options.only in case.key]
    if not chosen:
        parser.error(f"--only: no case has {options.only!r} in its name:\n" + "\n".join(case.key for case in every))
    return options, chosen


def _cases(name: str, device: str, quick: bool) -> list[Case]:
    suite = SUITES[name]
    cases = suite.cases(device)
    return [replace(case, compiling=False) for case in cases if suite.quick(case)] if quick else cases


def measure(options: argparse.Namespace, chosen: list[Case]) -> None:
    budgets = {name: suite.quick_budget if options.quick else suite.budget for name, suite in SUITES.items()}
    written = []
    with runner.empty_compile_cache():
        for template, suites in results.FILES.items():
            cases = [case for case in chosen if case.suite in suites]
            if not cases:
                continue
            whole = set(suites) <= set(options.suites) and not (options.quick or options.only)
            path = (options.out or (results.COMMITTED if whole else results.UNCOMMITTED)) / (
                template.format(device=options.device) + ".json"
            )
            unfinished = (options.out or results.UNCOMMITTED) / f"{path.stem}.unfinished.json"
            results.save(path, runner.run(cases, options.device, budgets, options.rounds, unfinished))
            unfinished.unlink()
            written.append(path)
    for path in written:
        rows = results.load(path)
        terminal.show(tables(rows))
        print(page.provenance(rows))
        print(f"rows: {path}")
        path.with_suffix(".png").unlink(missing_ok=True)  # the picture of another run
        page.draw(path)
    if options.quick:
        print("--quick leaves out what has to be compiled: ours and the peers' under torch.compile")
    if any(path.parent == results.COMMITTED for path in written):
        page.write()


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    measure(*parse(words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
