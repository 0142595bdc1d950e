"""A progress bar and tables; plain lines where rich is missing, as on a machine with a device and no network.

Lines too where nobody looks at a terminal: in a log a bar is nothing at all.

The intervals of the ratios are in the JSON and on the page; here they would make every table too wide.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TypeVar

from benchmarks.tables import Table

T = TypeVar("T")
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
        for table in tables:
            lines = ("  ".join(map(_short, row)) for row in [table.headings, *table.rows])
            print("", table.title, *lines, table.note, sep="\n")
        return
    from rich import table as rich_table
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 120)
    for table in tables:
        drawn = rich_table.Table(*table.headings, title=table.title, caption=table.note, title_justify="left")
        for row in table.rows:
            drawn.add_row(*map(_short, row))
        console.print(drawn)


def _short(cell: str) -> str:
    return re.sub(r" \([\d.]+ to [\d.]+\)$", "", cell)
