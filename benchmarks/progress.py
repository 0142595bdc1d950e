"""A progress bar; plain lines where rich is missing, as on a machine with a device and no network, or in a log."""

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")


def track(jobs: Sequence[tuple[str, T]]) -> Iterator[T]:
    """The jobs, each announced by its name."""
    if find_spec("rich") is None or not sys.stdout.isatty():
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
