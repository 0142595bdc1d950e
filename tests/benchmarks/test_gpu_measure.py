"""What the phases of `python -m benchmarks gpu` that measure do beside other runs, with a device that is not there."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import checkout, cold, launches, results, runner, timing
from benchmarks.cases import experiments, ops
from benchmarks.cases.ops import OpCase
from benchmarks.correctness import CorrectnessCheck
from benchmarks.gpu import device as first_phase
from benchmarks.gpu import measure
from benchmarks.names import COMPILED, COMPILED_CALL, OURS, PLANNED, SNIPPET, TODAY
from benchmarks.peers import PEERS, Implementation

TINY = {case.key: case for case in measure.cases(["ops", "penalties", "experiments"], tiny=True)}


@pytest.mark.parametrize("key", TINY)
def test_every_kind_of_case_is_right_at_a_tiny_size(key, one_thread):
    """Or a device's first minutes show what could have been known before."""
    case = replace(TINY[key], compiling=False)
    with case.prepared("cpu") as inputs:
        check = CorrectnessCheck(case, inputs, "cpu")
        for name, make in case.implementations().items():
            step, row = check.enter(name, make)
            assert "failed" not in row
            assert (step is None) == ("absent" in row)


def test_what_does_not_exist_yet_is_said():
    cases = measure.cases(["penalties", "experiments"], tiny=False)
    names = {name for case in cases for name in case.implementations()}
    assert set(PLANNED) < names
    assert any(case.name.startswith(experiments.ATTENTION) for case in cases)


