"""A progress bar and tables; plain lines where rich is missing, as on a machine with a device and no network.

Lines too where nobody looks at a terminal: in a log a bar is nothing at all.

The intervals of the ratios make many a table too wide. There they are left out, and what is not sure is marked.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import compress
from typing import TypeVar

from benchmarks.tables import Table

T = TypeVar("T")
INTERVAL = re.compile(r"([\d.e-]+) \(([\d.e-]+) to ([\d.e-]+)\)")
WIDE = 0.2  # of the ratio: such an interval says little
UNSURE = "~"
EXPLANATION = f"{UNSURE}: the interval, which is in the JSON, holds 1 or is wider than {100 * WIDE:.0f} % of the ratio."
RICH = find_spec("rich") is not None


def track(jobs: Sequence[tuple[str, T]]) -> Iterator[T]:
    """The jobs, each announced by its name."""
    if not RICH or not sys.stdout.isatty():
        for number, (name, job) in enumerate(jobs, 1):
            print(f"{number}/{len(jobs)} {name}", flush=True)
            yield job
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for name, job in jobs:
            progress.update(task, description=name)
            yield job
            progress.advance(task)


def show(tables: Iterable[Table]) -> None:
    if not RICH:
        for table in map(filled, tables):
            lines = ("  ".join(row) for row in [table.headings, *table.rows])
            print("", table.title, *lines, table.note, sep="\n")
        return
    from rich import box
    from rich import table as rich_table
    from rich.console import Console

    console = Console(markup=False)  # '.[peers]' is no markup
    console.width = max(console.width, 120)
    for table in tables:
        fitted = fit(filled(table), console.width)
        drawn = rich_table.Table(
            title=fitted.title, caption=fitted.note, title_justify="left", caption_justify="left",
            box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), show_edge=False,
        )  # fmt: skip
        for heading, width in zip(fitted.headings, widths(fitted, console.width), strict=True):
            drawn.add_column(heading, overflow="fold", width=width)
        for row in fitted.rows:
            drawn.add_row(*row)
        console.print(drawn, "")


GAP = 2  # between columns


def filled(table: Table) -> Table:
    """Without the columns in which nothing stands, as those of compiled contestants after a quick run."""
    keep = [not table.rows or any(row[at] for row in table.rows) for at in range(len(table.headings))]
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
    """Of the columns: no word is broken, or where there is no room for that, none but some headings'.

    What is left goes to whichever column takes the most lines.
    """
    found = _words([""] * len(table.headings), *table.rows)
    unbroken = _words(table.headings, *table.rows)
    for at in sorted(range(len(found)), key=lambda at: unbroken[at] - found[at]):
        if _together(found) + unbroken[at] - found[at] <= width:
            found[at] = unbroken[at]
    lines = [max(map(len, column)) for column in zip(table.headings, *table.rows, strict=True)]
    for _ in range(width - _together(found)):
        longest = max(range(len(found)), key=lambda at: lines[at] / max(found[at], 1))
        found[longest] += lines[longest] > found[longest]
    return found


def _words(*rows: list[str]) -> list[int]:
    """The longest word of each column; a ratio and its interval are one."""
    return [
        max(len(word) for cell in column for word in ([cell] if INTERVAL.fullmatch(cell) else cell.split() or [""]))
        for column in zip(*rows, strict=True)
    ]


def _together(widths: list[int]) -> int:
    return sum(widths) + GAP * len(widths)


def short(cell: str) -> str:
    """A ratio without its interval, and a mark where the ratio alone would look surer than it is."""
    found = INTERVAL.fullmatch(cell)
    if found is None:
        return cell
    value, low, high = map(float, found.groups())
    unsure = low <= 1 <= high or high - low > WIDE * value
    return found[1] + (UNSURE if unsure else "")
