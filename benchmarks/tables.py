"""The tables of the terminal and of the page, made of the rows of one run."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

from benchmarks.bandwidth import COPIES
from benchmarks.ops import BOTH
from benchmarks.ours import COMPILED, OURS
from benchmarks.peers import COMPILED_CALL, COMPILED_OPS, PEERS, peers_of_calls, peers_of_ops
from benchmarks.penalty import TWO_OPS
from benchmarks.training import CRITIC_UPDATES, NO_PENALTY

Row = dict[str, Any]


class Table(NamedTuple):
    title: str
    note: str
    headings: list[str]
    rows: list[list[str]]


class Contest(NamedTuple):
    """The rows of one case, by contestant."""

    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: dict[str, Row]

    @property
    def label(self) -> str:
        return f"{self.name} {shape(self.shape)}" + ("" if self.dtype == "float32" else f" {self.dtype}")

    def time(self, name: str, what: str = "ms") -> str:
        row = self.rows.get(name, {})
        return milliseconds(row[what][0]) if what in row else ""

    def ratio(self, name: str, over: str = OURS) -> str:
        found = self.rows.get(name, {}).get(f"over {over}")
        return "" if found is None else interval(found)

    def share(self, of: str, less: bool = False) -> str:
        """Of our time, taken round by round; or what is missing to all of it."""
        found = self.rows.get(of, {}).get(f"over {OURS}")
        return "" if found is None else f"{100 * (1 - found[0] if less else found[0]):.0f} %"


def contests(rows: list[Row]) -> list[Contest]:
    found: dict[tuple[Any, ...], Contest] = {}
    for row in rows:
        key = (row["group"], row["case"], tuple(row["shape"]), row["dtype"])
        found.setdefault(key, Contest(*key, {})).rows[row["contestant"]] = row
    return list(found.values())


def shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def interval(found: list[float]) -> str:
    value, low, high = map(ratio, found)
    return f"{value} ({low} to {high})"


def ratio(value: float) -> str:
    """To two decimals, or to as many as tell on which side of 1 it is, and small ones from one another."""
    if value < 0.1:
        return f"{value:#.3g}"
    digits = 2
    while value != 1 and float(f"{value:.{digits}f}") == 1 and digits < 4:
        digits += 1
    return f"{value:.{digits}f}"


def tables(rows: list[Row]) -> list[Table]:
    every = contests(rows)
    made: list[Callable[[list[Contest]], Table]] = [both, ops, penalty, training, memory, device, losses, absences]
    return [table for make in made if (table := make(every)).rows]


def both(every: list[Contest]) -> Table:
    peers = list(peers_of_ops())
    rows = []
    for contest in every:
        if contest.group == "op" and contest.name == BOTH:
            times = [shape(contest.shape), contest.dtype, contest.time(OURS)]
            rows.append([*times, *(contest.ratio(name) for name in peers), *roof(contest)])
    return Table(
        "Interpolation, and the penalty forward and backward",
        "All that a critic's step has of a penalty, but the critic. Time of each peer divided by ours; above 1 ours is "
        "faster.",
        ["shape", "type", "ours, ms", *peers, *ROOF], rows,
    )  # fmt: skip


ROOF = ["ours / plain copies", "GB/s", "of copying"]


def roof(contest: Contest) -> list[str]:
    """How near ours comes to copying."""
    row = contest.rows[OURS]
    copies = contest.rows.get(COPIES, {}).get(f"over {OURS}")
    if "gb_s" not in row or copies is None:
        return ["", "", ""]
    return [f"{1 / copies[0]:.2f}", f"{row['gb_s']:.1f}", f"{100 * row['gb_s'] / row['copy_gb_s']:.0f} %"]


def ops(every: list[Contest]) -> Table:
    peers = [name for name in peers_of_ops() if name != COMPILED_OPS]
    rows = [
        [
            contest.name,
            shape(contest.shape),
            contest.time(OURS),
            *(contest.ratio(name) for name in peers),
            *roof(contest),
        ]
        for contest in every
        if contest.group == "op" and contest.name != BOTH
    ]
    return Table(
        "The ops one by one",
        "The same. The double backward is timed with the forward and the backward that it needs.",
        ["op", "shape", "ours, ms", *peers, *ROOF], rows,
    )  # fmt: skip


def penalty(every: list[Contest]) -> Table:
    peers = [name for name in peers_of_calls(2) if name != COMPILED_CALL]
    rows = [
        [
            contest.name, shape(contest.shape), contest.dtype, contest.time(OURS),
            *(contest.ratio(name) for name in peers),
            contest.time(COMPILED), contest.ratio(COMPILED_CALL, over=COMPILED), contest.ratio(COMPILED_CALL),
            contest.share(TWO_OPS),
        ]
        for contest in every
        if contest.group == "penalty"
    ]  # fmt: skip
    return Table(
        "The whole penalty: the call with a critic, and its backward to the weights",
        "Time of each peer divided by ours; compiled against compiled, and against the plain call. The last column is "
        "how much of our time the two ops take: more than that no fusing of theirs could win.",
        ["critic", "shape", "type", "ours, ms", *peers, "ours compiled, ms", f"{COMPILED_CALL}, over ours compiled",
         f"{COMPILED_CALL}, over ours", "the two ops"], rows,
    )  # fmt: skip


def training(every: list[Contest]) -> Table:
    peers = [name for name in peers_of_calls(2) if name != COMPILED_CALL]
    rows = [
        [
            contest.name, shape(contest.shape), contest.time(OURS), *(contest.ratio(name) for name in peers),
            contest.time(COMPILED), contest.ratio(COMPILED_CALL, over=COMPILED),
            contest.share(NO_PENALTY, less=True), contest.share(TWO_OPS),
        ]
        for contest in every
        if contest.group == "training step"
    ]  # fmt: skip
    return Table(
        "A whole WGAN-GP training step: five updates of the critic and one of the generator",
        "The last two columns: how much of the step the penalty takes, and how much of it the two ops.",
        ["networks", "shape", "ours, ms", *peers, "ours compiled, ms", f"{COMPILED_CALL}, over ours compiled",
         "the penalty", "the two ops"], rows,
    )  # fmt: skip


def memory(every: list[Contest]) -> Table:
    measured = [contest for contest in every if any("peak_mb" in row for row in contest.rows.values())]
    names = dict.fromkeys(name for contest in measured for name, row in contest.rows.items() if "peak_mb" in row)
    rows = []
    for name in names:
        peaks = [contest.rows.get(name, {}).get("peak_mb") for contest in measured]
        rows.append([name, *("" if peak is None else f"{peak:.0f}" for peak in peaks)])
    return Table(
        "Peak memory of a step, MB",
        "Of one step, in a process of its own, above what the process held before; what the step returns counts.",
        ["", *(contest.label for contest in measured)], rows,
    )  # fmt: skip


def device(every: list[Contest]) -> Table:
    rows = [
        [contest.label, name, contest.time(name, "host_ms"), contest.time(name, "device_ms"), str(row["launches"])]
        for contest in every
        for name, row in contest.rows.items()
        if "launches" in row
    ]
    return Table(
        "Host and device",
        "Milliseconds that the host takes to put a step into the queue, and that the device takes for it by its own "
        "events; and how many kernels, copies and fills that is.",
        ["case", "", "host, ms", "device, ms", "launches"], rows,
    )  # fmt: skip


class Loss(NamedTuple):
    contest: Contest
    peer: str
    over: str
    found: list[float]


def lost(every: list[Contest]) -> Iterator[Loss]:
    """Where a peer's whole interval is on the other side of 1: compiled against compiled, where ours was timed too."""
    for contest in every:
        for peer in PEERS:
            row = contest.rows.get(peer, {})
            over = COMPILED if peer == COMPILED_CALL and COMPILED in contest.rows else OURS
            found = row.get(f"over {over}")
            if found is not None and found[2] < 1:
                yield Loss(contest, peer, over, found)


