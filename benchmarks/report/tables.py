"""The tables of the terminal and of the pages, made of the rows of one run."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.names import (
    BOTH,
    COMPILED,
    COMPILED_CALL,
    COPIES,
    EMPTY_FUNCTIONS,
    NO_PENALTY,
    OURS,
    SNIPPET,
    TIDY,
    TWO_OPS,
    USUAL,
    is_ours,
    is_peer,
)
from benchmarks.report.case_rows import CaseRows, Row, by_case, interval, inverse, shape
from benchmarks.report.losses import lost, why

Cell = Callable[[CaseRows], str]
Columns = dict[str, Cell]  # by heading


class Table(NamedTuple):
    title: str
    note: str
    headings: list[str]
    rows: list[list[str]]


def tables(rows: list[Row]) -> list[Table]:
    cases = by_case(rows)
    every = [
        both(cases), ops(cases), penalties(cases), training(cases), *methods(cases), growth(cases), systems(cases),
        extremes(cases), host(cases), memory(cases), device(cases), where_a_peer_wins(cases), not_timed(cases),
    ]  # fmt: skip
    return [table for table in every if table.rows]


def table_of(title: str, note: str, columns: Columns, cases: list[CaseRows]) -> Table:
    """A row for each case."""
    return Table(title, note, list(columns), [[cell(case) for cell in columns.values()] for case in cases])


def time(name: str, unit: float = 1.0) -> Cell:
    return lambda case: case.time(name, unit=unit)


def ratio(name: str, over: str = OURS) -> Cell:
    return lambda case: case.ratio(name, over)


def share(of: str, less: bool = False) -> Cell:
    return lambda case: case.share(of, less)


def peers(cases: list[CaseRows]) -> Columns:
    """Their ratios to ours; without the one that is compared with ours compiled."""
    found = dict.fromkeys(name for case in cases for name, row in case.rows.items() if is_peer(name) and "ms" in row)
    return {name: ratio(name) for name in found if name != COMPILED_CALL}


NAME: Cell = lambda case: case.name  # noqa: E731
SHAPE: Columns = {"shape": lambda case: shape(case.shape)}
TYPE: Columns = {"type": lambda case: case.dtype}
COMPILED_TIMES: Columns = {
    "ours compiled, ms": time(COMPILED),
    f"{COMPILED_CALL}, over ours compiled": ratio(COMPILED_CALL, over=COMPILED),
}
# How near ours comes to copying.
COPYING: Columns = {
    "ours / plain copies": lambda case: case.number(COPIES, f"over {OURS}", lambda copies: f"{1 / copies:.2f}"),
    "GB/s": lambda case: case.number(OURS, "gb_s", "{:.1f}".format),
    "of copying": lambda case: case.number(
        OURS, "gb_s", lambda gb_s: f"{100 * gb_s / case.rows[OURS]['copy_gb_s']:.0f} %"
    ),
}


def both(cases: list[CaseRows]) -> Table:
    chosen = [case for case in cases if case.suite == "ops" and case.name == BOTH]
    return table_of(
        "Interpolation, and the penalty forward and backward",
        "All that a critic's step has of a penalty, but the critic. Time of each peer divided by ours; above 1 ours is "
        "faster.",
        SHAPE | TYPE | {"ours, ms": time(OURS)} | peers(chosen) | COPYING,
        chosen,
    )


def ops(cases: list[CaseRows]) -> Table:
    chosen = [case for case in cases if case.suite == "ops" and case.name != BOTH]
    return table_of(
        "The ops one by one",
        "The same. The double backward is timed with the forward and the backward that it needs.",
        {"op": NAME} | SHAPE | {"ours, ms": time(OURS)} | peers(chosen) | COPYING,
        chosen,
    )


def penalties(cases: list[CaseRows]) -> Table:
    chosen = [case for case in cases if case.suite == "penalties"]
    times = {"ours, ms": time(OURS)} | peers(chosen) | COMPILED_TIMES
    last = {f"{COMPILED_CALL}, over ours": ratio(COMPILED_CALL), "the two ops": share(TWO_OPS)}
    return table_of(
        "The whole penalty: the call with a critic, and its backward to the weights",
        "Time of each peer divided by ours; compiled against compiled, and against the plain call. The last column is "
        "how much of our time the two ops take: more than that no fusing of theirs could win.",
        {"critic": NAME} | SHAPE | TYPE | times | last,
        chosen,
    )


def training(cases: list[CaseRows]) -> Table:
    chosen = [case for case in cases if case.suite == "training"]
    shares = {"the penalty": share(NO_PENALTY, less=True), "the two ops": share(TWO_OPS)}
    return table_of(
        "A whole WGAN-GP training step: five updates of the critic and one of the generator",
        "The last two columns: how much of the step the penalty takes, and how much of it the two ops.",
        {"networks": NAME} | SHAPE | {"ours, ms": time(OURS)} | peers(chosen) | COMPILED_TIMES | shares,
        chosen,
    )


def methods(cases: list[CaseRows]) -> list[Table]:
    """One for each critic, the first with the note."""
    note = (
        "A penalty and its backward to the weights. Above 1 the method is faster than the snippet, in the same rounds. "
        "Peak memory is that of a step in a process of its own, parameter gradients included; fresh memory is what the "
        "system handed out while the step was timed. Errors are those of the weights' gradients, against fp64."
    )
    headings = ["method", "ms", "snippet / method", "peak MB", "of the snippet's", "fresh MB", "error", "error, bf16"]
    timed = [case for case in cases if case.suite == "methods" and "ms" in case.rows[SNIPPET]]
    return [
        Table(
            f"Methods: {case.label}",
            note if case is timed[0] else "",
            headings,
            [[method(name), *costs(case, name)] for name, row in case.rows.items() if "ms" in row],
        )
        for case in timed
    ]


def method(name: str) -> str:
    """Of an implementation of ours; a peer keeps its name."""
    if not is_ours(name):
        return name
    words = name.split(", ")[1:]
    return ", ".join(["double_backward"] * (not words or words[0].startswith("chunks")) + words)


def costs(case: CaseRows, name: str) -> list[str]:
    over = case.rows[name].get(f"over {SNIPPET}")
    whole = case.value(SNIPPET, "peak_mb")
    return [
        case.time(name),
        "" if over is None else interval(inverse(over)),
        case.number(name, "peak_mb", "{:.0f}".format),
        case.number(name, "peak_mb", lambda peak: f"{100 * peak / whole:.0f} %" if whole else ""),
        case.number(name, "fresh_mb", "{:.0f}".format),
        case.number(name, "gradient_error", "{:.1e}".format),
        case.number(name, "bf16_gradient_error", "{:.1e}".format),
    ]


def growth(cases: list[CaseRows]) -> Table:
    """Of the implementations whose memory alone is measured at some batches."""
    chosen = sorted((case for case in cases if case.suite == "methods"), key=lambda case: case.shape[0])
    names = dict.fromkeys(
        (case.name, name) for case in chosen for name, row in case.rows.items() if "ms" not in row and "peak_mb" in row
    )
    chosen = [case for case in chosen if any((case.name, name) in names for name in case.rows)]
    rows = [
        [f"{critic}, {method(name)}", *(case.number(name, "peak_mb", "{:.0f}".format) for case in chosen)]
        for critic, name in names
    ]
    return Table("Peak memory against batch, MB", "", ["batch", *(str(case.shape[0]) for case in chosen)], rows)


def systems(cases: list[CaseRows]) -> Table:
    times = {"ours, ms": time(OURS), "usual, ms": time(USUAL), "tidy, ms": time(TIDY)}
    return table_of(
        "The systems' penalties: the call with a critic, and its backward to the weights",
        "Against the lines as their users write them, and a tidy version; above 1 ours is faster.",
        {"system": NAME} | SHAPE | times | {"usual / ours": ratio(USUAL), "tidy / ours": ratio(TIDY)},
        [case for case in cases if case.suite == "systems"],
    )


TINY = (64, 2)
SYSTEM_SIZES = {
    (64, 3, 64, 64): "64 images of 3 x 64 x 64, one layer of patches",
    TINY: "64 points of a plane, two hidden layers of 64",
}


def extremes(cases: list[CaseRows]) -> Table:
    rows = []
    for size, words in SYSTEM_SIZES.items():
        chosen = [case for case in cases if case.suite == "systems" and case.shape == size]
        medians = [[case.value(peer, f"over {OURS}") for case in chosen] for peer in (USUAL, TIDY)]
        spans = [[found for found in some if found is not None] for some in medians]
        if any(spans):
            rows.append([words, *(f"{min(span):.2f} to {max(span):.2f}" if span else "" for span in spans)])
    title = "The systems' ratios to ours: the medians, from the least to the most"
    return Table(title, "", ["", "the usual lines", "a tidy version"], rows)


def host(cases: list[CaseRows]) -> Table:
    names = {"ours, us": OURS, "empty, us": EMPTY_FUNCTIONS, "snippet, us": SNIPPET}
    return table_of(
        "The host's time, on a GPU that is not there",
        "Processor time of the two ops at (2, 4) on a device that launches nothing, against the snippet's operations "
        "dispatched to CPU tensors; below 1 ours is cheaper. Empty: Functions that do nothing, the least that "
        "`autograd.Function` costs.",
        {"target and ops": NAME}
        | {"launches": lambda case: case.number(OURS, "launches", str)}
        | {heading: time(name, unit=1e-3) for heading, name in names.items()}
        | {"ours / snippet": ratio(OURS, over=SNIPPET)},
        [case for case in cases if case.suite == "host"],
    )


def memory(cases: list[CaseRows]) -> Table:
    """Methods have a column of their own for it."""
    chosen = [case for case in cases if case.suite != "methods" and any("peak_mb" in row for row in case.rows.values())]
    names = dict.fromkeys(name for case in chosen for name, row in case.rows.items() if "peak_mb" in row)
    return Table(
        "Peak memory of a step, MB",
        "Of one step, in a process of its own, above what the process held before; what the step returns counts.",
        ["", *(case.label for case in chosen)],
        [[name, *(case.number(name, "peak_mb", "{:.0f}".format) for case in chosen)] for name in names],
    )


def device(cases: list[CaseRows]) -> Table:
    rows = [
        [case.label, name, case.time(name, "host_ms"), case.time(name, "device_ms"), str(row["launches"])]
        for case in cases
        for name, row in case.rows.items()
        if "device_ms" in row
    ]
    return Table(
        "Host and device",
        "Milliseconds that the host takes to put a step into the queue, and that the device takes for it by its own "
        "events; and how many kernels, copies and fills that is.",
        ["case", "", "host, ms", "device, ms", "launches"],
        rows,
    )


def where_a_peer_wins(cases: list[CaseRows]) -> Table:
    rows = [
        [loss.case.suite, loss.case.label, f"{loss.peer} over {loss.over}", interval(loss.ratio), why(loss)]
        for loss in sorted(lost(cases), key=lambda loss: loss.ratio[0])
    ]
    return Table(
        "Where a peer wins",
        "Every case in which the whole interval of a peer's ratio lies below 1, the largest loss first. A "
        "compiled call is compared with ours compiled, where that was timed, and everything else with our plain call.",
        ["suite", "case", "peer", "ratio", "why"],
        rows,
    )


def not_timed(cases: list[CaseRows]) -> Table:
    reasons = dict.fromkeys(
        (name, case.label if "failed" in row else "", row.get("failed") or row["absent"])
        for case in cases
        for name, row in case.rows.items()
        if "failed" in row or "absent" in row
    )
    return Table("Not timed", "", ["peer", "case", "reason"], [list(reason) for reason in reasons])
