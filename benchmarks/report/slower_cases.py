"""Where a peer wins, and why."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from benchmarks.names import COMPILED, COMPILED_CALL, CRITIC_UPDATES, NO_PENALTY, OURS, TIDY, TWO_OPS, is_peer
from benchmarks.report.case_rows import CaseRows

SUITES = ("ops", "penalties", "training")  # the other tables have ratios alone, wins and losses side by side

SMALL = 2**17  # elements, of 4 bytes: in cache, and too few to divide among threads
SHORT = 20.0  # ms: a penalty that takes longer is the critic's
IN_CACHE = 2**22  # elements: several such tensors stay in a cache of 32 MB or more
NEAR = 0.95  # of an interval's upper end: what memory and chance can make of equal work


class SlowerCase(NamedTuple):
    case: CaseRows
    peer: str
    over: str
    ratio: list[float]


def slower_cases(cases: list[CaseRows]) -> Iterator[SlowerCase]:
    """Where a peer's whole interval is below 1: compiled against compiled, where ours was timed too."""
    for case in cases:
        for peer in case.rows:
            over = COMPILED if peer == COMPILED_CALL and "ms" in case.rows.get(COMPILED, {}) else OURS
            ratio = case.compared(peer, over)
            if case.suite in SUITES and is_peer(peer) and ratio is not None and ratio[2] < 1:
                yield SlowerCase(case, peer, over, ratio)


def why(slower: SlowerCase) -> str:
    """As found on a CPU; of a GPU nothing is known yet."""
    case = slower.case
    if case.rows[OURS]["device"] != "cpu":
        return "not known"
    if case.dtype in ("float16", "bfloat16"):
        return (
            "half types: ours computes in fp32 and rounds once, by fp32 copies of blocks; eager peers round every "
            "result to the half type, and a compiled one needs no copies"
        )
    if prod(case.shape) < SMALL and _one_penalty(case) < SHORT:
        return (
            "small: a step is Python and the calls of small operations, and ours checks its arguments and chooses "
            "backend and method before it does the same"
        )
    if case.suite == "ops" and prod(case.shape) < IN_CACHE:
        return (
            "in cache: the operations take some tens of microseconds each, and the Python between them shows, whose "
            "code and data the tensors have evicted from the first caches"
        )
    if case.name == "penalty, forward":
        return (
            "norms of chunks of 4096 elements first: the norm of a long row at once adds up in a few fp32 lanes, and "
            "is off by 1e-4 where a row is 200,000 equal numbers"
        )
    if _same_work(slower) and slower.ratio[2] > NEAR:
        return (
            "equal: both run the same operations, but for less than a hundredth of the time; of the intervals of "
            "equal times one in forty lies below 1 by chance"
        )
    return "not known"


def _one_penalty(case: CaseRows) -> float:
    """Milliseconds of ours in which arguments are checked once."""
    ms = float(case.rows[OURS]["ms"][0])
    if case.suite != "training":
        return ms
    return ms * (1 - float(case.rows[NO_PENALTY][f"over {OURS}"][0])) / CRITIC_UPDATES


def _same_work(slower: SlowerCase) -> bool:
    """Eager forms call the same operations of a critic, beside a large one of which the two ops are next to nothing;
    and on a CPU the interpolation of fp32 is one lerp, as tidy's is.
    """
    if slower.case.suite == "ops":
        return slower.case.name == "interpolation, forward" and slower.peer == TIDY
    ops = slower.case.value(TWO_OPS, f"over {OURS}")
    return slower.peer != COMPILED_CALL and ops is not None and ops < 0.01