def losses(every: list[Contest]) -> Table:
    rows = [
        [loss.contest.group, loss.contest.label, f"{loss.peer} over {loss.over}", interval(loss.found), why(loss)]
        for loss in sorted(lost(every), key=lambda loss: loss.found[0])
    ]
    return Table(
        "Where a peer wins",
        "Every case in which the whole interval of a peer's ratio lies below 1, the largest loss first. A "
        "compiled call is held to ours compiled, where that was timed, and everything else to our plain call.",
        ["what", "case", "peer", "ratio", "why"], rows,
    )  # fmt: skip


SMALL = 2**17  # elements, of 4 bytes: in cache, and too few to divide among threads
SHORT = 20.0  # ms: a penalty that takes longer is the critic's
IN_CACHE = 2**22  # elements: several such tensors stay in a cache of 32 MB or more
NEAR = 0.95  # of an interval's upper end: what memory and chance can make of equal work


def why(loss: Loss) -> str:
    """As found on a CPU; of a GPU nothing is known yet."""
    if loss.contest.rows[OURS]["device"] != "cpu":
        return "not known"
    if loss.contest.dtype in ("float16", "bfloat16"):
        return (
            "half types: ours computes in fp32 and rounds once, by fp32 copies of blocks; eager peers round every "
            "result to the half type, and a compiled one needs no copies"
        )
    if prod(loss.contest.shape) < SMALL and _one_penalty(loss.contest) < SHORT:
        return (
            "small: a step is Python and the calls of small operations, and ours checks its arguments and chooses "
            "backend and method before it does the same"
        )
    if loss.contest.group == "op" and prod(loss.contest.shape) < IN_CACHE:
        return (
            "in cache: the operations take some tens of microseconds each, and the Python between them shows, whose "
            "code and data the tensors have driven out of the near caches"
        )
    if loss.contest.name == "penalty, forward":
        return (
            "norms of chunks of 4096 elements first: the norm of a long row at once adds up in a few fp32 lanes, and "
            "is off by 1e-4 where a row is 200,000 equal numbers"
        )
    if _same_work(loss) and loss.found[2] > NEAR:
        return (
            "equal: both run the same operations, but for less than a hundredth of the time; of the intervals of "
            "equals one in forty lies below 1"
        )
    return "not known"


def _one_penalty(contest: Contest) -> float:
    """Milliseconds of ours in which arguments are checked once."""
    ms = float(contest.rows[OURS]["ms"][0])
    if contest.group != "training step":
        return ms
    return ms * (1 - float(contest.rows[NO_PENALTY][f"over {OURS}"][0])) / CRITIC_UPDATES


def _same_work(loss: Loss) -> bool:
    """Eager forms call the same operations of a critic, beside a large one of which the two ops are next to nothing;
    and on a CPU the interpolation of fp32 is one lerp, as tidy's is.
    """
    if loss.contest.group == "op":
        return loss.contest.name == "interpolation, forward" and loss.peer == "tidy"
    ops = loss.contest.rows.get(TWO_OPS, {}).get(f"over {OURS}")
    return loss.peer != COMPILED_CALL and ops is not None and ops[0] < 0.01


def absences(every: list[Contest]) -> Table:
    reasons = dict.fromkeys(
        (name, contest.label if "failed" in row else "", row.get("failed") or row["absent"])
        for contest in every
        for name, row in contest.rows.items()
        if "failed" in row or "absent" in row
    )
    return Table("Not timed", "", ["peer", "case", "reason"], [list(reason) for reason in reasons])
