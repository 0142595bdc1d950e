"""What changed between two runs of any suites, beyond noise.

Compared are ratios, not times: another speed of the machine affects both sides of a ratio. To our compiled call only
the compiled peer is compared, or one change of it would be listed for all; and to a peer only ours. A change is what
moved by more than 5 % (two runs of one program differ by some, as memory lies elsewhere) and so far that the two
intervals do not overlap. Where A and B come from one machine, peak memory is compared as well, by the same rule.
Better and worse are from the side of fused_gp: a peer's time over ours should rise; that of one of our own variants, or
of our two ops, should fall, and so should ours over a peer's. Ends with status 1 where a ratio of ours and a peer's
became worse, or ours needs more memory.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.names import COMPILED, COMPILED_CALL, TWO_OPS, is_ours, is_peer
from benchmarks.report import terminal
from benchmarks.report.case_rows import Measured, Row, interval, milliseconds, shape
from benchmarks.report.tables import Table

LEAST = 0.05


class Change(NamedTuple):
    row: Row
    what: str
    before: Measured
    after: Measured

    @property
    def better(self) -> bool:
        """For us. In the ratios of ours, and of our two ops, our time is the numerator: smaller is better."""
        name = self.row["implementation"]
        above = is_ours(name) or name == TWO_OPS
        return (_bounds(self.after)[0] > _bounds(self.before)[0]) == (bool(_base(self.what)) and not above)

    @property
    def decides(self) -> bool:
        """Ratios of two of ours do not say which of them changed, nor do those of baselines concern a peer."""
        name, base = self.row["implementation"], _base(self.what)
        return is_ours(name) if not base else is_peer(name) or (is_ours(name) and is_peer(base))


def apart(before: Measured, after: Measured) -> bool:
    """Intervals that do not overlap, around values that differ by more than LEAST."""
    (value, low, high), (value_after, low_after, high_after) = _bounds(before), _bounds(after)
    return (high < low_after or high_after < low) and abs(value_after - value) > LEAST * value


def _bounds(found: Measured) -> tuple[float, float, float]:
    """Value, low, high; what has no interval is its own."""
    value, low, high = found if isinstance(found, list) else [found] * 3
    return value, low, high


def changes(first: list[Row], second: list[Row]) -> Iterator[Change]:
    known = {_key(row): row for row in first}
    for row in second:
        old = known.get(_key(row))
        if old is None:
            continue
        for what, after in row.items():
            if what in old and _compared(what, row, old) and apart(old[what], after):
                yield Change(row, what, old[what], after)


def _compared(what: str, row: Row, old: Row) -> bool:
    base = _base(what)
    if base == COMPILED:
        return bool(row["implementation"] == COMPILED_CALL)
    if base:
        return not is_peer(base) or is_ours(row["implementation"])
    return what == "peak_mb" and bool(row["machine"] == old["machine"])


def _base(what: str) -> str:
    """The implementation that is the denominator of a ratio, or "" where there is no ratio."""
    _, _, base = what.partition("over ")
    return base


def _case(row: Row) -> tuple[Any, ...]:
    return *results.case_key(row), row["device"]


def _key(row: Row) -> tuple[Any, ...]:
    return *_case(row), row["implementation"]


def table(found: list[Change], rows: int) -> Table:
    """Of the changes, among so many rows."""
    headings = ["case", "what", "before", "after", ""]
    cells = []
    for change in found:
        show = interval if _base(change.what) else lambda peak: milliseconds(_bounds(peak)[0])
        what = f"{change.row['implementation']}: {change.what}"
        sign = "better" if change.better else "worse"
        cells.append([_label(change.row), what, show(change.before), show(change.after), sign])
    return Table("Changes beyond noise", f"{len(found)} in {rows} rows.", headings, cells)


def alone(first: list[Row], second: list[Row]) -> Table:
    """The cases of one run that the other has not; and of those of both, what is timed in one alone: it is absent from
    the other, or wrong there.
    """
    found: dict[tuple[str, ...], None] = {}
    for name, some, others in (("A", first, second), ("B", second, first)):
        cases, timed = {_case(row) for row in others}, {_key(row) for row in others if "ms" in row}
        for row in some:
            if _case(row) not in cases:
                found[name, _label(row), ""] = None
            elif "ms" in row and _key(row) not in timed:
                found[name, _label(row), row["implementation"]] = None
    return Table("In one run alone", "", ["run", "case", "timed"], [list(cells) for cells in found])


def _label(row: Row) -> str:
    return f"{row['suite']}: {row['case']} {shape(tuple(row['shape']))} {row['dtype']} on {row['device']}"


def run(text: str) -> list[Row]:
    """The rows of a file; argparse says what is wrong with it."""
    try:
        rows = results.load(Path(text))
        for row in rows:
            _key(row), row["machine"]  # what `changes` reads of every row
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        said = f"{text} has no rows as this version of `python -m benchmarks` writes them"
        raise argparse.ArgumentTypeError(said) from error
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
    only = alone(first, second)
    terminal.show([table(found, len(second)), *([only] if only.rows else [])])
    return int(any(change.decides and not change.better for change in found))
