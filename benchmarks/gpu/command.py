"""Everything one wants to know of a device, in the few minutes in which it is at hand.

Phases in the order of their worth: the device and whether the ops are right on it, the tests, the ops, whole
penalties, experiments, torch.compile. Each has a process, a time limit and a file of its own, written as it goes. A run
that is cut off leaves all that it found. `python -m benchmarks report DIR` makes pages of it.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from benchmarks import checkout, provenance, results
from benchmarks.gpu.measure import FAILED, NOT_ALL, START_AGAIN
from benchmarks.gpu.phases import Phase, phases
from benchmarks.names import RUN
from benchmarks.report import device_run

LOG = "log.txt"
PR_SET_PDEATHSIG = 1  # of Linux
PATIENCE = 3.0  # seconds to end after a signal, before it is killed
LEAST = 20  # seconds of a budget: importing torch takes that in all
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # of each process beside others
RUNNING, DONE, INTERRUPTED, NOT_STARTED = "running", "done", "interrupted", "not started: no time was left"
WRONG, INCOMPLETE = "something failed", "not all of its cases were reached"
CUT_OFF, BROKEN = "cut off at its limit", "ended with status"


class Run:
    """The phases of one run, and the file that says how far they have come."""

    def __init__(self, out: Path, device: str, budget: float) -> None:
        self.out, self.device, self.budget = out, device, budget
        self.begin = time.monotonic()
        self.about = provenance.provenance(device) | {
            "dry_run": device == "cpu", "machine": provenance.machine(device), "budget_s": budget,
            "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        }  # fmt: skip
        self.states: list[dict[str, Any]] = []
        self.running: list[subprocess.Popen[bytes]] = []

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.begin)

    def save(self) -> None:
        results.save(self.out / RUN, self.states, **self.about)

    def phases(self, every: list[Phase]) -> None:
        with (self.out / LOG).open("ab") as log, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            # What is compiled beside the tests is found by the phases after them. As many threads for all: a pool of
            # sixteen processes for each of those that compile would take longer to start than it saves.
            compiled = {"TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "4"}
            environment = os.environ | compiled | {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
            environment.pop("TRITON_INTERPRET", None)
            try:
                for at, phase in enumerate(every):
                    if phase.beside:
                        self.start([*phase.command, *until(self.left)], log, environment | ONE_THREAD)
                        continue
                    if phase.alone:
                        self.stop()
                    weights = [later.weight for later in every[at:]]
                    share = self.left * phase.weight / sum(weights)
                    self.phase(phase, min(phase.most, share), log, environment)
            finally:
                self.stop()
                for state in self.states:
                    if state["state"] == RUNNING:
                        state["state"] = INTERRUPTED
                self.save()

    def phase(self, phase: Phase, limit: float, log: IO[bytes], environment: dict[str, str]) -> None:
        state = {"phase": phase.name, "title": phase.title, "file": phase.file, "limit_s": limit, "state": RUNNING}
        self.states.append(state)
        if self.left < 1:
            state["state"] = NOT_STARTED
            return
        self.save()
        print(f"{phase.name}: {phase.title}, {limit:.0f} s at most", flush=True)
        begin = time.monotonic()
        starts = 0
        while True:
            starts += 1
            remaining = limit - (time.monotonic() - begin)
            log.write(f"\n===== {phase.name}, start {starts}\n".encode())
            log.flush()
            words = [*phase.command, *(until(remaining) if phase.measures else [])]
            process = self.start(words, log, environment if phase.alone else environment | ONE_THREAD)
            try:
                status = process.wait(max(1.0, remaining))
            except subprocess.TimeoutExpired:
                self.end(process)
                state["state"] = CUT_OFF
                break
            self.running.remove(process)
            if status == 0:
                state["state"] = DONE
            elif status == FAILED:
                state["state"] = WRONG
            elif phase.measures and status == NOT_ALL:
                state["state"] = INCOMPLETE
            elif phase.measures and (status == START_AGAIN or status < 0) and limit > time.monotonic() - begin:
                continue
            else:
                state["state"] = f"{BROKEN} {status}"
            break
        state |= {"seconds": time.monotonic() - begin, "starts": starts}
        self.save()
        print(f"  {state['state']} after {state['seconds']:.0f} s", flush=True)

    def start(self, command: list[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            cwd=checkout.ROOT, preexec_fn=_in_a_group_of_its_own,
        )  # fmt: skip
        self.running.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """With the processes that it has started: its own group."""
        self.running.remove(process)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(PATIENCE)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue

    def stop(self) -> None:
        for process in list(self.running):
            self.end(process)


def _in_a_group_of_its_own() -> None:
    """And ended with this process, however that ends: nothing is to hold the device then."""
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def until(seconds: float) -> list[str]:
    """For `benchmarks.gpu.measure`: the last case begins so early that it can end in that time."""
    return ["--until", f"{time.time() + 0.9 * seconds - PATIENCE:.1f}"]


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal at tiny sizes")
    parser.add_argument("--budget", type=float, default=420, metavar="S", help="seconds for all of it (default: 420)")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="for its files (out/gpu)")
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA or ROCm device, and torch finds none; cpu rehearses the command")
    if not options.budget >= LEAST:
        parser.error(f"--budget must be {LEAST} seconds or more, got {options.budget:g}")
    files = {RUN, LOG, *(phase.file for phase in phases(options.out, options.device) if phase.file)}
    if any((options.out / name).exists() for name in files):
        parser.error(f"--out: {options.out} holds an earlier run; move it away, or name another folder")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / LOG).touch()
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to, got {options.out}: {error.strerror}")
    return options


def interrupt(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(words: Sequence[str]) -> int:
    options = parse(words)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    run = Run(options.out.resolve(), options.device, options.budget)
    run.save()
    print(
        f"{run.about['machine']}, {options.budget:.0f} s; all that is printed goes to {options.out / LOG}", flush=True
    )
    run.phases(phases(run.out, options.device))
    print(device_run.summary(device_run.load(options.out)))
    return int(any(state["state"] != DONE for state in run.states))