def test_each_kind_of_critic_is_penalised_by_hand_and_by_what_serves_it():
    for case in measure.cases(["penalties"], tiny=False):
        names = set(case.implementations())
        assert {SNIPPET, OURS} < names
        assert ({COMPILED, COMPILED_CALL} < names) == case.compiling
    tokens = [case.shape[-1] ** 2 // 16 for case in measure.cases(["penalties"], tiny=False) if case.name == "ViT"]
    assert sorted(tokens) == [256, 1024, 4096]


SMALL = [OpCase(name, (4, 6), compiling=False) for name in ("penalty, forward", "interpolation, forward")]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The status and the file of a run with these implementations of ours."""
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 10.0)

    def measured(seconds=60.0, ours=None, cases=SMALL, part=""):
        if ours is not None:
            monkeypatch.setattr(OpCase, "all_implementations", lambda case: {OURS: ours, SNIPPET: PEERS[SNIPPET]})
        status = measure.measure(cases, "cpu", time.time() + seconds, tmp_path / "ops.json", part, rounds=6)
        return status, results.load(tmp_path / "ops.json")

    return measured


def test_cases_are_measured_as_long_as_there_is_time(measured, tmp_path):
    """What is not reached is known by what was planned, in each part in which it was."""
    status, rows = measured(seconds=-1.0)
    assert (status, rows) == (measure.NOT_ALL, [])
    status, rows = measured()
    assert status == 0
    assert sum(row["implementation"] == OURS for row in rows) == 2
    assert measured(seconds=-1.0, part="compiled: ")[0] == measure.NOT_ALL
    about = results.load_about(tmp_path / "ops.json")
    assert set(about["planned"]) - set(about["ended"]) == {f"compiled: {case.key}" for case in SMALL}


def test_a_case_measured_twice_keeps_its_first_rows(measured):
    _, first = measured()
    _, again = measured(part="compiled: ")
    assert again == first


def fails():
    raise RuntimeError("an error\nof several lines")


def test_what_fails_is_a_row_and_the_next_case_goes_on(measured):
    status, rows = measured(ours=fails)
    assert status == measure.FAILED
    assert [row["failed"] for row in rows if row["implementation"] == OURS] == ["RuntimeError: an error"] * 2
    assert sum("ms" in row for row in rows if row["implementation"] == SNIPPET) == 2


def test_a_wrong_result_of_ours_is_a_row_too(measured):
    wrong = PEERS[SNIPPET]()._replace(norm_penalty=lambda g: g.sum(), interpolate=lambda real, fake, alpha: real)
    status, rows = measured(ours=lambda: wrong)
    assert status == measure.FAILED
    assert all(row["failed"].startswith("Wrong: ") for row in rows if row["implementation"] == OURS)


def test_after_a_case_that_leaves_the_device_unusable_the_process_is_left(measured, monkeypatch):
    monkeypatch.setattr(measure, "usable", lambda device: False)
    status, rows = measured()
    assert status == measure.START_AGAIN
    assert {row["case"] for row in rows} == {"penalty, forward"}
    monkeypatch.undo()
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 10.0)
    status, rows = measured()
    assert status == 0
    assert {row["case"] for row in rows} == {"penalty, forward", "interpolation, forward"}


DIES = """
import os, sys, time
from pathlib import Path
from benchmarks.cases.ops import OpCase
from benchmarks.gpu import device as first_phase
from benchmarks.gpu import measure
class Dies(OpCase):
    def all_implementations(self):
        os._exit(3)
cases = [OpCase("penalty, forward", (4, 6)), Dies("interpolation, forward", (4, 6)), OpCase("penalty, forward", (4, 7))]
measure.copy_bandwidth = lambda device: 10.0
raise SystemExit(measure.measure(cases, "cpu", time.time() + 60, Path(sys.argv[1]), rounds=6))
"""


def test_a_case_that_ends_the_process_is_not_tried_again(tmp_path):
    words = [sys.executable, "-c", DIES, str(tmp_path / "ops.json")]
    ends = [subprocess.run(words, cwd=checkout.ROOT, capture_output=True).returncode for _ in range(2)]
    assert ends == [3, measure.FAILED]
    rows = results.load(tmp_path / "ops.json")
    assert [row["failed"] for row in rows if "failed" in row] == [measure.DIED]
    assert {tuple(row["shape"]) for row in rows if "ms" in row} == {(4, 6), (4, 7)}


@pytest.fixture
def device(monkeypatch):
    """torch.cuda's functions, with their signatures; what is captured in a graph runs when that is replayed."""
    module = mock.create_autospec(torch.cuda)
    captured, capturing = [], []

    class Capture:
        def __enter__(self):
            capturing.append(True)

        def __exit__(self, *_):
            capturing.pop()

    module.graph.side_effect = lambda graph: Capture()
    module.stream.side_effect = lambda stream: mock.MagicMock()
    module.Event.return_value.elapsed_time.return_value = 12.0
    module.get_device_properties.return_value = SimpleNamespace(L2_cache_size=50_000_000)
    module.captured, module.capturing = captured, capturing
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return module


def test_a_replay_is_of_many_calls_round_the_copies(device):
    calls = []
    steps = [lambda at=at: calls.append((at, bool(device.capturing))) for at in range(3)]
    seconds = cold.replays(steps, "cuda")
    assert [at for at, inside in calls if not inside] == [0, 1]  # before it
    assert [at for at, inside in calls if inside] == [0, 1, 2] * 4
    assert seconds() == pytest.approx(12e-3 / 12)
    assert device.CUDAGraph.return_value.replay.call_count == 2


@pytest.fixture
def stand_in(device, monkeypatch):
    """A device whose memory is the CPU's."""
    move = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda tensor, *args, **more: move(tensor, *["cpu" if str(a) == "cuda" else a for a in args], **more),
    )
    device.memory_allocated.return_value, device.max_memory_allocated.return_value = 10, 3_000_010
    device.get_device_name.return_value = "a device"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler.profile, "__enter__", lambda session: session)
    monkeypatch.setattr(torch.profiler.profile, "__exit__", lambda *_: None)
    monkeypatch.setattr(torch.profiler.profile, "events", lambda session: [])
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 3000.0)


KINDS = {(case.suite, type(case).__name__): key for key, case in TINY.items() if case.shape[0] > 1}


@pytest.mark.parametrize("key", KINDS.values(), ids=[f"{suite}-{kind}" for suite, kind in KINDS])
def test_each_kind_of_case_goes_through_what_a_device_has(key, stand_in, tmp_path, one_thread):
    """Copies of the inputs, replays, events, clocks, peak memory; with the signatures of torch.cuda."""
    case = replace(TINY[key], compiling=False)
    assert measure.measure([case], "cuda", time.time() + 60, tmp_path / "some.json", rounds=6) == 0
    rows = results.load(tmp_path / "some.json")
    timed = [row for row in rows if "ms" in row]
    assert len(timed) >= 2
    for row in timed:
        assert row.keys() >= {"ms", "host_ms", "device_ms", "clocks", "machine", "versions", "commit", "driver"}
        assert (row["peak_mb"], row["device"]) == (3.0, "cuda")
        if case.bytes_moved():
            assert row["device_ms"][0] < 1.2 + 1e-6  # by replays of ten calls or more
            assert row["gb_s"] > 0
            assert row["cold"] is False
    assert all("failed" not in row for row in rows)


