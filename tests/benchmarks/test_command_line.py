"""`python -m benchmarks` and the make targets: what they refuse, what they print, and what they write."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__, results
from benchmarks.__main__ import main
from benchmarks.cases import SUITES, methods
from benchmarks.names import SNIPPET
from benchmarks.report import page
from benchmarks.report.case_rows import interval
from tests.support.small_run import small_run

ROOT = Path(__file__).parents[2]
ABOUT = {"device", "machine", "versions", "commit", "date", "load"}


@pytest.fixture(scope="module")
def rows(one_thread):
    return small_run()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: SUITE"),
        (["opps"], "argument SUITE: invalid choice: 'opps' (choose from"),
        (["ops", "compare"], "argument SUITE: invalid choice: 'compare' (choose from"),
        (
            ["systems", "--only", "nosuch"],
            "--only: no case has 'nosuch' in its name:\nsystems: WGAN-GP, eps (64, 2) flo",
        ),
        (["ops", "--quick", "--only", "forward (64, 784)"], "--only: no case of --quick has 'forward (64, 784)' in"),
        (["ops", "--out", "README.md"], "--out must be a folder, got README.md: File exists"),
        (["methods", "--device", "cuda"], "--device cuda needs a CUDA or ROCm device, and torch finds none"),
        (["systems", "--device", "cuda"], "--device cuda needs a CUDA or ROCm device, and torch finds none"),
        (["ops", "host", "--device", "cuda"], "--device cuda needs a CUDA or ROCm device, and torch finds none"),
        (["ops", "--rounds", "x"], "argument --rounds: invalid int value: 'x'"),
        *(([name, "--rounds", "1"], "--rounds must be 6 or more, which an interval needs, got 1") for name in SUITES),
        *((["ops", "--rounds", at], f"--rounds must be 6 or more, which an interval needs, got {at}") for at in "05"),
        (["systems", "--only", "R1", "--rounds", "-1"], "--rounds must be 6 or more, which an interval needs, got -1"),
        (["compare"], "the following arguments are required: A.json, B.json"),
        (["compare", "nosuch.json"], "argument A.json: nosuch.json: No such file or directory"),
        (["report", "nosuch"], "nosuch holds no run of `python -m benchmarks gpu`: there is no run.json"),
        (["report", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_measured(monkeypatch, capsys, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(__main__.runner, "run", None)
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert said in capsys.readouterr().err


def test_pages_are_left_alone_where_no_run_is_committed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(results, "COMMITTED", tmp_path)
    monkeypatch.setattr(page, "write", None)
    with pytest.raises(SystemExit, match="2"):
        main(["report"])
    assert "run `make bench` first" in capsys.readouterr().err


def test_help_says_everything(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    for word in [*SUITES, *__main__.COMMANDS, "--device", "--quick", "--only", "--rounds", "--out"]:
        assert word in said
    assert all(suite.__doc__.splitlines()[0] in said for suite in SUITES.values())


def test_a_suite_without_cases_for_the_device_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        main(["ops", "host", "--device", "cuda"])
    assert "host has no cases for --device cuda" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["experiments"])
    assert "experiments has no cases for --device cpu" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch, rows):
    """In place of a run: the files to which these rows were written, and whether the pages were."""
    files, pages = [], []

    def run(cases, device, budget, rounds, unfinished):
        results.save(unfinished, [])
        files.append((unfinished.name, sorted({case.suite for case in cases})))
        return rows

    monkeypatch.setattr(__main__.runner, "run", run)
    monkeypatch.setattr(page, "write", lambda: pages.append(True))
    monkeypatch.setattr(page, "draw", lambda path: None)
    return files, pages


@pytest.mark.parametrize(
    ("words", "committed", "uncommitted"),
    [
        (["ops", "penalties", "training"], ["cpu.json"], []),
        (["ops"], [], ["cpu.json"]),  # a part of that file
        (["methods", "ops", "host"], ["cpu_methods.json", "host.json"], ["cpu.json"]),
        (["systems", "--quick"], [], ["cpu_systems.json"]),
        (["systems", "--only", "R1"], [], ["cpu_systems.json"]),
        (["systems", "--rounds", "9"], ["cpu_systems.json"], []),
        (
            [name for name in SUITES if name != "experiments"],
            ["cpu.json", "cpu_methods.json", "cpu_systems.json", "host.json"],
            [],
        ),
    ],
)
def test_suites_run_whole_go_to_the_committed_runs(measured, monkeypatch, tmp_path, words, committed, uncommitted):
    (tmp_path / "committed").mkdir()
    monkeypatch.setattr(results, "COMMITTED", tmp_path / "committed")
    monkeypatch.setattr(results, "UNCOMMITTED", tmp_path / "out")
    assert main(words) == 0
    found = {name: sorted(path.name for path in (tmp_path / name).glob("*")) for name in ("committed", "out")}
    assert found == {"committed": committed, "out": uncommitted}
    assert len(measured[1]) == bool(committed)


def test_suites_of_one_file_are_one_run(measured, tmp_path):
    main(["training", "host", "ops", "methods", "--out", str(tmp_path)])
    assert measured[0] == [
        ("cpu.unfinished.json", ["ops", "training"]),
        ("cpu_methods.unfinished.json", ["methods"]),
        ("host.unfinished.json", ["host"]),
    ]
    assert sorted(path.name for path in tmp_path.glob("*")) == ["cpu.json", "cpu_methods.json", "host.json"]
    assert not measured[1]  # no pages


def test_the_compiled_graphs_of_a_run_are_its_own(rows, monkeypatch, tmp_path):
    """A first call compiles in the run that says how long it took; afterwards the cache is what it was."""

    def run(cases, device, budget, rounds, unfinished):
        assert not os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        results.save(unfinished, [])
        return rows

    monkeypatch.setattr(__main__.runner, "run", run)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "somewhere")
    main(["systems", "--only", "R1", "--out", str(tmp_path)])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "somewhere"


def test_a_quick_run_says_what_it_leaves_out(measured, tmp_path, capsys):
    main(["ops", "--quick", "--out", str(tmp_path)])
    assert "--quick leaves out what has to be compiled" in capsys.readouterr().out


def test_where_there_is_nothing_to_draw_no_picture_is_left(rows, tmp_path, monkeypatch, capsys):
    """`--only 'penalty, forward'`: neither the two ops together nor a critic."""
    pytest.importorskip("matplotlib")

    def run(cases, device, budget, rounds, unfinished):
        results.save(unfinished, [])
        return [row | {"case": "penalty, forward"} for row in rows]

    monkeypatch.setattr(__main__.runner, "run", run)
    (tmp_path / "cpu.png").write_bytes(b"an older run's")
    main(["ops", "--only", "penalty, forward (64, 784)", "--out", str(tmp_path)])
    assert "no pictures: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


@pytest.fixture
def small_methods(monkeypatch):
    """A critic of a layer; no process is started for its memory."""
    cases = [
        replace(case, shape=(case.shape[0], 3, 8, 8), critic=_layer, attention=False, options=case.options[:1])
        for case in methods.cases("cpu")
        if case.name != "conv, SiLU"
    ]
    monkeypatch.setattr(methods, "cases", lambda device: cases)
    monkeypatch.setattr(__main__.runner.peak_memory, "peak_mb", lambda case, implementation: 1.0)


def _layer():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 1), nn.Tanh())


@pytest.mark.parametrize(("critic", "growth"), [("ViT", True), ("conv", False)])
def test_methods(small_methods, one_thread, tmp_path, capsys, critic, growth):
    """Memory against batch is the ViT's; each case and each process is announced; each row has its provenance."""
    main(["methods", "--only", critic, "--rounds", "6", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f" methods: {critic}" in printed
    assert f" memory: methods: {critic}" in printed
    assert ("Peak memory against batch" in printed) == growth
    found = results.load(tmp_path / "cpu_methods.json")
    timed = [row for row in found if "ms" in row]
    assert [row["implementation"] for row in timed] == [SNIPPET, "fused_gp"]
    assert all(row.keys() > ABOUT | {"gradient_error", "bf16_gradient_error", "fresh_mb", "peak_mb"} for row in timed)
    assert all(row.keys() > ABOUT | {"peak_mb"} for row in found)
    assert (len(found) > 2) == growth


def test_systems(one_thread, tmp_path, capsys):
    main(["systems", "--only", "StyleGAN R1 (64, 2)", "--rounds", "6", "--out", str(tmp_path)])
    ours, *peers = results.load(tmp_path / "cpu_systems.json")
    printed = capsys.readouterr().out
    assert "1/1 systems: StyleGAN R1 (64, 2) float32\n" in printed
    assert ours.keys() > ABOUT
    assert len(peers) == 2
    for row in peers:
        assert row.keys() > ABOUT
        ratio, low, high = row["over fused_gp"]
        assert low <= ratio <= high
        assert interval(row["over fused_gp"]) in printed  # of this system
        assert f"{ratio:.2f} to {ratio:.2f}" in printed  # from the least to the most of one system


def test_host(tmp_path):
    """In a process of its own, where the kernels are compiled."""
    pytest.importorskip("triton")
    words = [sys.executable, "-m", "benchmarks", "host", "--quick", "--rounds", "6", "--out", str(tmp_path)]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(words, cwd=ROOT, env=compiled, check=True, capture_output=True, text=True)
    assert "1/5 host: sm_90: interpolation (2, 4) float32\n" in done.stdout
    found = results.load(tmp_path / "host.json")
    assert all(row.keys() > ABOUT for row in found)
    assert {row["machine"].split(", ")[-1] for row in found} == {"1 threads"}
    assert [row["launches"] for row in found if row["implementation"] == "fused_gp"] == [1, 2, 2, 3, 4]
    assert all(len(row["over snippet"]) == 3 for row in found if row["implementation"] != SNIPPET)


def test_a_machine_without_extras_still_measures(tmp_path):
    """The JSON needs torch and numpy alone; what is missing is named."""
    program = (
        "import sys, runpy\n"
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "gone = ('rich', 'matplotlib')\n"
        "u.find_spec = lambda name, *more: None if name in gone else real(name, *more)\n"
        "for name in gone: sys.modules[name] = None\n"
        "sys.argv = ['benchmarks', 'ops', '--only', 'penalty, forward (64, 784)', '--rounds', '6', *sys.argv[1:]]\n"
        "runpy.run_module('benchmarks', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--out", str(tmp_path)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "no pictures: matplotlib is missing" in done.stdout
    assert len(results.load(tmp_path / "cpu.json")) == 6


def make(*words):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    inside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *words], cwd=ROOT, env=inside, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("bench", "ops penalties training"),
        ("bench-host", "host"),
        ("bench-systems", "systems"),
        ("bench-methods", "methods"),
    ],
)
def test_make_runs_the_suites(target, words):
    done = make("--dry-run", target, "ARGS=--rounds 60")
    assert f"-m benchmarks {words} --rounds 60\n" in done.stdout


