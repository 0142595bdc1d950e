"""The rows' file, and the tables, pictures and pages that are made of rows."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.names import (
    COMPILED,
    COMPILED_CALL,
    COMPILED_OPS,
    NO_PENALTY,
    OURS,
    SNIPPET,
    TIDY,
    TWO_OPS,
    USUAL,
    is_ours,
    is_peer,
)
from benchmarks.peers import PEERS
from benchmarks.report import case_rows, page, readme, slower_cases, tables
from benchmarks.report.case_rows import by_case
from tests.support.small_run import SMALL, small_run

NOTHING = {name: [] for name in results.committed()}


@pytest.fixture(scope="module")
def rows(one_thread):
    return small_run()


def page_of(rows, **devices):
    return page.page(NOTHING | {"cpu": rows}, devices)


def test_a_file_is_there_as_a_whole_at_every_moment(rows, tmp_path, monkeypatch):
    """Also while the next one is being written."""
    results.save(tmp_path / "cpu.json", rows[:1])
    monkeypatch.setattr(Path, "replace", None)
    with pytest.raises(TypeError):
        results.save(tmp_path / "cpu.json", rows)
    assert len(results.load(tmp_path / "cpu.json")) == 1


def test_rows_survive_the_file(rows, tmp_path):
    results.save(tmp_path / "cpu.json", rows)
    again = results.load(tmp_path / "cpu.json")
    assert json.loads((tmp_path / "cpu.json").read_text())["rows"] == again
    assert again[0]["ms"] == pytest.approx(rows[0]["ms"], rel=1e-3)


def test_tables_and_pictures_know_the_name(rows, tmp_path):
    path = tmp_path / "cpu.json"
    row = rows[1] | {"implementation": COMPILED_OPS, "over fused_gp": [0.5, 0.4, 0.6], "peak_mb": 1.0}
    results.save(path, [*rows, row])
    found = results.load(path)
    text = page_of(found)
    assert "snippet, compiled over fused_gp | 0.50 (0.40 to 0.60)" in text
    assert COMPILED_CALL not in text
    assert "| snippet, compiled | 0.50 (0.40 to 0.60) |" in readme.numbers(found, {})
    if find_spec("matplotlib"):
        page.draw(path)
        assert path.with_suffix(".png").exists()


def test_every_peer_is_one_by_its_name_and_has_a_colour():
    pytest.importorskip("matplotlib")
    from benchmarks.report import pictures

    assert all(is_peer(name) and not is_ours(name) for name in [*PEERS, USUAL, TIDY])
    assert list(pictures.PEERS) == list(PEERS)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.50"), (13.84, "13.84"), (1.0, "1.00"), (0.9967, "0.997"), (1.0042, "1.004"), (0.9996, "0.9996"),
        (0.99999, "1.0000"), (0.004266, "0.00427"), (0.09, "0.0900"),
    ],
)  # fmt: skip
def test_ratios_have_the_digits_that_matter(value, shown):
    assert case_rows.ratio(value) == shown


def test_a_ratio_turned_round_keeps_its_interval_in_order():
    assert case_rows.inverse([0.5, 0.4, 0.8]) == [2.0, 1.25, 2.5]
    assert case_rows.inverse(0.5) == 2.0
    assert case_rows.interval(2.0) == "2.00"  # of a run without intervals


def test_losses_are_listed(rows):
    def with_ratio(found):
        return by_case([rows[0], rows[1] | {"over fused_gp": found}])

    assert [slower.peer for slower in slower_cases.slower_cases(with_ratio([0.9, 0.8, 0.99]))] == ["snippet"]
    assert not list(slower_cases.slower_cases(with_ratio([0.9, 0.8, 1.01])))
    assert "snippet over fused_gp | 0.90 (0.80 to 0.99)" in page_of(
        [rows[0], rows[1] | {"over fused_gp": [0.9, 0.8, 0.99]}]
    )


def test_a_loss_says_what_is_compared_and_is_not_rounded_away(rows):
    """An interval that ends below 1 is not shown as one that ends there."""
    table = tables.where_a_peer_wins(by_case([rows[0], rows[1] | {"over fused_gp": [0.98, 0.95, 0.9982]}]))
    assert table.rows[0][3] == "0.98 (0.95 to 0.998)"
    assert "A compiled call is compared with ours compiled" in table.note


def test_a_loss_to_a_compiled_peer_is_not_hidden_where_ours_failed_to_compile(rows):
    peer = rows[1] | {"implementation": COMPILED_CALL, "over fused_gp": [0.5, 0.4, 0.6]}
    for ours in ([], [{**SMALL.about, "implementation": COMPILED, "failed": "Wrong", "device": "cpu"}]):
        (slower,) = slower_cases.slower_cases(by_case([rows[0], peer, *ours]))
        assert (slower.peer, slower.over) == (COMPILED_CALL, OURS)


LARGE = {"shape": [64, 3, 256, 256], "over fused_gp": [0.98, 0.95, 0.998]}
VIT = {"suite": "penalties", "case": "ViT", "shape": [4, 3, 64, 64], "ms": [170.0, 165.0, 180.0]}
STEP = {"suite": "training", "case": "MLP", "shape": [256, 2], "ms": [147.0, 146.0, 149.0]}


@pytest.mark.parametrize(
    ("row", "peer", "reason"),
    [
        (LARGE | {"case": "interpolation, forward"}, "tidy", "equal: both run the same operations"),
        (LARGE | {"case": "interpolation, forward"}, "TF-GAN", "not known"),
        (LARGE | {"case": "interpolation, forward", "over fused_gp": [0.7, 0.6, 0.8]}, "tidy", "not known"),
        (
            LARGE | {"case": "interpolation, forward", "device": "cuda", "device, over fused_gp": [0.9] * 3},
            "tidy",
            "not known",
        ),
        (LARGE | VIT, "torch.func", "equal: both run the same operations"),
        (LARGE | VIT, COMPILED_CALL, "not known"),
        (LARGE | STEP, "snippet", "small: "),
        (LARGE | STEP | {"ms": [522.0, 470.0, 530.0]}, "snippet", "equal: both run the same operations"),
    ],
)
def test_why_a_peer_wins(rows, row, peer, reason):
    row = rows[0] | row
    found = [
        row | {"implementation": name, "over fused_gp": ratio}
        for name, ratio in ((TWO_OPS, [0.004] * 3), (NO_PENALTY, [0.57] * 3), (peer, row["over fused_gp"]))
    ]
    (slower,) = slower_cases.slower_cases(by_case([row | {"implementation": OURS}, *found]))
    assert slower_cases.why(slower).startswith(reason)


def test_first_calls_of_training_steps_are_not_listed(rows):
    """They find the graphs of the penalties before them."""
    penalty, step = (rows[0] | {"suite": suite, "implementation": COMPILED} for suite in ("penalties", "training"))
    table = page.first_calls([penalty, step])
    assert [row[0] for row in table.rows] == ["penalties"]
    assert "Each run begins with an empty cache" in table.note


METHODS = [
    {"implementation": SNIPPET, "ms": [8.0, 7.0, 9.0], "peak_mb": 100.0},
    {"implementation": OURS, "ms": [9.0, 8.0, 10.0], "over snippet": [1.25, 1.0, 1.6], "peak_mb": 90.0},
    {"implementation": "fused_gp, chunks of 2", "ms": [4.0] * 3, "over snippet": [0.5] * 3, "peak_mb": 25.0},
    {"implementation": "fused_gp, compiled, chunks of 2", "ms": 4.0, "over snippet": 0.5, "peak_mb": 25.0},
]


def test_methods_are_shown_by_name_against_the_snippet():
    case = {"suite": "methods", "case": "ViT", "shape": [8, 3, 64, 64], "dtype": "float32"}
    more = {"fresh_mb": 7.0, "gradient_error": 1.2e-7, "bf16_gradient_error": 3.4e-3}
    table, growth = tables.methods(by_case([case | row | more for row in METHODS]))
    assert not growth.rows
    assert [row[:5] for row in table.rows] == [
        ["snippet", "8", "", "100", "100 %"],
        ["double_backward", "9", "0.80 (0.62 to 1.00)", "90", "90 %"],
        ["double_backward, chunks of 2", "4", "2.00 (2.00 to 2.00)", "25", "25 %"],
        ["compiled, chunks of 2", "4", "2.00", "25", "25 %"],
    ]
    assert all(row[5:] == ["7", "1.2e-07", "3.4e-03"] for row in table.rows)


def test_memory_against_batch_is_shown_of_what_is_measured_for_it_alone():
    case = {"suite": "methods", "case": "ViT", "dtype": "float32"}
    at = [case | row | {"shape": [8, 3, 64, 64]} for row in METHODS]
    alone = [case | {"shape": [2, 3, 64, 64], "implementation": SNIPPET, "peak_mb": 26.0}]
    _, table = tables.methods(by_case([*at, *alone]))
    assert table.headings == ["batch", "2", "8"]
    assert table.rows == [["ViT, snippet", "26", "100"]]


def test_systems_are_shown_one_by_one_and_from_the_least_to_the_most():
    case = {"suite": "systems", "shape": [64, 2], "dtype": "float32"}
    rows = [
        case | {"case": name, "implementation": peer, "over fused_gp": [ratio, ratio - 0.1, ratio + 0.1]}
        for name, ratio in (("first", 0.9), ("second", 1.2))
        for peer in (USUAL, TIDY)
    ]  # fmt: skip
    one_by_one, extremes = tables.systems(by_case(rows))
    assert [row[-2:] for row in one_by_one.rows] == [
        ["0.90 (0.80 to 1.00)"] * 2, ["1.20 (1.10 to 1.30)"] * 2,
    ]  # fmt: skip
    assert extremes.rows == [["64 points of a plane, two hidden layers of 64", *["0.90 to 1.20"] * 2]]


def test_the_pages_are_made_of_the_committed_runs():
    runs = results.committed()
    devices = page.committed_devices()
    assert page.PAGE.read_text() == page.page(runs, devices), "python -m benchmarks report writes it"
    assert page.README.read_text() == readme.readme(page.README.read_text(), runs, devices)


def test_the_readme_has_no_number_of_a_run_but_between_markers():
    runs = results.committed()
    assert readme.readme(page.README.read_text(), NOTHING, {}).count(readme.UNMEASURED_HERE) == 2
    for name in ("methods", "systems"):
        changed = readme.readme(page.README.read_text(), runs | {f"cpu_{name}": []}, {})
        assert changed.split(readme.begin(name))[1].split(readme.END)[0].strip() == readme.UNMEASURED_HERE.strip()


def test_what_is_unmeasured_is_said_until_it_is_measured():
    measured = bool(results.devices())
    for path in (page.PAGE, page.README):
        assert (readme.UNMEASURED in path.read_text()) is not measured


def test_the_two_ops_together_are_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib")
    results.save(tmp_path / "cpu.json", rows)
    page.draw(tmp_path / "cpu.json")
    assert (tmp_path / "cpu.png").exists()
