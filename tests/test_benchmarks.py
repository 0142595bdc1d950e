"""What the benchmarks measure with, and the pages that are made of what they measured.

The benchmarks themselves are run, once each, by benchmarks/test_speed.py.
"""

import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as main
from benchmarks import (
    bandwidth,
    compare,
    intervals,
    measure,
    memory,
    provenance,
    report,
    results,
    tables,
    terminal,
    timing,
    traffic,
)
from benchmarks.cases import cases, quick
from benchmarks.ops import BOTH, OpCase
from benchmarks.ours import COMPILED, OURS, ours
from benchmarks.peers import COMPILED_CALL, COMPILED_OPS, PEERS, Absent, ctgan, snippet
from benchmarks.penalty import TWO_OPS
from benchmarks.training import NO_PENALTY

SMALL = OpCase(BOTH, (8, 12))


@pytest.mark.parametrize("count", [6, 7, 9, 24, 101])
def test_interval_of_the_median(count):
    samples = np.random.default_rng(count).standard_exponential(count)
    truth = pytest.importorskip("scipy.stats").quantile_test(samples, q=0, p=0.5).confidence_interval(0.95)
    found = intervals.median(list(samples))
    assert found == (np.median(samples), truth.low, truth.high)


def test_too_few_samples_have_no_interval():
    with pytest.raises(ValueError, match="6 samples, got 5"):
        intervals.median([1.0] * 5)


def test_the_byte_model_is_the_kernels_budget():
    """Elements read and written: the table of design, section 5."""
    assert traffic.INTERPOLATE == (2, 1)
    assert traffic.INTERPOLATE_BACKWARD == (1, 2)
    assert traffic.PENALTY == (1, 0)
    assert traffic.PENALTY_BACKWARD == (1, 1)
    assert traffic.PENALTY_DOUBLE_BACKWARD == (4, 1)
    assert OpCase(BOTH, (64, 784)).moved() == 6 * 64 * 784 * 4
    assert OpCase(BOTH, (64, 784), torch.float16).moved() == 6 * 64 * 784 * 2


@pytest.mark.parametrize("model", [traffic.Traffic(2, 1), traffic.Traffic(4, 2), traffic.Traffic(1, 0)])
def test_plain_copies_move_as_many_bytes(model):
    x = torch.randn(4, 10)
    copies = bandwidth.copies(x, model)()
    assert sum(2 * copy.numel() for copy in copies) == model.moved * x.numel()
    assert len({copy.data_ptr() for copy in [x, *copies]}) == 1 + len(copies)