def test_make_asks_a_gpu_with_the_python_at_hand_and_rehearses_with_its_own():
    words = "-m benchmarks gpu --device {} --budget {} --out '{}'\n"
    assert f"python3.x {words.format('cuda', 420, 'out/gpu')}" in make("--dry-run", "gpu", "PYTHON=python3.x").stdout
    done = make("--dry-run", "gpu", "DEVICE=cpu", "BUDGET=90", "OUT=a b")
    assert f".venv/bin/python {words.format('cpu', 90, 'a b')}" in done.stdout


@pytest.mark.parametrize("target", ["test-gpu", "gpu"])
def test_make_says_what_a_gpus_targets_need(target):
    done = make(target, f"PYTHON={sys.executable} -S")  # without what is installed beside it
    assert done.returncode != 0
    assert f"make {target} needs them beside {sys.executable} -S" in done.stderr


def test_the_documented_command_of_regressions_runs():
    """Of one case: `case` must be among the parameters that pytest-benchmark can group by."""
    pytest.importorskip("pytest_benchmark")
    from tests.benchmarks import test_speed

    command = next(line for line in test_speed.__doc__.splitlines() if "--benchmark-autosave" in line)
    words = [word for word in command.split("-m ")[1].split() if word != "--benchmark-autosave"]
    chosen = ["-k", "interpolation and forward and float32 and tidy and not penalty", "--benchmark-max-time=0.01"]
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key}  # or it times nothing
    done = subprocess.run(
        [sys.executable, "-m", *words, *chosen, "-p", "no:cacheprovider", "-p", "no:xdist"],
        check=False, capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "case=ops: interpolation, forward" in done.stdout
