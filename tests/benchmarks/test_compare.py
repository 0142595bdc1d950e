"""`python -m benchmarks compare`: what changed between two runs."""

import pytest

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.names import (
    COMPILED,
    COMPILED_CALL,
    COPIES,
    EMPTY_FUNCTIONS,
    NO_PENALTY,
    OURS,
    SNIPPET,
    TIDY,
    TWO_OPS,
    USUAL,
)
from benchmarks.peers import PEERS
from benchmarks.report import compare
from tests.support.small_run import SMALL, small_run


@pytest.fixture(scope="module")
def rows(one_thread):
    return small_run()


@pytest.fixture
def status(tmp_path):
    """Of the command, for two runs."""

    def status(before, after):
        for name, found in (("a", before), ("b", after)):
            results.save(tmp_path / f"{name}.json", found)
        return main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])

    return status


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([2.0, 1.9, 2.1], [1.7, 1.6, 1.8], "worse"),
        ([2.0, 1.9, 2.1], [2.4, 2.3, 2.5], "better"),
        ([2.0, 1.9, 2.1], [1.8, 1.7, 1.95], None),  # the intervals overlap
        ([2.0, 1.99, 2.01], [1.95, 1.94, 1.96], None),  # they do not, and it is less than 5 %
        (2.0, [1.7, 1.6, 1.8], "worse"),  # a run that has no intervals
        (2.0, [1.7, 1.6, 2.0], None),
    ],
)
def test_what_changed_beyond_noise(rows, status, before, after, said):
    first, second = ([rows[0], rows[1] | {"over fused_gp": values}] for values in (before, after))
    found = list(compare.changes(first, second))
    assert [(change.what, "better" if change.better else "worse") for change in found] == (
        [("over fused_gp", said)] if said else []
    )
    assert status(first, second) == (said == "worse")


@pytest.mark.parametrize("what", ["over fused_gp", "device, over fused_gp"])
@pytest.mark.parametrize(
    ("implementation", "rises", "decides"),
    [
        *((peer, "better", True) for peer in [*PEERS, USUAL]),
        (COMPILED, "worse", False),
        ("fused_gp, chunks of 4", "worse", False),
        ("fused_gp, directional", "worse", False),
        (TWO_OPS, "worse", False),
        (NO_PENALTY, "better", False),  # the penalty is a smaller share
        (COPIES, "better", False),
    ],
)
def test_which_way_a_ratio_is_better(rows, status, implementation, rises, decides, what):
    """A row's ratio is its implementation's time over ours: of a peer more is better, of one of ours less."""
    low, high = ([rows[0] | {"implementation": implementation, what: [at, at, at]}] for at in (0.5, 0.6))
    for before, after, said in ((low, high, rises), (high, low, "worse" if rises == "better" else "better")):
        (change,) = compare.changes(before, after)
        assert ("better" if change.better else "worse") == said
        assert status(before, after) == (decides and said == "worse")


@pytest.mark.parametrize("implementation", [OURS, COMPILED, "fused_gp, chunks of 2"])
def test_ours_over_a_peer_should_fall(rows, status, implementation):
    """As the methods and the host have it."""
    low, high = ([rows[0] | {"implementation": implementation, "over snippet": [at, at, at]}] for at in (0.5, 0.6))
    assert (status(low, high), status(high, low)) == (1, 0)


def test_a_baseline_is_not_compared_with_a_peer(rows):
    low, high = ([rows[0] | {"implementation": EMPTY_FUNCTIONS, f"over {SNIPPET}": at}] for at in (0.5, 0.6))
    assert not list(compare.changes(low, high))