def test_all_take_turns_in_changing_order():
    calls = []
    steps = {name: partial(calls.append, name) for name in "abc"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SHORTEST_TURN", 0)  # one step a turn
        number, turns = timing.interleaved(steps, "cpu", budget=0, rounds=40)
    assert number == dict.fromkeys("abc", 1)
    assert {name: len(found) for name, found in turns.items()} == dict.fromkeys("abc", 40)
    timed = calls[-120:]
    rounds = {tuple(timed[at : at + 3]) for at in range(0, 120, 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(rounds) > 1


def test_a_slow_step_is_not_repeated_for_a_fast_one():
    """Or the two ops beside a ResNet, which they are a thousandth of, would make `make bench` take hours."""
    slow = []
    steps = {"fast": lambda: None, "slow": lambda: (slow.append(1), time.sleep(2 * timing.SHORTEST_TURN))}
    number, _ = timing.interleaved(steps, "cpu", budget=0, rounds=6)
    assert number["fast"] > 100
    assert number["slow"] == 1
    assert len(slow) == 4 + 6  # four to see how long it takes


def test_one_busy_moment_does_not_make_a_fast_step_slow():
    calls = []
    step = lambda: (calls.append(1), time.sleep(5 * timing.SHORTEST_TURN if len(calls) == 2 else 0))  # noqa: E731
    number, _ = timing.interleaved({"fast": step}, "cpu", budget=0, rounds=6)
    assert number["fast"] > 10


def test_a_run_that_breaks_off_leaves_what_is_measured(tmp_path, monkeypatch):
    first, second = [case for case in cases("cpu") if case.key.startswith("op: penalty, forward (64, 784")] * 2
    measured = measure.measure

    def breaks(case, *more):
        if (tmp_path / "cpu.unfinished.json").exists():
            raise KeyboardInterrupt
        return measured(case, *more)

    monkeypatch.setattr(measure, "measure", breaks)
    monkeypatch.setattr(bandwidth, "copy_bandwidth", lambda device: 10.0)
    with pytest.raises(KeyboardInterrupt):
        main.run([first, second], "cpu", {"op": 0.0}, 6, tmp_path / "cpu.unfinished.json")
    found = results.load(tmp_path / "cpu.unfinished.json")
    assert {row["contestant"] for row in found} >= {OURS, "snippet", bandwidth.COPIES}
    assert all(row["machine"] for row in found)


def test_the_first_rounds_are_run_whatever_they_take():
    _, turns = timing.interleaved({"a": lambda: None}, "cpu", budget=0)
    assert len(turns["a"]) == timing.ROUNDS[0] >= intervals.LEAST


def entered(peer, name="a peer"):
    return measure.Gate(SMALL, "cpu").enter(name, lambda: peer)


def test_who_is_right_is_timed():
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
def test_who_is_wrong_is_not(wrong):
    step, row = entered(wrong)
    assert step is None
    assert row["failed"].startswith("Wrong: relative error")


def test_ours_may_not_be_wrong():
    with pytest.raises(measure.Wrong):
        entered(snippet.peer()._replace(norm_penalty=lambda g: 2 * snippet.norm_penalty(g)), OURS)


def test_who_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "ctgan.synthesizers.ctgan", None)
    with pytest.raises(Absent, match=r"needs the package ctgan \(pip install '\.\[peers\]'\)"):
        ctgan.peer()
    step, row = measure.Gate(SMALL, "cpu").enter("ctgan", ctgan.peer)
    assert step is None
    assert row["absent"].startswith("needs the package ctgan")


@pytest.fixture(scope="module")
def rows(one_thread):
    """Of a small case, measured."""
    contestants = {OURS: ours(), "snippet": PEERS["snippet"], "tidy": PEERS["tidy"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpCase, "contestants", lambda case: contestants)
        found = measure.measure(SMALL, "cpu", 0.0, 9, copy_gb_s=10.0)
    return [row | provenance.provenance("cpu") for row in found]


def test_every_row_says_where_it_is_from(rows):
    assert [row["contestant"] for row in rows] == [OURS, "snippet", "tidy", bandwidth.COPIES]
    for row in rows:
        assert row["machine"]
        assert row["commit"]
        assert f"torch {version('torch')}" in row["versions"]
        assert row["rounds"] == 9
        value, low, high = row["ms"]
        assert 0 < low <= value <= high
    assert "over fused_gp" not in rows[0]
    assert rows[1]["gb_s"] == pytest.approx(1e-6 * SMALL.moved() / rows[1]["ms"][0])


def test_rows_survive_the_file(rows, tmp_path):
    results.save(tmp_path / "cpu.json", rows)
    again = results.load(tmp_path / "cpu.json")
    assert json.loads((tmp_path / "cpu.json").read_text())["rows"] == again
    assert again[0]["ms"] == pytest.approx(rows[0]["ms"], rel=1e-3)


def test_the_snippets_ops_compiled_are_called_so():
    for case in cases("cpu"):
        compiled = {name for name in case.everybody() if "compiled" in name and not name.startswith(OURS)}
        assert compiled == ({COMPILED_CALL} if case.group != "op" else {COMPILED_OPS} if case.name == BOTH else set())


def test_tables_and_pictures_know_the_name(rows, tmp_path):
    path = tmp_path / "cpu.json"
    row = rows[1] | {"contestant": COMPILED_OPS, "over fused_gp": [0.5, 0.4, 0.6], "peak_mb": 1.0}
    results.save(path, [*rows, row])
    found = results.load(path)
    page = report.page(found, [], [])
    assert "snippet, compiled over fused_gp | 0.50 (0.40 to 0.60)" in page
    assert COMPILED_CALL not in page
    assert "| snippet, compiled | 0.50 (0.40 to 0.60) |" in report.numbers(found, [])
    if find_spec("matplotlib"):
        report.draw(path)
        assert path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([2.0, 1.9, 2.1], [1.7, 1.6, 1.8], "worse"),
        ([2.0, 1.9, 2.1], [2.4, 2.3, 2.5], "better"),
        ([2.0, 1.9, 2.1], [1.8, 1.7, 1.95], None),  # the intervals overlap
        ([2.0, 1.99, 2.01], [1.95, 1.94, 1.96], None),  # they do not, and it is less than 5 %
    ],
)
def test_what_changed_beyond_noise(rows, tmp_path, monkeypatch, before, after, said):
    files = []
    for name, values in (("a", before), ("b", after)):
        results.save(tmp_path / f"{name}.json", [rows[0], rows[1] | {"over fused_gp": values}])
        files.append(tmp_path / f"{name}.json")
    found = list(compare.changes(*map(results.load, files)))
    assert [(change.what, "better" if change.better else "worse") for change in found] == (
        [("over fused_gp", said)] if said else []
    )
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
    assert compare.main() == (said == "worse")


@pytest.mark.parametrize("what", ["over fused_gp", "device, over fused_gp"])
@pytest.mark.parametrize(
    ("contestant", "rises", "decides"),
    [
        *((peer, "better", True) for peer in PEERS),
        (COMPILED, "worse", False),
        ("fused_gp, chunks of 4", "worse", False),
        ("fused_gp, directional", "worse", False),
        (TWO_OPS, "worse", False),
        (NO_PENALTY, "better", False),  # the penalty is a smaller share
        (bandwidth.COPIES, "better", False),
    ],
)
def test_which_way_a_ratio_is_better(rows, tmp_path, monkeypatch, contestant, rises, decides, what):
    """A row's ratio is its contestant's time over ours: of a peer more is better, of one of ours less."""
    low, high = ([rows[0] | {"contestant": contestant, what: [at, at, at]}] for at in (0.5, 0.6))
    for before, after, said in ((low, high, rises), (high, low, "worse" if rises == "better" else "better")):
        (change,) = compare.changes(before, after)
        assert ("better" if change.better else "worse") == said
        files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
        for path, found in zip(files, (before, after), strict=True):
            results.save(Path(path), found)
        monkeypatch.setattr(sys, "argv", ["compare", *files])
        assert compare.main() == (decides and said == "worse")


@pytest.mark.parametrize(("contestant", "compared"), [(COMPILED_CALL, True), ("snippet", False), (OURS, False)])
def test_only_the_compiled_peer_is_compared_with_ours_compiled(rows, contestant, compared):
    """Or one change of our compiled call is listed once for every contestant."""
    before, after = (rows[0] | {"contestant": contestant, "over fused_gp, compiled": [at, at, at]} for at in (1.2, 1.0))
    assert [(change.better, change.decides) for change in compare.changes([before], [after])] == (
        [(False, True)] if compared else []
    )


def test_times_are_not_compared(rows):
    slower = {"ms": [9.0 * ms for ms in rows[1]["ms"]], "host_ms": [9.0] * 3, "device_ms": [9.0] * 3}
    assert not list(compare.changes([rows[1] | {"host_ms": [1.0] * 3, "device_ms": [1.0] * 3}], [rows[1] | slower]))


@pytest.mark.parametrize(("contestant", "decides"), [(OURS, True), (COMPILED, True), ("snippet", False)])
def test_peak_memory_is_compared_on_one_machine(rows, contestant, decides):
    before, after = (rows[0] | {"contestant": contestant, "peak_mb": peak} for peak in (50.0, 60.0))
    (change,) = compare.changes([before], [after])
    assert (change.what, change.better, change.decides) == ("peak_mb", False, decides)
    (change,) = compare.changes([after], [before])
    assert change.better
    assert not list(compare.changes([before], [after | {"machine": "another"}]))
    assert list(compare.changes([before | {"peak_mb": 0.0}], [after]))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.50"), (13.84, "13.84"), (1.0, "1.00"), (0.9967, "0.997"), (1.0042, "1.004"), (0.9996, "0.9996"),
        (0.99999, "1.0000"), (0.004266, "0.00427"), (0.09, "0.0900"),
    ],
)  # fmt: skip
def test_ratios_have_the_digits_that_matter(value, shown):
    assert tables.ratio(value) == shown


