"""What a run of `python -m benchmarks gpu` has left: one record of its files, and that in short."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.names import OURS, RUN, SNIPPET, is_ours
from benchmarks.report.case_rows import CaseRows, Row, by_case
from benchmarks.report.tables import Table, table

MEASURED = ("ops.json", "penalties.json", "experiments.json")
FEW, MANY = 8, 40  # failed tests that are shown with their message, and by name
SHOWN = 700  # characters of the message


class DeviceRun(NamedTuple):
    about: dict[str, Any]  # the run: its machine, versions, commit, and whether it is a rehearsal on a CPU
    phases: list[dict[str, Any]]
    device: dict[str, Any]  # what the first phase found
    parity: list[Row]
    tests: dict[str, Any]
    missing: list[str]  # cases that were planned, and not reached or not finished
    rows: list[Row]

    @property
    def machine(self) -> str:
        return str(self.about["machine"])

    @property
    def name(self) -> str:
        """Of its file among the committed ones."""
        return re.sub(r"[^a-z0-9]+", "_", self.machine.lower()).strip("_")

    @property
    def dry(self) -> bool:
        return bool(self.about["dry_run"])

    def save(self, path: Path) -> None:
        parts = {"phases": self.phases, "device": self.device, "parity": self.parity, "tests": self.tests}
        parts["missing"] = self.missing
        results.save(path, self.rows, about=self.about, **parts)


def saved(path: Path) -> DeviceRun:
    return DeviceRun(rows=results.load(path), **results.load_about(path))


def load(folder: Path) -> DeviceRun:
    """Of as many phases as it has come to."""
    run, first = folder / RUN, folder / "device.json"
    device, parity = (results.load_about(first), results.load(first)) if first.exists() else ({}, [])
    files = [folder / name for name in MEASURED if (folder / name).exists()]
    rows = [row for file in files for row in results.load(file)]
    missing = []
    for about in map(results.load_about, files):
        missing += [name for name in about["planned"] if name not in about["ended"]]
    ran = tests(folder / "tests.jsonl")
    return DeviceRun(results.load_about(run), results.load(run), device, parity, ran, missing, rows)


def tests(path: Path) -> dict[str, Any]:
    """Numbers, and what failed. The last line may be half of one."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    ran = [line for line in lines if "test" in line]
    failed = list({line["test"]: line for line in reversed(ran) if line["outcome"] == "failed"}.values())[::-1]
    skipped = Counter(line.get("message", "") for line in ran if line["outcome"] == "skipped")
    return {
        "collected": sum(line.get("collected", 0) for line in lines),
        "passed": sum(line["outcome"] == "passed" for line in ran),
        "skipped": dict(skipped),
        "failed": failed,
        "slowest": sorted(([line["seconds"], line["test"]] for line in ran), reverse=True)[:10],
    }


def summary(run: DeviceRun) -> str:
    """For a terminal, of which the end may be all that is kept: failures first, then numbers, and the phases last."""
    tests = run.tests
    lines = [""]
    for test in tests["failed"][:FEW]:
        lines += [f"FAILED {test['test']}", test["message"][-SHOWN:]]
    lines += [f"FAILED {test['test']}" for test in tests["failed"][FEW:MANY]]
    if len(tests["failed"]) > MANY:
        lines.append(f"... and {len(tests['failed']) - MANY} tests more")
    lines += [f"FAILED {_label(row)}, {row['implementation']}: {row['failed']}" for row in run.rows if "failed" in row]
    wrong = [row for row in run.parity if "failed" in row]
    lines += [f"WRONG {_label(row)}: {row['failed']}" for row in wrong[:MANY]]
    lines += [f"not reached: {name}" for name in run.missing]
    lines += [f"left out: {name}, {reason}" for name, reason in _left_out(run.rows)]
    lines += ["", *(line for case in by_case(run.rows) for line in _numbers(case))]
    lines += ["", f"{'REHEARSAL on a CPU, no measurement: ' if run.dry else ''}{run.machine}; {run.about['versions']}"]
    lines += [f"{name}: {run.device[name]}" for name in ("copy_gb_s", "tflops", "clocks") if name in run.device]
    lines += [f"skipped {number}: {reason}" for reason, number in tests["skipped"].items()]
    lines += [
        f"ops that are right: {len(run.parity) - len(wrong)} of {len(run.parity)}",
        f"tests: {tests['passed']} passed, {len(tests['failed'])} failed, {sum(tests['skipped'].values())} skipped, "
        f"of {tests['collected']}",
    ]
    lines += [f"{state['phase']:<12} {state.get('seconds', 0):5.0f} s  {state['state']}" for state in run.phases]
    return "\n".join(lines)


def _numbers(case: CaseRows) -> list[str]:
    """Of ours: of an op how near it comes to copying, of a penalty how it compares with the lines by hand."""
    found = []
    for name, row in case.rows.items():
        if "ms" not in row or not is_ours(name) or case.suite == "experiments":
            continue
        parts = [f"{case.label}, {name}: {case.time(name)} ms"]
        if "device_ms" in row:
            parts.append(f"device {case.time(name, 'device_ms')} ms, host {case.time(name, 'host_ms')} ms")
        if row.get("copy_gb_s"):
            parts.append(f"{100 * row['gb_s'] / row['copy_gb_s']:.0f} % of copying")
        if SNIPPET in case.rows and f"over {OURS}" in case.rows[SNIPPET] and name == OURS:
            parts.append(f"snippet / ours {case.ratio(SNIPPET)}")
        if "peak_mb" in row and case.suite == "penalties":
            parts.append(f"{row['peak_mb']:.0f} MB")
        found.append("; ".join(parts))
    return found


def _left_out(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["implementation"], row["absent"]) for row in rows if "absent" in row))


def _label(row: Row) -> str:
    return f"{row['case']} {row['shape']} {row['dtype']}"


def tables(run: DeviceRun) -> list[Table]:
    """Of the phases that are no measurement of a case."""
    device = {name: value for name, value in run.device.items() if name not in run.about}
    wrong = [row for row in run.parity if "failed" in row]
    tests = run.tests
    failed = [{"test": test["test"], "message": _error(test["message"])} for test in tests["failed"]]
    counts = (
        f"{tests['passed']} passed, {len(tests['failed'])} failed and {sum(tests['skipped'].values())} were skipped, "
        f"of {tests['collected']}."
    )
    return [
        table("The device", "", [{"": name, "found": _said(value)} for name, value in device.items()]),
        table("The phases of `make gpu`", "", [_phase(state) for state in run.phases]),
        table("Tests that failed on the device", counts, failed or [{"test": "none", "message": ""}]),
        table(
            f"Ops that are wrong: {len(wrong)} of {len(run.parity)}", "",
            [{"op": _label(row), "reason": row["failed"]} for row in wrong],
        ),
        table("Cases that were not reached", "", [{"case": name} for name in run.missing]),
    ]  # fmt: skip


def _error(message: str) -> str:
    """The first line of what pytest marks as the error, or the last line."""
    lines = message.strip().splitlines() or [""]
    return next((line for line in lines if line.startswith("E ")), lines[-1]).removeprefix("E").strip()


def _phase(state: dict[str, Any]) -> dict[str, str]:
    return {"phase": state["title"], "seconds": f"{state.get('seconds', 0):.0f}", "": state["state"]}


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
