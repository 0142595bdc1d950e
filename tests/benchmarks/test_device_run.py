"""From what `python -m benchmarks gpu` has left to the committed run, its page, its pictures and the README's table."""

import json

import pytest
import torch

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.names import BOTH, GRAPH, OURS, RUN, SNIPPET, TODAY
from benchmarks.report import device_run, page, readme

ABOUT = {
    "device": "cuda", "machine": "NVIDIA H100 80GB HBM3", "versions": "torch 2.11.0", "commit": "abc",
    "date": "2026-12-01", "load": 0.1, "driver": "580", "budget_s": 420.0, "started": "now",
}  # fmt: skip


def case(suite, name, shape, implementation, **row):
    about = {"suite": suite, "case": name, "shape": shape, "dtype": "float32", "implementation": implementation}
    timed = (
        {"host_ms": [0.1] * 3, "device_ms": [0.2] * 3, "launches": 3, "busy_ms": 0.15, "peak_mb": 7.0}
        if "ms" in row
        else {}
    )
    return ABOUT | about | timed | row


OPS = [
    case("ops", BOTH, [64, 784], OURS, ms=[2.0] * 3, bytes=600, gb_s=2700.0, copy_gb_s=3000.0, error=1e-7),
    case(
        "ops",
        BOTH,
        [64, 784],
        SNIPPET,
        ms=[6.0] * 3,
        **{"over fused_gp": [9.0] * 3, "device, over fused_gp": [3.0, 2.9, 3.1]},
    ),
]
WAYS = {SNIPPET: 20.0, OURS: 10.0, "fused_gp, chunks of 4": 8.0, "fused_gp, directional": 4.0}
PENALTIES = [
    case(
        "penalties", "MLP", [8, 6], name, ms=[ms] * 3, **{"over snippet": [ms / 20] * 3, "over fused_gp": [ms / 10] * 3}
    )
    for name, ms in WAYS.items()
]
PENALTIES.append(case("penalties", "MLP", [8, 6], GRAPH, absent="does not exist yet"))
EXPERIMENTS = [
    case("experiments", "tiles: penalty", [8, 6], TODAY, ms=[1.0] * 3),
    case("experiments", "tiles: penalty", [8, 6], "4 kB", ms=[0.9] * 3, **{"device, over as today": [0.91, 0.9, 0.92]}),
]
FAILED = {
    "test": "tests/device/test_a.py::test_b[x]",
    "outcome": "failed",
    "seconds": 1.0,
    "message": "E  at (1, 2): 3 != 4",
}
TESTS = [{"collected": 3}, {"test": "t", "outcome": "passed", "seconds": 2.0}, FAILED]
PHASES = [{"phase": "device", "title": "the device", "state": "done", "seconds": 9.0}]


def leave(folder, dry=False, ops=OPS, penalties=PENALTIES, experiments=EXPERIMENTS, tests=TESTS):
    """The files of a run."""
    results.save(folder / RUN, PHASES, **ABOUT, dry_run=dry)
    parity = [case("parity", "penalty, forward", [2, 3], OURS, failed="Wrong: 0.3")]
    results.save(folder / "device.json", parity, **ABOUT, copy_gb_s=3000.0, clocks={"clocks.sm": "1980 MHz"})
    for name, rows in (("ops", ops), ("penalties", penalties), ("experiments", experiments)):
        if rows:
            results.save(folder / f"{name}.json", rows, planned=["a", f"{name}: b"], ended=["a"])
    if tests:
        (folder / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tests))
    return folder