def test_what_a_device_says_beside_the_times_may_fail(stand_in, tmp_path, monkeypatch, one_thread):
    """The times are kept."""
    monkeypatch.setattr(launches, "of", lambda steps: 1 / 0)
    monkeypatch.setattr(measure.runner.memory, "peak", mock.Mock(side_effect=torch.OutOfMemoryError("no memory")))
    assert measure.measure(SMALL[:1], "cuda", time.time() + 60, tmp_path / "some.json", rounds=6) == 0
    for row in results.load(tmp_path / "some.json"):
        assert row.keys() >= {"ms", "device_ms"}
        assert (row["not_counted"], row["no_peak"]) == (
            "ZeroDivisionError: division by zero", "OutOfMemoryError: no memory",
        )  # fmt: skip


def test_a_step_that_waits_for_the_device_has_no_time_of_the_host_alone(monkeypatch):
    """Its host is kept waiting by what keeps the device busy."""
    found = {OURS: [(1.0, 3.0, 1.0, 0)] * 6, SNIPPET: [(2.0, 2.0, 1.0, 0)] * 6}
    timings = {name: [timing.Timing(*each) for each in every] for name, every in found.items()}
    case = replace(TINY[next(key for key in TINY if key.startswith("penalties"))])
    waits, other = (runner._times(name, timings, case, "cuda", False) for name in (OURS, SNIPPET))
    assert waits["waits"]
    assert not {"host_ms", "device_ms"} & waits.keys()
    assert other["host_ms"][0] == 2e3
    assert "over fused_gp" in other
    assert "device, over fused_gp" not in other


@pytest.mark.parametrize(("size", "number"), [(10, 16), (200_000, 750), (5_000_000, 30), (70_000_000, 3), (10**9, 2)])
def test_copies_are_more_than_the_cache_holds(device, size, number):
    assert cold.copies_needed(size, "cuda") == number


def test_copies_of_an_ops_inputs_are_other_memory_with_the_same_numbers(device):
    case = OpCase("penalty, forward", (8, 2_000_000))
    inputs = case.inputs("cpu")
    copies = case.copies(inputs, "cuda")
    assert copies[0] is inputs
    assert len({each.real.data_ptr() for each in copies}) == len(copies) == 3
    assert case.is_cold(inputs, "cuda")
    assert not OpCase("penalty, forward", (2, 4)).is_cold(OpCase("penalty, forward", (2, 4)).inputs("cpu"), "cuda")
    assert all(each.gradients.equal(inputs.gradients) for each in copies)
    assert case.copies(inputs, "cpu") == []


def event(name, kind, start, end, is_user_annotation=False):
    return SimpleNamespace(
        name=name,
        device_type=kind,
        is_user_annotation=is_user_annotation,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
    )


def test_launches_are_those_that_begin_while_a_step_runs(monkeypatch):
    events = [
        event(launches.MARK + "a", DeviceType.CPU, 0, 100), event(launches.MARK + "b", DeviceType.CPU, 110, 200),
        event(launches.MARK + "a", DeviceType.CUDA, 10, 90), event("aten::mul", DeviceType.CPU, 1, 5),
        event("kernel", DeviceType.CUDA, 20, 30), event("Memset", DeviceType.CUDA, 95, 97),
        event("kernel", DeviceType.CUDA, 150, 190),
        event("## Call CompiledFxGraph ##", DeviceType.CUDA, 149, 191, is_user_annotation=True),
    ]  # fmt: skip
    session = mock.MagicMock()
    session.__enter__.return_value.events.return_value = events
    monkeypatch.setattr(launches, "profile", lambda activities: session)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = launches.of({"a": lambda: None, "b": lambda: None})
    assert found == {
        "a": {"launches": 2, "busy_ms": pytest.approx(0.012)}, "b": {"launches": 1, "busy_ms": pytest.approx(0.04)},
    }  # fmt: skip