def test_who_is_timed_in_one_of_two_runs_only_is_told(rows):
    wrong = {name: value for name, value in rows[1].items() if name != "ms"} | {"failed": "Wrong: relative error 1"}
    note = compare.table([], [rows[0], rows[1]], [rows[0], wrong, rows[2]]).note
    where = f"{SMALL.group}, {SMALL.name} {list(SMALL.shape)} float32 on"
    assert (
        note == f"0 changes in 3 rows. Timed in A only: snippet at {where} cpu. Timed in B only: tidy at {where} cpu."
    )
    for other in ({"device": "cuda"}, {"group": "another"}):  # which `changes` does not compare either
        assert "in A only: snippet" in compare.table([], [rows[1]], [rows[1] | other]).note


def test_losses_are_told(rows):
    def with_ratio(found):
        return tables.contests([rows[0], rows[1] | {"over fused_gp": found}])

    assert [loss.peer for loss in tables.lost(with_ratio([0.9, 0.8, 0.99]))] == ["snippet"]
    assert not list(tables.lost(with_ratio([0.9, 0.8, 1.01])))
    page = report.page([rows[0], rows[1] | {"over fused_gp": [0.9, 0.8, 0.99]}], [], [])
    assert "snippet over fused_gp | 0.90 (0.80 to 0.99)" in page


