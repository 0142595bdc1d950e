"""The rows of one case, and how their numbers are shown."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.names import OURS
from benchmarks.results import case_key

Row = dict[str, Any]
Measured = float | list[float]  # a median: alone, or with its interval


class CaseRows(NamedTuple):
    """By implementation."""

    suite: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: dict[str, Row]

    @property
    def label(self) -> str:
        return f"{self.name} {self.size}" + ("" if self.dtype == "float32" else f" {self.dtype}")

    @property
    def size(self) -> str:
        return shape(self.shape)

    @property
    def timed(self) -> bool:
        """Whether any of it was timed; of some cases memory alone is measured."""
        return any("ms" in row for row in self.rows.values())

    @property
    def on_device(self) -> bool:
        return any(row["device"] != "cpu" for row in self.rows.values())

    @property
    def has_memory(self) -> bool:
        """Whether its peak memory was measured."""
        return any("peak_mb" in row for row in self.rows.values())

    def value(self, name: str, what: str) -> float | None:
        """Of an implementation; of an interval its median."""
        found = self.rows.get(name, {}).get(what)
        return found[0] if isinstance(found, list) else found

    def number(self, name: str, what: str, shown: Callable[[float], str]) -> str:
        """Nothing where there is none."""
        found = self.value(name, what)
        return "" if found is None else shown(found)

    def time(self, name: str, what: str = "ms", unit: float = 1.0) -> str:
        return self.number(name, what, lambda ms: milliseconds(ms / unit))

    def peak(self, name: str) -> str:
        return self.number(name, "peak_mb", "{:.0f}".format)

    def compared(self, name: str, over: str = OURS) -> Any:
        """The ratio of two times with its interval, or None: on a device an op's own times, without the host's."""
        own = "device, " if self.suite == "ops" and self.on_device else ""
        return self.rows.get(name, {}).get(f"{own}over {over}")

    def ratio(self, name: str, over: str = OURS) -> str:
        found = self.compared(name, over)
        return "" if found is None else interval(found)

    def share(self, of: str, less: bool = False) -> str:
        """Of our time, taken round by round; or what is missing to all of it."""
        return self.number(of, f"over {OURS}", lambda part: f"{100 * (1 - part if less else part):.0f} %")


def by_case(rows: list[Row]) -> list[CaseRows]:
    found: dict[tuple[Any, ...], CaseRows] = {}
    for row in rows:
        key = case_key(row)
        found.setdefault(key, CaseRows(*key, {})).rows[row["implementation"]] = row
    return list(found.values())


def shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def interval(found: Measured) -> str:
    if not isinstance(found, list):
        return ratio(found)
    value, low, high = map(ratio, found)
    return f"{value} ({low} to {high})"


def inverse(found: Measured) -> Measured:
    """Of a ratio: its interval is turned round."""
    if not isinstance(found, list):
        return 1 / found
    value, low, high = found
    return [1 / value, 1 / high, 1 / low]


def ratio(value: float) -> str:
    """To two decimals, or to as many as tell on which side of 1 it is, and small ones from one another."""
    if value < 0.1:
        return f"{value:#.3g}"
    digits = 2
    while value != 1 and float(f"{value:.{digits}f}") == 1 and digits < 4:
        digits += 1
    return f"{value:.{digits}f}"


def span(found: Iterable[float | None]) -> str:
    """From the least to the most of those that there are."""
    numbers = [number for number in found if number is not None]
    return f"{ratio(min(numbers))} to {ratio(max(numbers))}" if numbers else ""
