"""Tables in the terminal; plain text where rich is missing, as on a machine with a device and no network.

The intervals of the ratios make many a table too wide. There they are left out, and a ratio that is not sure is marked.
"""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import compress

from benchmarks.report.tables import Table

INTERVAL = re.compile(r"([\d.e-]+) \(([\d.e-]+) to ([\d.e-]+)\)")
# What stays on one line: words and, as one, a ratio with its interval; where there is room a shape, too.
WORD = re.compile(r"[\d.e-]+ \([\d.e-]+ to [\d.e-]+\)|\S+")
SHAPE = re.compile(rf"\d+(?: x \d+)+|{WORD.pattern}")
WIDE = 0.2  # of the ratio: a wider interval leaves it unsure
UNSURE = "~"
EXPLANATION = f"{UNSURE}: the interval, which is in the JSON, holds 1 or is wider than {100 * WIDE:.0f} % of the ratio."
WIDEST = 120  # columns: what a table may take where the terminal has fewer


def show(tables: Iterable[Table]) -> None:
    for table in map(filled, tables):
        if not table.rows:
            print("", f"{table.title}: {table.note}", sep="\n")
        elif find_spec("rich") is None:
            print("", table.title, *_aligned(table), table.note, sep="\n")
        else:
            _draw(table)


def _aligned(table: Table) -> list[str]:
    cells = [table.headings, *table.rows]
    lengths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, lengths)).rstrip() for row in cells]


def _draw(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(markup=False, highlight=False)  # '.[peers]' is no markup
    needed = _together(_words(table.headings, *table.rows, word=SHAPE))
    console.width = max(console.width, min(WIDEST, needed))
    fitted = fit(table, console.width)
    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), show_edge=False)
    for heading, width in zip(fitted.headings, widths(fitted, console.width), strict=True):
        drawn.add_column(heading, overflow="fold", width=width)
    for row in fitted.rows:
        drawn.add_row(*row)
    console.print(fitted.title, style="italic")
    console.print(drawn)
    if fitted.note:
        console.print(fitted.note, style="dim")
    console.print()


GAP = 2  # between columns


def filled(table: Table) -> Table:
    """Without the columns in which nothing stands, as those of compiled implementations after a quick run."""
    keep = [any(row[at] for row in table.rows) for at in range(len(table.headings))]
    headings, *rows = (list(compress(row, keep)) for row in [table.headings, *table.rows])
    return table._replace(headings=headings, rows=rows)


def fit(table: Table, width: int) -> Table:
    """As it is, or where that is too wide without intervals."""
    if _together(_words(table.headings, *table.rows)) <= width:
        return table
    rows = [[short(cell) for cell in row] for row in table.rows]
    marked = any(cell.endswith(UNSURE) for row in rows for cell in row)
    return table._replace(rows=rows, note=f"{table.note} {EXPLANATION}" if marked else table.note)


def widths(table: Table, width: int) -> list[int]:
    """Of the columns: no word is broken, or where there is no room for that, none but some headings'. Then no
    shape, and what is left goes to whichever column takes the most lines.
    """
    found = _words([""] * len(table.headings), *table.rows)
    _widen(found, _words(table.headings, *table.rows), width)
    _widen(found, _words(table.headings, *table.rows, word=SHAPE), width)
    lines = [max(map(len, column)) for column in zip(table.headings, *table.rows, strict=True)]
    for _ in range(width - _together(found)):
        longest = max(range(len(found)), key=lambda at: lines[at] / max(found[at], 1))
        found[longest] += lines[longest] > found[longest]
    return found


def _widen(found: list[int], wanted: list[int], width: int) -> None:
    """The columns to the wanted widths, the least first, as far as there is room."""
    for at in sorted(range(len(found)), key=lambda at: wanted[at] - found[at]):
        if _together(found) + wanted[at] - found[at] <= width:
            found[at] = wanted[at]


def _words(*rows: list[str], word: re.Pattern[str] = WORD) -> list[int]:
    """The longest word of each column."""
    return [
        max(len(found) for cell in column for found in word.findall(cell) or [""]) for column in zip(*rows, strict=True)
    ]


def _together(widths: list[int]) -> int:
    return sum(widths) + GAP * len(widths)


def short(cell: str) -> str:
    """A ratio without its interval, and a mark where the ratio alone would seem surer than it is."""
    found = INTERVAL.fullmatch(cell)
    if found is None:
        return cell
    value, low, high = map(float, found.groups())
    unsure = low <= 1 <= high or high - low > WIDE * value
    return found[1] + (UNSURE if unsure else "")
