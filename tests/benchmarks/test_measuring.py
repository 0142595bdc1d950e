"""What the benchmarks measure with: intervals, byte model, timings, correctness check, peak memory, the runner."""

import ctypes
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import intervals, memory, provenance, results, runner, timing
from benchmarks.cases import SUITES, bytes_moved
from benchmarks.cases.methods import MethodCase
from benchmarks.cases.ops import OpCase
from benchmarks.cases.systems import SYSTEMS, TINY, SystemCase
from benchmarks.correctness import CorrectnessCheck, Wrong
from benchmarks.names import BOTH, COPIES, OURS, TIDY, USUAL
from benchmarks.peers import Absent, ctgan, snippet
from tests.support.small_run import SMALL, small_run


@pytest.mark.parametrize("count", [6, 7, 9, 24, 101])
def test_interval_of_the_median(count):
    samples = np.random.default_rng(count).standard_exponential(count)
    wanted = pytest.importorskip("scipy.stats").quantile_test(samples, q=0, p=0.5).confidence_interval(0.95)
    found = intervals.median(list(samples))
    assert found == (np.median(samples), wanted.low, wanted.high)


def test_too_few_samples_have_no_interval():
    with pytest.raises(ValueError, match="6 samples, got 5"):
        intervals.median([1.0] * 5)


def test_the_byte_model_is_the_kernels_budget():
    """Elements read and written by each op."""
    assert bytes_moved.INTERPOLATE == (2, 1)
    assert bytes_moved.INTERPOLATE_BACKWARD == (1, 2)
    assert bytes_moved.PENALTY == (1, 0)
    assert bytes_moved.PENALTY_BACKWARD == (1, 1)
    assert bytes_moved.PENALTY_DOUBLE_BACKWARD == (4, 1)
    assert OpCase(BOTH, (64, 784)).bytes_moved() == 6 * 64 * 784 * 4
    assert OpCase(BOTH, (64, 784), torch.float16).bytes_moved() == 6 * 64 * 784 * 2


@pytest.mark.parametrize("model", [(2, 1), (4, 2), (1, 0)])
def test_plain_copies_move_as_many_bytes(model):
    x = torch.randn(4, 10)
    model = bytes_moved.BytesMoved(*model)
    copies = bytes_moved.copies(x, model)()
    assert sum(2 * copy.numel() for copy in copies) == model.total * x.numel()
    assert len({copy.data_ptr() for copy in [x, *copies]}) == 1 + len(copies)


