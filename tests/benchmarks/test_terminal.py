"""The tables in the terminal."""

import importlib.util
from functools import partial

import pytest

from benchmarks import progress, results
from benchmarks.report import compare, terminal
from benchmarks.report.tables import Table, tables


@pytest.fixture
def shown(monkeypatch, capsys):
    def shown(every, columns=120):
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", str(columns))
        terminal.show(every)
        return capsys.readouterr().out

    return shown


def test_a_narrow_table_shows_intervals_and_a_wide_one_marks(shown):
    narrow = Table("T", "A note.", ["case", "ratio"], [["a", "1.05 (0.90 to 1.20)"]])
    out = shown([narrow])
    assert "1.05 (0.90 to 1.20)" in out
    assert terminal.EXPLANATION not in out
    cells = ["1.05 (0.90 to 1.20)", "2.00 (1.70 to 2.20)", "2.00 (1.90 to 2.20)", "0.00427 (0.00420 to 0.00430)"]
    wide = narrow._replace(headings=["a heading"] * 8, rows=[cells * 2])
    out = " ".join(shown([wide]).split())
    assert "1.05~ 2.00~ 2.00 0.00427 " in out
    assert f"A note. {terminal.EXPLANATION}" in out


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", [name for name, rows in results.committed().items() if rows])
def test_nothing_is_cut(shown, name, columns):
    """Of the committed runs: every heading and every cell is there, over one line or more."""
    for table in tables(results.committed()[name]):
        out = shown([table], columns)
        assert "\N{HORIZONTAL ELLIPSIS}" not in out
        assert max(map(len, out.splitlines())) <= 120
        # A table may be wider than the terminal: as wide as it has to be, up to 120 columns.
        for width in range(columns, 121):
            fitted = terminal.fit(terminal.filled(table), width)
            cells = [fitted.title, fitted.note, *fitted.headings, *(cell for row in fitted.rows for cell in row)]
            letters = "".join(out.split()).replace("\N{BOX DRAWINGS LIGHT HORIZONTAL}", "")
            if sorted(letters) == sorted("".join("".join(cells).split())):
                break
        else:
            pytest.fail(f"not all of {table.title} is shown")


def test_no_word_is_broken_at_120_columns():
    for rows in results.committed().values():
        for table in tables(rows):
            fitted = terminal.fit(terminal.filled(table), 120)
            for at, width in enumerate(terminal.widths(fitted, 120)):
                assert all(len(word) <= width for row in fitted.rows for word in row[at].split())


def test_a_shape_stays_on_its_line_where_there_is_room(shown):
    table = Table("T", "", ["case", "shape", "ratio"], [["some words " * 4, "64 x 3 x 64 x 64", "1.05 (0.90 to 1.20)"]])
    assert "64 x 3 x 64 x 64" in shown([table], 50)


def test_columns_of_nothing_are_left_out_and_markup_is_not_read(shown):
    table = Table("T", "", ["a", "empty", "b"], [["pip install '.[peers]'", "", "2"]])
    out = shown([table])
    assert "'.[peers]'" in out
    assert "empty" not in out
    assert shown([compare.table([], 0)]) == "\nChanges beyond noise: 0 in 0 rows.\n"


def test_without_rich_columns_are_aligned(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "find_spec", partial(importlib.util.find_spec, "no such package"))
    terminal.show([Table("T", "A note.", ["case", "ms"], [["a", "1"], ["another", "22"]])])
    assert capsys.readouterr().out == "\nT\ncase     ms\na        1\nanother  22\nA note.\n"


def test_jobs_are_announced_line_by_line_where_there_is_no_terminal(capsys):
    assert list(progress.track([("first", 1), ("second", 2)])) == [1, 2]
    assert capsys.readouterr().out == "1/2 first\n2/2 second\n"
