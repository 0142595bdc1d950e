"""The benchmarks that only print: what they refuse, what they print, and what they write where --json says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import host, methods, results, systems, timing

ROOT = Path(__file__).parent.parent
ABOUT = {"device", "machine", "versions", "commit", "date", "load"}


@pytest.fixture
def run(monkeypatch, one_thread):
    def run(program, *words):
        monkeypatch.setattr(sys, "argv", [program.__name__, *words])
        program.main()

    return run


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        (systems, ["--only", "nosuch"], "--only: no system has 'nosuch' in its name: WGAN-GP, eps; Improved WGAN; "),
        (systems, ["--only", "R1", "--rounds", "1"], "--rounds must be at least 2, for a spread, got 1"),
        (systems, ["--only", "R1", "--rounds", "0"], "--rounds must be at least 2, for a spread, got 0"),
        (host, ["--rounds", "1"], "--rounds must be at least 2, for a spread, got 1"),
        (methods, ["--rounds", "1"], "--rounds must be at least 2, for a spread, got 1"),
        (methods, ["--device", "cuda"], "--device cuda needs a CUDA or ROCm device, and torch finds none"),
        (systems, ["--device", "cuda"], "--device cuda needs a CUDA or ROCm device, and torch finds none"),
    ],
)
def test_wrong_arguments_are_named(run, monkeypatch, capsys, program, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run(program, *words)
    assert said in capsys.readouterr().err


@pytest.fixture
def small_methods(monkeypatch):
    """Two critics of a layer each; no process is started for their memory."""
    small = methods.Critic(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 1), nn.Tanh()), 2, ({},))
    monkeypatch.setattr(methods, "CRITICS", {"vit": small, "conv": small})
    monkeypatch.setattr(methods, "peak", lambda *call: 1.0)


@pytest.mark.parametrize(("critic", "growth"), [("vit", len(methods.GROWTH)), ("conv", 0)])
def test_methods(run, small_methods, tmp_path, capsys, critic, growth):
    """Memory against batch is the ViT's; each stage is told; each row says where it is from."""
    run(methods, "--critic", critic, "--rounds", "2", "--json", str(tmp_path / "new" / "methods.json"))
    printed = capsys.readouterr().out
    for stage in (
        "error, the lines by hand",
        "first call, double_backward",
        "a round of all",
        "memory, double_backward",
    ):
        assert f"/2 {critic}: {stage}\n" in printed
    assert ("memory against batch" in printed) == bool(growth)
    found = json.loads((tmp_path / "new" / "methods.json").read_text())
    assert [row["method"] for row in found["results"]] == [methods.PEER, "double_backward"]
    assert len(found["growth"]) == growth
    assert all(row.keys() > ABOUT for row in [*found["results"], *found["growth"]])


def test_systems(run, tmp_path, capsys):
    run(systems, "--only", "StyleGAN R1", "--rounds", "2", "--size", "tiny", "--json", str(tmp_path / "systems.json"))
    (row,) = json.loads((tmp_path / "systems.json").read_text())["results"]
    assert row.keys() > ABOUT
    printed = capsys.readouterr().out
    assert "1/1 StyleGAN R1, tiny\n" in printed
    for peer in systems.PEERS:
        ratio, low, high = (row[f"{peer}_ratio{which}"] for which in ("", "_low", "_high"))
        assert low <= ratio <= high
        assert f"{ratio:.2f} ({low:.2f} to {high:.2f})" in printed  # of this system
        assert f"{ratio:.2f} to {ratio:.2f}" in printed  # from the least to the most of one system


def test_ratios_to_both_peers_are_taken_round_by_round(monkeypatch):
    case = systems.ROWS[0]
    seconds = {case.ours: [1.0, 2.0, 3.0], case.usual: [9.0, 2.0, 6.0], case.tidy: [0.5, 6.0, 1.5]}
    monkeypatch.setattr(timing, "seconds", lambda step, device, steps: seconds[step.args[0]].pop(0))
    row = systems.measure(case, "tiny", "cpu", 3)
    assert (row["ours_ms"], row["usual_ms"], row["tidy_ms"]) == (2e3, 6e3, 1.5e3)
    assert row["usual_ratio"] == 2.0  # of 9, 1 and 2; that of the medians is 3
    assert row["tidy_ratio"] == 0.5  # of 0.5, 3 and 0.5; that of the medians is 0.75


def test_the_readmes_table_of_systems_is_the_printed_one():
    rows = [{"size": size, "usual_ratio": 1.0, "tidy_ratio": 1.0} for size in systems.SHAPES]
    table = systems.from_least_to_most(rows)
    lines = (ROOT / "README.md").read_text().splitlines()
    at = lines.index("|" + "|".join(f" {column.header} " if column.header else " " for column in table.columns) + "|")
    written = [line.split("|")[1].strip() for line in lines[at + 2 : at + 2 + len(table.rows)]]
    assert written == list(table.columns[0].cells)
    assert any(f"times a step of {len(systems.ROWS)} penalties" in line for line in lines)


def test_host(tmp_path):
    """In a process of its own, where the kernels are compiled."""
    words = [sys.executable, "-m", "benchmarks.host", "--rounds", "2", "--json", str(tmp_path / "host.json")]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(words, cwd=ROOT, env=compiled, check=True, capture_output=True, text=True)
    assert "1/5 sm_90: interpolation\n" in done.stdout
    assert all(row.keys() > ABOUT for row in results.load(tmp_path / "host.json"))


def make(*words):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    inside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *words], cwd=ROOT, env=inside, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["bench-host", "bench-systems", "bench-methods"])
def test_make_only_prints(target):
    done = make("--dry-run", target, "ARGS=--rounds 60")
    assert f"-m benchmarks.{target.removeprefix('bench-')} --rounds 60\n" in done.stdout
    assert "--json" not in done.stdout
    assert "benchmarks.report" not in done.stdout


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_make_says_what_a_gpus_targets_need(target):
    done = make(target, f"PYTHON={sys.executable} -S")  # without what is installed beside it
    assert done.returncode != 0
    assert f"make {target} needs them beside {sys.executable} -S" in done.stderr