def test_a_loss_says_who_is_held_to_whom_and_is_not_rounded_away(rows):
    """An interval that ends below 1 is not shown as one that ends there."""
    table = tables.losses(tables.contests([rows[0], rows[1] | {"over fused_gp": [0.98, 0.95, 0.9982]}]))
    assert table.rows[0][3] == "0.98 (0.95 to 0.998)"
    assert "A compiled call is held to ours compiled" in table.note


LARGE = {"shape": [64, 3, 256, 256], "over fused_gp": [0.98, 0.95, 0.998]}
VIT = {"group": "penalty", "case": "ViT", "shape": [4, 3, 64, 64], "ms": [170.0, 165.0, 180.0]}
STEP = {"group": "training step", "case": "MLP", "shape": [256, 2], "ms": [147.0, 146.0, 149.0]}


@pytest.mark.parametrize(
    ("row", "peer", "reason"),
    [
        (LARGE | {"case": "interpolation, forward"}, "tidy", "equal: both run the same operations"),
        (LARGE | {"case": "interpolation, forward"}, "TF-GAN", "not known"),
        (LARGE | {"case": "interpolation, forward", "over fused_gp": [0.7, 0.6, 0.8]}, "tidy", "not known"),
        (LARGE | {"case": "interpolation, forward", "device": "cuda"}, "tidy", "not known"),
        (LARGE | VIT, "torch.func", "equal: both run the same operations"),
        (LARGE | VIT, COMPILED_CALL, "not known"),
        (LARGE | STEP, "snippet", "small: "),
        (LARGE | STEP | {"ms": [522.0, 470.0, 530.0]}, "snippet", "equal: both run the same operations"),
    ],
)
def test_why_a_peer_wins(rows, row, peer, reason):
    row = rows[0] | row
    found = [
        row | {"contestant": contestant, "over fused_gp": ratio}
        for contestant, ratio in ((TWO_OPS, [0.004] * 3), (NO_PENALTY, [0.57] * 3), (peer, row["over fused_gp"]))
    ]
    (loss,) = tables.lost(tables.contests([row | {"contestant": OURS}, *found]))
    assert tables.why(loss).startswith(reason)


def test_first_calls_of_training_steps_are_not_told(rows):
    """They find the graphs of the penalties before them."""
    penalty, step = (rows[0] | {"group": group, "contestant": COMPILED} for group in ("penalty", "training step"))
    said = report.first_calls([penalty, step])
    assert "| penalty |" in said
    assert "| training step |" not in said
    assert "Each run begins with an empty cache" in said


def test_the_page_is_made_of_the_committed_runs():
    cpu, cuda, host = (results.committed(name) for name in ("cpu", "cuda", "host"))
    assert report.PAGE.read_text() == report.page(cpu, cuda, host), "python -m benchmarks.report writes it"
    assert report.README.read_text() == report.readme(report.README.read_text(), cpu, cuda)