@pytest.mark.parametrize("settings", experiments.SETTINGS.values(), ids=experiments.SETTINGS)
def test_other_launch_settings_give_the_same_numbers_and_are_taken_back(settings):
    pytest.importorskip("triton")
    from fused_gp import gradient_norm_penalty, interpolate
    from fused_gp.kernels import launch, tiles

    before = (tiles.TILE_BYTES, launch.NUM_WARPS, tiles.PROGRAMS)
    g, alpha = torch.randn(3, 9001), torch.rand(3)
    expected = gradient_norm_penalty(g, backend="torch"), interpolate(g, -g, alpha, backend="torch")
    tiling = tiles.reduction_tile(3, 9001, 4)
    with experiments.tiling(*settings):
        assert settings == (tiles.TILE_BYTES, launch.NUM_WARPS, tiles.PROGRAMS)
        assert (tiles.reduction_tile(3, 9001, 4) != tiling) == (settings[0] != before[0])
        found = gradient_norm_penalty(g, backend="triton"), interpolate(g, -g, alpha, backend="triton")
    torch.testing.assert_close(found, expected)
    assert (tiles.TILE_BYTES, launch.NUM_WARPS, tiles.PROGRAMS) == before == experiments.SETTINGS[TODAY]
    assert tiles.reduction_tile(3, 9001, 4) == tiling


def test_a_wrong_formula_of_the_convolution_is_found(one_thread):
    """The check knows the two gradients apart."""
    case = next(case for case in TINY.values() if isinstance(case, experiments.ConvolutionCase))
    inputs = case.inputs("cpu")
    check = CorrectnessCheck(case, inputs, "cpu")
    right = case.by_two_calls(inputs)()
    for wrong in ([right[0], right[1].flip(0)], [2 * right[0], right[1]]):
        step, row = check.enter("wrong", lambda wrong=wrong: Implementation(lambda given: lambda: wrong))
        assert step is None
        assert row["failed"].startswith("Wrong")


def test_first_calls_are_made_of_each_case_once(monkeypatch, capsys):
    """By one process or another; what fails is left to the phase that measures it."""
    monkeypatch.setattr(OpCase, "all_implementations", lambda case: {OURS: fails, SNIPPET: PEERS[SNIPPET]})
    for part in range(2):
        measure.first_calls(SMALL[part::2], "cpu")
    measure.first_calls([case for case in TINY.values() if isinstance(case, experiments.ConvolutionCase)], "cpu")
    said = capsys.readouterr().out
    assert "convolution" not in said  # compiles nothing
    assert said.count("first calls of ops: penalty, forward") == said.count("first calls of ops: interpolation") == 1
    assert said.count("fused_gp: RuntimeError: an error") == 2


def test_the_ops_of_a_device_are_those_of_a_cpu_and_larger():
    cpu, cuda = ({(case.name, case.shape) for case in ops.cases(device)} for device in ("cpu", "cuda"))
    assert cpu < cuda
    assert os.path.exists(checkout.ROOT / "kernels")


def test_the_first_phase_leaves_what_the_device_is(stand_in, device, tmp_path, monkeypatch, one_thread):
    """With the names that torch has for a device's properties."""
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=80e9, L2_cache_size=50e6, name="a device"
    )
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: draw(*shape))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setitem(first_phase.MATRIX, "cuda", 8)
    monkeypatch.setattr(first_phase, "copy_bandwidth", lambda device: 3000.0)
    monkeypatch.setattr(first_phase, "SHAPES", [(3, 5)])
    monkeypatch.setattr(sys, "argv", ["device", "--device", "cuda", "--out", str(tmp_path / "device.json")])
    assert first_phase.main() == 0
    found = results.load_about(tmp_path / "device.json")
    assert (found["capability"], found["processors"], found["cache_mb"], found["copy_gb_s"]) == (
        "9.0",
        132,
        50.0,
        3000.0,
    )
    assert set(found["tflops"]) == {"bfloat16", "float32"}
    rows = results.load(tmp_path / "device.json")
    assert len(rows) == 3 * len(ops.OPS)
    assert {row["suite"] for row in rows} == {"parity"}

    monkeypatch.setattr(first_phase, "ours", lambda: fails)
    assert first_phase.main() == 1  # and goes on to the end
    assert [row["failed"] for row in results.load(tmp_path / "device.json")] == ["RuntimeError: an error"] * len(rows)

    monkeypatch.setattr(first_phase, "usable", lambda device: False)
    monkeypatch.setattr(first_phase, "copy_bandwidth", lambda device: fails())
    assert first_phase.main() == 1
    assert len(results.load(tmp_path / "device.json")) == 1  # all others would fail too
    assert results.load_about(tmp_path / "device.json")["copy_gb_s"] == "RuntimeError: an error"
