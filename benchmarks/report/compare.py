"""What changed between two runs of any suites, beyond noise.

Compared are ratios, and no times: another speed of the machine affects both sides of a ratio. To our compiled call only
the compiled peer is compared, or one change of it would be listed for all; and to a peer only ours. A change is what
moved by more than 5 % (two runs of one program differ by some, as memory lies elsewhere) and so far that the two
intervals do not overlap. Where A and B come from one machine, peak memory is compared as well, by the same rule.
Better and worse are meant for us: a peer's time over ours should rise; that of one of our own variants, or of our two
ops, should fall, and so should ours over a peer's. Ends with status 1 where a ratio of ours and a peer's became worse,
or ours needs more memory.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.names import COMPILED, COMPILED_CALL, TWO_OPS, is_ours, is_peer
from benchmarks.report import terminal
from benchmarks.report.case_rows import Row, interval, milliseconds, shape
from benchmarks.report.tables import Table

LEAST = 0.05


class Change(NamedTuple):
    row: Row
    what: str
    before: list[float]
    after: list[float]

    @property
    def better(self) -> bool:
        """For us. In the ratios of ours, and of our two ops, these are above the line: the less the better."""
        name = self.row["implementation"]
        above = is_ours(name) or name == TWO_OPS
        return (self.after[0] > self.before[0]) == (bool(_base(self.what)) and not above)

    @property
    def decides(self) -> bool:
        """Ratios of two of ours do not say which of them changed, nor do those of baselines concern a peer."""
        name, base = self.row["implementation"], _base(self.what)
        return is_ours(name) if not base else is_peer(name) or (is_ours(name) and is_peer(base))


def apart(before: list[float], after: list[float]) -> bool:
    """Intervals (value, low, high) that do not overlap, around values that differ by more than LEAST."""
    separate = before[2] < after[1] or after[2] < before[1]
    return separate and abs(after[0] - before[0]) > LEAST * before[0]


def changes(first: list[Row], second: list[Row]) -> Iterator[Change]:
    known = {_key(row): row for row in first}
    for row in second:
        old = known.get(_key(row))
        if old is None:
            continue
        for what in row:
            if what not in old or not _compared(what, row, old):
                continue
            before, after = (
                [found, found, found] if isinstance(found, float) else found for found in (old[what], row[what])
            )
            if apart(before, after):
                yield Change(row, what, before, after)


def _compared(what: str, row: Row, old: Row) -> bool:
    base = _base(what)
    if base == COMPILED:
        return bool(row["implementation"] == COMPILED_CALL)
    if base:
        return not is_peer(base) or is_ours(row["implementation"])
    return what == "peak_mb" and bool(row["machine"] == old["machine"])


def _base(what: str) -> str:
    """The implementation to whose time a ratio is; none of what is no ratio."""
    _, _, base = what.partition("over ")
    return base


def _case(row: Row) -> tuple[Any, ...]:
    return row["suite"], row["case"], tuple(row["shape"]), row["dtype"], row["device"]


def _key(row: Row) -> tuple[Any, ...]:
    return *_case(row), row["implementation"]


def _timed(rows: list[Row]) -> set[str]:
    return {
        f"{row['implementation']} at {row['suite']}, {row['case']} {row['shape']} {row['dtype']} on {row['device']}"
        for row in rows
        if "ms" in row
    }


def table(found: list[Change], first: list[Row], second: list[Row]) -> Table:
    rows = []
    for change in found:
        show = interval if _base(change.what) else lambda values: milliseconds(values[0])
        case = f"{change.row['case']} {shape(tuple(change.row['shape']))} {change.row['dtype']}"
        what = f"{change.row['implementation']}: {change.what}"
        rows.append([case, what, show(change.before), show(change.after), "better" if change.better else "worse"])
    note = f"{len(found)} changes in {len(second)} rows."
    for name, some, others in (("A", first, second), ("B", second, first)):
        alone = sorted(_timed(some) - _timed(others))  # absent from the other, or wrong there
        if alone:
            note += f" Timed in {name} only: {', '.join(alone)}."
    return Table("Changes beyond noise", note, ["case", "what", "before", "after", ""], rows)


def run(text: str) -> list[Row]:
    """The rows of a file; argparse says what is wrong with it."""
    try:
        rows = results.load(Path(text))
        for row in rows:
            _key(row), row["machine"]  # what `changes` reads of every row
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} has no rows as `python -m benchmarks` writes them") from error
    return rows


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks compare", description=__doc__)
    parser.add_argument("first", type=run, metavar="A.json")
    parser.add_argument("second", type=run, metavar="B.json")
    options = parser.parse_args(words)
    first, second = options.first, options.second
    if not {_case(row) for row in first} & {_case(row) for row in second}:
        parser.error("the two runs share no case on the same kind of device")
    found = list(changes(first, second))
    terminal.show([table(found, first, second)])
    return int(any(change.decides and not change.better for change in found))
