"""What `make gpu` does, in the order of its worth: each phase with a process, a file and a time of its own."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

MOST_WORKERS = 12  # of the tests: each has torch and a context on the device
MOST_COMPILERS = 4  # beside the tests


class Phase(NamedTuple):
    name: str
    title: str
    weight: float  # about the seconds it takes on a device; of the time that is left, it has as large a share at most
    command: list[str]
    file: str  # of what it finds; none if it only prepares
    beside: bool = False  # starts with the next phase, and is ended where the first one begins that is to be alone
    alone: bool = False  # on the device
    most: float = float("inf")  # seconds, however long the run may take
    measures: bool = False  # by `benchmarks.gpu.measure`, which ends by itself, and goes on where it was when it died


def phases(out: Path, device: str) -> list[Phase]:
    cpus = os.cpu_count() or 1
    compilers = min(MOST_COMPILERS, -(-cpus // 4))
    workers = max(1, min(MOST_WORKERS, cpus - compilers))
    measure = [sys.executable, "-m", "benchmarks.gpu.measure", "--device", device, "--out"]
    tests = [
        # Only these plugins, whatever else is installed: the tests turn every warning into an error.
        sys.executable, "-m", "pytest", "-p", "benchmarks.checkout", "-p", "benchmarks.gpu.test_record",
        "-p", "no:cacheprovider", "-q", "--record", str(out / "tests.jsonl"),
    ]  # fmt: skip
    warm = [
        Phase(
            f"compile {part}", "compile beside the tests", 0,
            [*measure, os.devnull, "penalties", "ops", "experiments", "--first-calls", f"{part}/{compilers}"],
            "", beside=True,
        )
        for part in range(compilers)
    ]  # fmt: skip
    some = [] if device != "cpu" else ["tests/device", "tests/ops"]  # a rehearsal, in which all of them are skipped
    alone = [*tests, "-m", "gpu and alone", "tests/device"]

    def measured(name: str, title: str, weight: float, file: str, *words: str) -> Phase:
        return Phase(name, title, weight, [*measure, str(out / file), *words], file, alone=True, measures=True)

    return [
        Phase(
            "device", "the device, copy bandwidth, and whether the ops are right", 60,
            [sys.executable, "-m", "benchmarks.gpu.device", "--device", device, "--out", str(out / "device.json")],
            "device.json", most=60,
        ),
        *warm,
        Phase(
            "tests", "the tests marked gpu, in parallel", 115,
            [*tests, "-p", "xdist", "-n", str(workers), "--dist", "loadgroup", "-m", "gpu and not alone", *some],
            "tests.jsonl",
        ),
        Phase("tests alone", "those that need the device by themselves", 40, alone, "tests.jsonl", alone=True),
        measured("ops", "the ops against peers and copying", 55, "ops.json", "ops"),
        measured("penalties", "whole penalties", 70, "penalties.json", "penalties", "--eager"),
        measured("experiments", "experiments whose answer decides code", 40, "experiments.json", "experiments"),
        measured("compiled", "whole penalties under torch.compile", 60, "penalties.json", "penalties", "--compiled"),
    ]  # fmt: skip