def test_all_are_interleaved_in_changing_order():
    calls = []
    steps = {name: partial(calls.append, name) for name in "abc"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SHORTEST_TIMING", 0)  # one step a timing
        number, timings = timing.interleaved(steps, "cpu", budget=0, rounds=40)
    assert number == dict.fromkeys("abc", 1)
    assert {name: len(found) for name, found in timings.items()} == dict.fromkeys("abc", 40)
    timed = calls[-120:]
    rounds = {tuple(timed[at : at + 3]) for at in range(0, 120, 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(rounds) > 1


class Clock:
    """Its time passes by calls of `pass_by` alone."""

    now = 0.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


def test_a_slow_step_is_not_repeated_for_a_fast_one():
    """Or the two ops beside a ResNet, which they are a thousandth of, would make `make bench` take hours."""
    clock, slow = Clock(), []
    steps = {
        "fast": lambda: clock.pass_by(timing.SHORTEST_TIMING / 200),
        "slow": lambda: (slow.append(1), clock.pass_by(2 * timing.SHORTEST_TIMING)),
    }
    number, timings = timing.interleaved(steps, "cpu", budget=0, rounds=6, clock=clock)
    assert number == {"fast": 200, "slow": 1}
    assert len(slow) == 4 + 6  # four to see how long it takes
    assert [found.total for found in timings["slow"]] == pytest.approx([2 * timing.SHORTEST_TIMING] * 6)


def test_one_busy_moment_does_not_make_a_fast_step_slow():
    clock, calls = Clock(), []
    step = lambda: (calls.append(1), clock.pass_by((5 if len(calls) == 2 else 0.01) * timing.SHORTEST_TIMING))  # noqa: E731
    number, _ = timing.interleaved({"fast": step}, "cpu", budget=0, rounds=6, clock=clock)
    assert number["fast"] == 100


def test_the_first_rounds_are_run_whatever_they_take():
    _, timings = timing.interleaved({"a": lambda: None}, "cpu", budget=0)
    assert len(timings["a"]) == timing.ROUNDS[0] >= intervals.LEAST


def test_time_is_that_of_the_clock_and_fresh_memory_is_counted():
    sleep = partial(time.sleep, 20e-3)
    assert timing.timing(sleep, "cpu", 1).total >= 20e-3
    assert timing.timing(sleep, "cpu", 1, clock=time.process_time).total < 10e-3
    # Above the largest size that malloc keeps, 32 MB; but it may have as much from what other tests have freed.
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    large = timing.timing(lambda: torch.ones(2**26, dtype=torch.uint8), "cpu", 1)
    assert large.fresh > 0.9 * 2**26


def test_a_run_that_breaks_off_leaves_what_is_measured(tmp_path, monkeypatch):
    cases = SUITES["ops"].cases("cpu")
    first, second = [case for case in cases if case.key.startswith("ops: penalty, forward (64, 784")] * 2
    measured = runner.measure

    def breaks(case, *more):
        if (tmp_path / "cpu.unfinished.json").exists():
            raise KeyboardInterrupt
        return measured(case, *more)

    monkeypatch.setattr(runner, "measure", breaks)
    monkeypatch.setattr(runner, "copy_bandwidth", lambda device: 10.0)
    with pytest.raises(KeyboardInterrupt):
        runner.run([first, second], "cpu", 0.0, 6, tmp_path / "cpu.unfinished.json")
    found = results.load(tmp_path / "cpu.unfinished.json")
    assert {row["implementation"] for row in found} >= {OURS, "snippet", COPIES}
    assert all(row["machine"] for row in found)


def entered(implementation, name="a peer"):
    return CorrectnessCheck(SMALL, SMALL.inputs("cpu"), "cpu").enter(name, lambda: implementation)


def test_a_correct_implementation_is_timed():
    step, row = entered(snippet.peer())
    assert step is not None
    assert row["error"] < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        snippet.peer()._replace(norm_penalty=lambda g: (g.norm(2, 1) - 1).abs().mean()),
        snippet.peer()._replace(norm_penalty=lambda g: snippet.norm_penalty(g) * (1 + 1e-3)),
        snippet.peer()._replace(norm_penalty=lambda g: snippet.norm_penalty(g) * float("nan")),
        snippet.peer()._replace(interpolate=lambda real, fake, alpha: alpha * real + (1 - alpha) * fake),
        # The right value, and a gradient that is not.
        snippet.peer()._replace(norm_penalty=lambda g: snippet.norm_penalty(g.detach()) + 0 * g.sum()),
    ],
)
def test_a_wrong_implementation_is_not_timed(wrong):
    step, row = entered(wrong)
    assert step is None
    assert row["failed"].startswith("Wrong: relative error")


def test_ours_may_not_be_wrong():
    with pytest.raises(Wrong):
        entered(snippet.peer()._replace(norm_penalty=lambda g: 2 * snippet.norm_penalty(g)), OURS)


def test_a_peer_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "ctgan.synthesizers.ctgan", None)
    with pytest.raises(Absent, match=r"needs the package ctgan \(pip install '\.\[peers\]'\)"):
        ctgan.peer()
    step, row = CorrectnessCheck(SMALL, SMALL.inputs("cpu"), "cpu").enter("ctgan", ctgan.peer)
    assert step is None
    assert row["absent"].startswith("needs the package ctgan")


def test_every_row_says_where_it_is_from(one_thread):
    rows = small_run()
    assert [row["implementation"] for row in rows] == [OURS, "snippet", "tidy", COPIES]
    for row in rows:
        assert row["machine"]
        assert row["commit"]
        assert f"torch {version('torch')}" in row["versions"]
        assert row["rounds"] == 9
        value, low, high = row["ms"]
        assert 0 < low <= value <= high
    assert "over fused_gp" not in rows[0]
    assert rows[1]["gb_s"] == pytest.approx(1e-6 * SMALL.bytes_moved() / rows[1]["ms"][0])


def timed(monkeypatch, case, seconds, device="cpu"):
    """The rows of a case whose timings are given, by implementation."""
    timings = {name: [timing.Timing(*found) for found in each] for name, each in seconds.items()}
    monkeypatch.setattr(timing, "interleaved", lambda *_: (dict.fromkeys(timings, 1), timings))
    return {row["implementation"]: row for row in runner.measure(case, device, 0.0, None, 10.0)}


def test_ratios_are_taken_round_by_round(monkeypatch):
    """Of 9, 1 and 2 the median is 2; that of the medians is 3."""
    rounds = {OURS: [1.0, 2.0, 3.0] * 2, USUAL: [9.0, 2.0, 6.0] * 2, TIDY: [0.5, 6.0, 1.5] * 2}
    seconds = {name: [(total, None, None, 0) for total in each] for name, each in rounds.items()}
    rows = timed(monkeypatch, SystemCase(next(iter(SYSTEMS)), TINY, critic=lambda: torch.nn.Linear(2, 1)), seconds)
    assert [rows[name]["ms"][0] for name in (OURS, USUAL, TIDY)] == [2e3, 6e3, 1.5e3]
    assert rows[USUAL]["over fused_gp"] == [2.0, 1.0, 9.0]
    assert rows[TIDY]["over fused_gp"] == [0.5, 0.5, 3.0]