@pytest.fixture
def committed(monkeypatch, tmp_path):
    """In place of the repository's."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("cpu", "cpu_methods", "cpu_systems", "host"):
        (folder / f"{name}.json").write_text((results.COMMITTED / f"{name}.json").read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(page.README.read_text())
    monkeypatch.setattr(results, "COMMITTED", folder)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "docs" / "benchmarks.md")
    monkeypatch.setattr(page, "README", tmp_path / "README.md")
    return folder


def test_a_devices_run_is_committed_by_its_name(committed, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["report", str(leave(tmp_path / "run"))]) == 0
    assert list(results.devices()) == ["nvidia_h100_80gb_hbm3"]
    assert (committed / "nvidia_h100_80gb_hbm3.png").exists()
    again = device_run.saved(results.devices()["nvidia_h100_80gb_hbm3"])
    assert again == device_run.load(tmp_path / "run")
    text = page.PAGE.read_text()
    assert "## NVIDIA H100 80GB HBM3\n" in text
    assert "../benchmarks/results/nvidia_h100_80gb_hbm3.png" in text
    assert "| MLP 8 x 6 | fused_gp, chunks of 4 | 8 | 2.50 (2.50 to 2.50) | 0.2 | 3 | 0.15 | 7 |" in text
    assert "| penalty | 8 x 6 | as today | 200 | 0.91 (0.90 to 0.92) | 3 / 3 |" in text
    assert "| fused_gp, CUDA graph |  | does not exist yet |" in text
    assert "1 passed, 1 failed and 0 were skipped, of 3." in text
    assert "| tests/device/test_a.py::test_b[x] | at (1, 2): 3 != 4 |" in text
    assert "| penalty, forward [2, 3] float32 | Wrong: 0.3 |" in text
    assert "90 %" in text
    assert "| penalties: b |" in text  # not reached
    assert readme.UNMEASURED not in text
    said = page.README.read_text()
    assert readme.UNMEASURED not in said
    assert "Measured on NVIDIA H100 80GB HBM3 (torch 2.11.0, commit abc)" in said
    assert "the peer's time on the device divided by ours" in said
    assert "| 64 x 784 | 3.00 (2.90 to 3.10) | snippet | 3.00 (2.90 to 3.10) |" in said
    assert "| MLP 8 x 6 | 20 | 7 | fused_gp, chunks of 4 | 8 | 7 | 2.50 (2.50 to 2.50) |" in said
    # Another run of the device takes its place only where that is said.
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path / "run")])
    assert main(["report", "--replace", str(tmp_path / "run")]) == 0
    # Without a folder it is written again from what is committed.
    assert main(["report"]) == 0
    assert (page.PAGE.read_text(), page.README.read_text()) == (text, said)


def test_a_rehearsal_is_marked_and_not_committed(committed, tmp_path):
    pytest.importorskip("matplotlib")
    before = {path: path.read_bytes() for path in [*committed.iterdir(), page.README]}
    assert main(["report", str(leave(tmp_path / "run", dry=True))]) == 0
    assert {path: path.read_bytes() for path in [*committed.iterdir(), page.README]} == before
    assert not page.PAGE.exists()
    made = tmp_path / "run" / "report"
    assert sorted(path.name for path in made.iterdir()) == [
        "README.md",
        "benchmarks.md",
        "rehearsal.json",
        "rehearsal.png",
    ]
    for name in ("README.md", "benchmarks.md"):
        assert (made / name).read_text().startswith("**This is a rehearsal of `make gpu` on a CPU")
    assert "![The tables below as pictures](rehearsal.png)" in (made / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    "missing", [{}, {"ops": []}, {"penalties": []}, {"experiments": []}, {"tests": []}, "all"], ids=str
)
def test_a_run_that_was_cut_off_still_makes_a_page(committed, tmp_path, missing):
    nothing = {"ops": [], "penalties": [], "experiments": [], "tests": []}
    folder = leave(tmp_path / "run", **(nothing if missing == "all" else missing))
    if missing == "all":
        (folder / "device.json").unlink()
    assert main(["report", str(folder)]) == 0
    assert "## NVIDIA H100 80GB HBM3\n" in page.PAGE.read_text()
    assert device_run.summary(device_run.load(folder))


DIED = {name: value for name, value in OPS[0].items() if name in case("ops", BOTH, [64, 784], OURS)} | {
    "failed": "died"
}


@pytest.mark.parametrize(
    "rows",
    [
        {"ops": [DIED]}, {"ops": [DIED, OPS[1]]}, {"ops": OPS[1:]}, {"ops": [DIED], "penalties": [DIED]},
        {"penalties": PENALTIES[1:]}, {"penalties": PENALTIES[-1:]}, {"experiments": EXPERIMENTS[1:]},
        {"tests": [FAILED | {"message": ""}]},
    ],
    ids=["died", "ours died", "without ours", "all died", "without by hand", "planned", "without today", "silent"],
)  # fmt: skip
def test_a_run_in_which_something_failed_still_makes_a_page(committed, tmp_path, rows):
    pytest.importorskip("matplotlib")
    folder = leave(tmp_path / "run", **rows)
    assert main(["report", str(folder)]) == 0
    assert "## NVIDIA H100 80GB HBM3\n" in page.PAGE.read_text()
    assert device_run.summary(device_run.load(folder))


def test_the_summary_says_what_failed_and_the_first_numbers(tmp_path):
    said = device_run.summary(device_run.load(leave(tmp_path)))
    for part in [
        "NVIDIA H100 80GB HBM3; torch 2.11.0", "device           9 s  done", "ops that are right: 0 of 1",
        "WRONG penalty, forward [2, 3] float32: Wrong: 0.3", "tests: 1 passed, 1 failed, 0 skipped, of 3",
        "90 % of copying; snippet / ours 3.00 (2.90 to 3.10)", "left out: fused_gp, CUDA graph, does not exist yet",
        "FAILED tests/device/test_a.py::test_b[x]", "E  at (1, 2): 3 != 4",
    ]:  # fmt: skip
        assert part in said
    assert "REHEARSAL" not in said
    assert "REHEARSAL on a CPU, no measurement" in device_run.summary(device_run.load(leave(tmp_path, dry=True)))


def test_a_devices_suites_are_not_committed_by_themselves(monkeypatch, tmp_path, capsys):
    """But by `report`, together with the rest of its run."""
    from benchmarks import __main__

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results, "COMMITTED", tmp_path / "committed")
    monkeypatch.setattr(results, "UNCOMMITTED", tmp_path / "out")
    monkeypatch.setattr(page, "write", None)

    def run(cases, device, budget, rounds, unfinished):
        results.save(unfinished, [])
        return OPS

    monkeypatch.setattr(__main__.runner, "run", run)
    main(["ops", "penalties", "training", "--device", "cuda"])
    assert (tmp_path / "out" / "cuda.json").exists()
    assert not (tmp_path / "committed").exists()


def test_hundreds_of_failures_do_not_hide_the_rest(tmp_path):
    """Of a terminal's output the last 12,000 characters may be all that is kept."""
    many = [FAILED | {"test": f"t{at}", "message": "x" * 5000} for at in range(300)]
    end = device_run.summary(device_run.load(leave(tmp_path, tests=many)))[-12000:]
    for part in ("FAILED t0\n", "FAILED t30\n", "and 260 tests more", "300 failed", "of copying", "9 s  done"):
        assert part in end