def test_unmeasured_is_said_until_it_is_measured():
    measured = (results.COMMITTED / "cuda.json").exists()
    for path in (report.PAGE, report.README):
        assert (report.UNMEASURED in path.read_text()) is not measured


def test_a_gpus_run_takes_the_sentence_away(rows):
    assert report.UNMEASURED in report.page(rows, [], [])
    assert report.UNMEASURED in report.numbers(rows, [])
    on_device = [row | {"device": "cuda"} for row in rows]
    assert report.UNMEASURED not in report.page(rows, on_device, [])
    assert report.UNMEASURED not in report.numbers(rows, on_device)


def test_a_committed_run_is_the_whole_suite():
    for device in ("cpu", "cuda"):
        found = results.committed(device)
        if found:
            measured = {(row["group"], row["case"], tuple(row["shape"]), row["dtype"]) for row in found}
            suite = {(c.group, c.name, c.shape, str(c.dtype).removeprefix("torch.")) for c in cases(device)}
            assert measured == suite


def test_quick_is_a_part_of_the_suite():
    keys = {case.key for case in cases("cpu")}
    assert len(keys) == len(cases("cpu"))
    assert {case.key for case in quick("cpu")} < keys
    assert not any("compiled" in name for case in quick("cpu") for name in case.contestants())


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_in_a_process_of_its_own():
    """Of two tensors that are kept and nothing else: the interpolated samples and the gradients' gradients."""
    case = OpCase(BOTH, (64, 3, 64, 64))
    words = [sys.executable, "-m", "benchmarks.footprint", case.key, OURS]
    done = subprocess.run(words, env=os.environ | memory.ENVIRONMENT, check=True, capture_output=True, text=True)
    kept = 2e-6 * 4 * 64 * 3 * 64 * 64
    assert 0.9 * kept < float(done.stdout) < 1.3 * kept  # Linux counts resident pages in lots