@pytest.mark.parametrize(("implementation", "compared"), [(COMPILED_CALL, True), ("snippet", False), (OURS, False)])
def test_only_the_compiled_peer_is_compared_with_ours_compiled(rows, implementation, compared):
    """Or one change of our compiled call is listed once for every implementation."""
    before, after = (
        rows[0] | {"implementation": implementation, "over fused_gp, compiled": [at, at, at]} for at in (1.2, 1.0)
    )
    assert [(change.better, change.decides) for change in compare.changes([before], [after])] == (
        [(False, True)] if compared else []
    )


def test_times_are_not_compared(rows):
    slower = {"ms": [9.0 * ms for ms in rows[1]["ms"]], "host_ms": [9.0] * 3, "device_ms": [9.0] * 3, "fresh_mb": 9.0}
    before = rows[1] | {"host_ms": [1.0] * 3, "device_ms": [1.0] * 3, "fresh_mb": 1.0}
    assert not list(compare.changes([before], [rows[1] | slower]))


@pytest.mark.parametrize(("implementation", "decides"), [(OURS, True), (COMPILED, True), ("snippet", False)])
def test_peak_memory_is_compared_on_one_machine(rows, implementation, decides):
    before, after = (rows[0] | {"implementation": implementation, "peak_mb": peak} for peak in (50.0, 60.0))
    (change,) = compare.changes([before], [after])
    assert (change.what, change.better, change.decides) == ("peak_mb", False, decides)
    (change,) = compare.changes([after], [before])
    assert change.better
    assert not list(compare.changes([before], [after | {"machine": "another"}]))
    assert list(compare.changes([before | {"peak_mb": 0.0}], [after]))


def test_what_is_timed_in_one_of_two_runs_only_is_listed(rows):
    wrong = {name: value for name, value in rows[1].items() if name != "ms"} | {"failed": "Wrong: relative error 1"}
    case = f"ops: {SMALL.name} 8 x 12 float32 on cpu"
    before, after = [rows[0], rows[1]], [rows[0], wrong, rows[2]]
    assert compare.table([], len(after)).note == "0 in 3 rows."
    assert compare.alone(before, after).rows == [["A", case, SNIPPET], ["B", case, TIDY]]
    for other in ({"device": "cuda"}, {"suite": "another"}):  # which `changes` does not compare either
        alone = compare.alone([rows[1]], [rows[1] | other]).rows
        assert [row[0] for row in alone] == ["A", "B"]
        assert alone[0][1:] == [case, ""]  # the whole case


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory"),
        ("nonsense", "has no rows as this version of `python -m benchmarks` writes them"),
        ("[1]", "has no rows"),
        ('{"rows": {}}', "has no rows"),
        ('{"rows": ["a"]}', "has no rows"),
        ('{"rows": [{"suite": "ops"}]}', "has no rows"),
        ('{"title": "a penalty step", "results": [{"critic": "vit"}]}', "has no rows"),  # as files once were
        ('{"rows": [{"target": "sm_90", "case": "interpolation"}]}', "has no rows"),
    ],
)
def test_a_file_that_is_no_run_is_named(rows, tmp_path, capsys, text, said):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    results.save(good, rows)
    if text is not None:
        bad.write_text(text)
    for files in ((good, bad), (bad, good)):
        with pytest.raises(SystemExit, match="2"):
            main(["compare", *map(str, files)])
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(bad) in error
        assert said in error


@pytest.mark.parametrize("name", sorted(path.name for path in results.COMMITTED.glob("*.json")))
def test_a_committed_run_is_equal_to_itself(name, capsys):
    """Whatever its suites."""
    assert main(["compare", str(results.COMMITTED / name), str(results.COMMITTED / name)]) == 0
    said = capsys.readouterr().out
    assert f"0 in {len(results.load(results.COMMITTED / name))} rows." in said
    assert "In one run alone" not in said


def test_runs_of_other_cases_are_not_said_to_be_the_same(rows, status, capsys):
    with pytest.raises(SystemExit, match="2"):
        status(rows, [row | {"shape": [3, 5]} for row in rows])
    assert "the two runs share no case" in capsys.readouterr().err