def test_a_device_has_times_of_its_own(monkeypatch):
    """With events and a stream that are not there."""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 6.0)
    slept = []
    module = SimpleNamespace(Event=lambda enable_timing: event, _sleep=slept.append, synchronize=lambda: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device", raising=False)
    found = timing.timing(lambda: None, "cuda", 3)
    assert found.device == pytest.approx(2e-3)
    assert found.host > 0
    assert len(slept) == 1

    monkeypatch.setattr(runner.launches, "of", lambda steps: {name: {"launches": 7, "busy_ms": 5.0} for name in steps})
    monkeypatch.setattr(runner.memory, "peak", lambda step, device: 3e6)
    monkeypatch.setattr(runner.provenance, "recent_clocks", lambda device: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(OpCase, "copies", lambda case, inputs, device: [])
    monkeypatch.setattr(runner.provenance, "machine", lambda device: "a device")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    seconds = {name: [(4.0 * at, 2.0, 1.0 * at, 0)] * 6 for at, name in enumerate((OURS, "snippet"), 1)}
    rows = timed(monkeypatch, SMALL, seconds, "cuda")
    ours, peer = rows[OURS], rows["snippet"]
    assert (ours["ms"][0], ours["host_ms"][0], ours["device_ms"][0], ours["launches"]) == (4e3, 2e3, 1e3, 7)
    assert (peer["over fused_gp"][0], peer["device, over fused_gp"][0]) == (2.0, 2.0)
    assert ours["gb_s"] == 1e-6 * SMALL.bytes_moved() / 1e3  # of the device's own time
    assert "fresh_mb" not in ours
    assert (ours["peak_mb"], ours["busy_ms"], ours["clocks"]) == (3.0, 5.0, {"clocks.sm": "1980 MHz"})


def test_an_op_on_a_device_is_timed_by_replays(monkeypatch):
    """What cannot be captured is not timed at all, and says so."""
    monkeypatch.setattr(runner.provenance, "machine", lambda device: "a device")
    monkeypatch.setattr(OpCase, "copies", lambda case, inputs, device: [inputs, inputs])
    steps = []

    def replays(on_copies, device):
        steps.append(len(on_copies))
        if len(steps) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda: 0.5

    monkeypatch.setattr(runner.cold, "replays", replays)
    given = []
    monkeypatch.setattr(timing, "interleaved", lambda steps, *args: (given.append((steps, args[-2])), ({}, {}))[1])
    rows = runner.measure(replace(SMALL, compiling=False), "cpu", 0.0, 6, 10.0)
    assert set(steps) == {2}
    names = [row["implementation"] for row in rows]
    assert [list(each) for each in given[0]] == [[names[0], *names[2:]]] * 2
    assert (
        rows[1]["failed"]
        == "not captured in a CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    )
    found = timing.timing(lambda: None, "cpu", 1, replay=lambda: 0.5)
    assert found.device is None  # there is none


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_in_a_process_of_its_own():
    """Of two tensors that are kept and nothing else: the interpolated samples and the gradients' gradients."""
    case = OpCase(BOTH, (64, 3, 64, 64))
    words = [sys.executable, "-m", "benchmarks.peak_memory", case.key, OURS]
    done = subprocess.run(words, env=os.environ | memory.ENVIRONMENT, check=True, capture_output=True, text=True)
    kept = 2e-6 * 4 * 64 * 3 * 64 * 64
    assert 0.9 * kept < float(done.stdout) < 1.3 * kept  # Linux counts resident pages in lots


def test_memory_alone_is_measured_without_check_or_timing(monkeypatch, tmp_path):
    monkeypatch.setattr(runner.peak_memory, "peak_mb", lambda case, implementation: 5.0)
    case = MethodCase("ViT", (2, 3, 64, 64), critic=None, options=({"chunk_size": 2},), timed=False)
    rows = runner.run([case], "cpu", 0.0, None, tmp_path / "unfinished.json")
    assert [(row["implementation"], row["peak_mb"]) for row in rows] == [
        ("snippet", 5.0),
        ("fused_gp, chunks of 2", 5.0),
    ]
    assert not any("ms" in row or "error" in row for row in rows)
    assert results.load(tmp_path / "unfinished.json") == rows


def test_clocks_are_those_of_torchs_device(monkeypatch):
    """Which may be another one of nvidia-smi's; where there is no nvidia-smi, they are not known."""
    asked = []

    def run(words, **_):
        asked.append(words)
        return SimpleNamespace(stdout="1980 MHz, 2619 MHz, 41, 98.30 W\n")

    module = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(uuid="a-b"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(provenance.subprocess, "run", run)
    assert provenance.clocks("cuda")["clocks.mem"] == "2619 MHz"
    assert asked[0][-1] == "--id=GPU-a-b"
    assert provenance.clocks("cpu") == {}
    monkeypatch.setattr(provenance.subprocess, "run", mock.Mock(side_effect=FileNotFoundError))
    assert provenance.clocks("cuda") == {}