def test_a_machine_without_extras_still_measures(tmp_path):
    """The JSON needs torch and numpy alone; who is missing is told."""
    program = (
        "import sys, runpy\n"
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "gone = ('rich', 'matplotlib')\n"
        "u.find_spec = lambda name, *more: None if name in gone else real(name, *more)\n"
        "for name in gone: sys.modules[name] = None\n"
        "sys.argv = ['benchmarks', '--only', 'penalty, forward (64, 784)', '--rounds', '6', *sys.argv[1:]]\n"
        "runpy.run_module('benchmarks', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--out", str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert "no pictures: matplotlib is missing" in done.stdout
    assert len(results.load(tmp_path / "cpu.json")) == 6


def test_where_there_is_nothing_to_draw_no_picture_is_left(rows, tmp_path, monkeypatch, capsys):
    """`--only 'penalty, forward'`: neither the two ops together nor a critic."""
    pytest.importorskip("matplotlib")

    def run(chosen, device, budget, rounds, unfinished):
        results.save(unfinished, [])
        return [row | {"case": "penalty, forward"} for row in rows]

    monkeypatch.setattr(main, "run", run)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # and what it was is put back
    words = ["benchmarks", "--only", "penalty, forward (64, 784)", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    (tmp_path / "cpu.png").write_bytes(b"an older run's")
    main.main()
    assert "no pictures: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


def test_the_two_ops_together_are_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib")
    results.save(tmp_path / "cpu.json", rows)
    report.draw(tmp_path / "cpu.json")
    assert (tmp_path / "cpu.png").exists()


def test_the_documented_command_of_regressions_runs():
    """Of one case: `case` must be among the parameters that pytest-benchmark can group by."""
    pytest.importorskip("pytest_benchmark")
    from benchmarks import test_speed

    command = next(line for line in test_speed.__doc__.splitlines() if "--benchmark-autosave" in line)
    words = [word for word in command.split("-m ")[1].split() if word != "--benchmark-autosave"]
    chosen = ["-k", "interpolation and forward and float32 and tidy and not penalty", "--benchmark-max-time=0.01"]
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key}  # or it times nothing
    done = subprocess.run(
        [sys.executable, "-m", *words, *chosen, "-p", "no:cacheprovider", "-p", "no:xdist"],
        check=False, capture_output=True, text=True, cwd=report.ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "case=op: interpolation, forward" in done.stdout


@pytest.mark.parametrize("rounds", ["5", "0", "-1"])
def test_too_few_rounds_are_refused_before_anything_is_measured(monkeypatch, capsys, rounds):
    monkeypatch.setattr(main, "run", None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--rounds", rounds])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert f"--rounds must be 6 or more, which an interval needs, got {rounds}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory"),
        ("nonsense", "has no rows as `python -m benchmarks` writes them"),
        ("[1]", "has no rows"),
        ('{"rows": {}}', "has no rows"),
        ('{"rows": ["a"]}', "has no rows"),
        ('{"rows": [{"group": "op"}]}', "has no rows"),
        ((results.COMMITTED / "cpu_methods.json").read_text(), "has no rows"),
        ((results.COMMITTED / "host.json").read_text(), "has no rows"),
    ],
)
def test_a_file_that_is_no_run_is_named(rows, tmp_path, monkeypatch, capsys, text, said):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    results.save(good, rows)
    if text is not None:
        bad.write_text(text)
    for files in ((good, bad), (bad, good)):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
        with pytest.raises(SystemExit, match="2"):
            compare.main()
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(bad) in error
        assert said in error


def test_runs_of_other_cases_are_not_said_to_be_the_same(rows, tmp_path, monkeypatch, capsys):
    for name, change in (("a", {}), ("b", {"shape": [3, 5]})):
        results.save(tmp_path / f"{name}.json", [row | change for row in rows])
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    assert "the two runs share no case" in capsys.readouterr().err


def shown(every, monkeypatch, capsys, columns=120):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal.show(every)
    return capsys.readouterr().out


def test_a_narrow_table_shows_intervals_and_a_wide_one_marks(rows, monkeypatch, capsys):
    narrow = tables.Table("T", "A note.", ["case", "ratio"], [["a", "1.05 (0.90 to 1.20)"]])
    out = shown([narrow], monkeypatch, capsys)
    assert "1.05 (0.90 to 1.20)" in out
    assert terminal.EXPLANATION not in out
    cells = ["1.05 (0.90 to 1.20)", "2.00 (1.70 to 2.20)", "2.00 (1.90 to 2.20)", "0.00427 (0.00420 to 0.00430)"]
    wide = narrow._replace(headings=["a heading"] * 8, rows=[cells * 2])
    out = " ".join(shown([wide], monkeypatch, capsys).split())
    assert "1.05~ 2.00~ 2.00 0.00427 " in out
    assert f"A note. {terminal.EXPLANATION}" in out


def test_nothing_is_cut_at_120_columns(monkeypatch, capsys):
    """Of the committed run: every heading and every cell is there, over one line or more."""
    for table in tables.tables(results.committed("cpu")):
        out = shown([table], monkeypatch, capsys)
        assert "\N{HORIZONTAL ELLIPSIS}" not in out
        assert max(map(len, out.splitlines())) <= 120
        fitted = terminal.fit(terminal.filled(table), 120)
        for at, width in enumerate(terminal.widths(fitted, 120)):
            assert all(len(word) <= width for row in fitted.rows for word in row[at].split())
        cells = [fitted.title, fitted.note, *fitted.headings, *(cell for row in fitted.rows for cell in row)]
        letters = "".join(out.split()).replace("\N{BOX DRAWINGS LIGHT HORIZONTAL}", "")
        assert sorted(letters) == sorted("".join("".join(cells).split()))


def test_columns_of_nothing_are_left_out_and_markup_is_not_read(monkeypatch, capsys):
    table = tables.Table("T", "", ["a", "empty", "b"], [["pip install '.[peers]'", "", "2"]])
    out = shown([table], monkeypatch, capsys)
    assert "'.[peers]'" in out
    assert "empty" not in out
    assert "before" in shown([compare.table([], [], [])], monkeypatch, capsys)  # headings of no rows stay


def test_a_quick_run_says_what_it_leaves_out(rows, tmp_path, monkeypatch, capsys):
    def run(chosen, device, budget, rounds, unfinished):
        results.save(unfinished, [])
        return rows

    monkeypatch.setattr(main, "run", run)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--out", str(tmp_path)])
    main.main()
    assert "--quick leaves out what has to be compiled" in capsys.readouterr().out
