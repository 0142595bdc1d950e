"""The tables of the terminal and of the pages, made of the rows of one run."""

from typing import NamedTuple

from benchmarks import names
from benchmarks.names import COMPILED, COMPILED_CALL, OURS, SNIPPET, TIDY, TWO_OPS, USUAL, is_ours, is_peer
from benchmarks.report.case_rows import CaseRows, Row, by_case, interval, inverse, span
from benchmarks.report.slower_cases import slower_cases, why

Cells = dict[str, str]  # by heading


class Table(NamedTuple):
    title: str
    note: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Without title and note."""
        heading, *rows = (f"| {' | '.join(row)} |" for row in [self.headings, *self.rows])
        return "\n".join([heading, "|" + "---|" * len(self.headings), *rows]) + "\n"


def table(title: str, note: str, rows: list[Cells]) -> Table:
    """Headings are those of any row."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    return Table(title, note, headings, [[row.get(heading, "") for heading in headings] for row in rows])


def tables(rows: list[Row]) -> list[Table]:
    cases = by_case(rows)
    every = [
        table for suite, make in OF_SUITE.items() for table in make([case for case in cases if case.suite == suite])
    ]
    every += [memory(cases), device(cases), where_a_peer_wins(cases), not_timed(cases)]
    return [table for table in every if table.rows]


def times(case: CaseRows) -> Cells:
    """Ours, and the ratios of the peers to it, but of that which is compared with ours compiled."""
    peers = [name for name in case.rows if is_peer(name) and name != COMPILED_CALL and "ms" in case.rows[name]]
    own = "device_ms" if case.suite == "ops" and case.on_device else "ms"
    return {"ours, ms": case.time(OURS, own), **{name: case.ratio(name) for name in peers}}


def compiled(case: CaseRows) -> Cells:
    return {
        "ours compiled, ms": case.time(COMPILED),
        f"{COMPILED_CALL}, over ours compiled": case.ratio(COMPILED_CALL, over=COMPILED),
    }


def copying(case: CaseRows) -> Cells:
    """How near ours comes to it."""
    row, copies = case.rows.get(OURS, {}), case.compared(names.COPIES)
    return {
        "ours / plain copies": f"{1 / copies[0]:.2f}" if copies else "",
        "GB/s": case.number(OURS, "gb_s", "{:.1f}".format),
        "of copying": case.number(OURS, "gb_s", lambda gb_s: f"{100 * gb_s / row['copy_gb_s']:.0f} %")
        + ("" if row.get("cold", True) else ", in cache"),
    }


def ops(cases: list[CaseRows]) -> list[Table]:
    both, single = ([case for case in cases if (case.name == names.BOTH) == wanted] for wanted in (True, False))
    return [
        table(
            "Interpolation, and the penalty forward and backward",
            "Everything in the penalty of a critic's step except the critic itself. Time of each peer divided by ours, "
            "on a device its own; above 1 ours is faster.",
            [{"shape": case.size, "type": case.dtype, **times(case), **copying(case)} for case in both],
        ),
        table(
            "The ops one by one",
            "The same. The double backward is timed with the forward and the backward that it needs.",
            [{"op": case.name, "shape": case.size, **times(case), **copying(case)} for case in single],
        ),
    ]


def penalties(cases: list[CaseRows]) -> list[Table]:
    if any(f"over {SNIPPET}" in row for case in cases for row in case.rows.values()):
        return [ways(cases)]
    rows = [
        {
            "critic": case.name, "shape": case.size, "type": case.dtype, **times(case), **compiled(case),
            f"{COMPILED_CALL}, over ours": case.ratio(COMPILED_CALL), "the two ops": case.share(TWO_OPS),
        }
        for case in cases
    ]  # fmt: skip
    note = (
        "Time of each peer divided by ours; compiled against compiled, and against the plain call. The last column is "
        "how much of our time the two ops take: fusing them can save no more than that."
    )
    return [table("The whole penalty: the call with a critic, and its backward to the weights", note, rows)]


def ways(cases: list[CaseRows]) -> Table:
    """On a device, where each critic is penalised by hand and by every way of ours that serves it."""
    rows = [
        {
            "critic": case.label, "way": name, "ms": case.time(name),
            "by hand / way": interval(inverse(row[f"over {SNIPPET}"])) if f"over {SNIPPET}" in row else "",
            "device, ms": case.time(name, "device_ms"), "launches": case.number(name, "launches", str),
            "busy, ms": case.time(name, "busy_ms"), "peak MB": case.peak(name),
            "error": case.number(name, "error", "{:.1e}".format),
        }
        for case in cases
        for name, row in case.rows.items()
        if "ms" in row and name not in names.BASELINES
    ]  # fmt: skip
    note = (
        "By hand is the snippet. Device: between two events, with all the work in the queue; none of a step that "
        "waits for the device in its middle. Busy: what its kernels take together, without gaps. The error is that of "
        "value and weights' gradients against fp64, without TF32."
    )
    return table("The whole penalty: the call with a critic, and its backward to the weights", note, rows)


def experiments(cases: list[CaseRows]) -> list[Table]:
    """A table for each kind: the ways of its cases beside one another, as parts of what it takes today."""
    kinds = dict.fromkeys(case.name.split(":")[0] for case in cases)
    return [
        table(
            f"Experiment: {kind}",
            "The device's time of each way over that of the first; below 1 it is faster.",
            [
                {
                    "case": case.name.partition(": ")[2], "shape": case.size,
                    "first": first(case), "its device us": case.time(first(case), "device_ms", 1e-3),
                    **{name: on_device(row, first(case)) for name, row in case.rows.items() if name != first(case)},
                    "launches": " / ".join(str(row["launches"]) for row in case.rows.values() if "launches" in row),
                }
                for case in cases
                if case.name.split(":")[0] == kind and any("ms" in row for row in case.rows.values())
            ],
        )
        for kind in kinds
    ]  # fmt: skip


def first(case: CaseRows) -> str:
    return next(name for name in (names.TODAY, names.FIRST) if name in case.rows or name == names.FIRST)


def on_device(row: Row, base: str) -> str:
    """The ratio to the first way's time, or on a CPU that of the whole."""
    found = row.get(f"device, over {base}") or row.get(f"over {base}")
    return interval(found) if found else ""


def training(cases: list[CaseRows]) -> list[Table]:
    rows = [
        {
            "networks": case.name, "shape": case.size, **times(case), **compiled(case),
            "the penalty": case.share(names.NO_PENALTY, less=True), "the two ops": case.share(TWO_OPS),
        }
        for case in cases
    ]  # fmt: skip
    note = "The last two columns: how much of the step the penalty takes, and how much of it the two ops."
    return [table("A whole WGAN-GP training step: five updates of the critic and one of the generator", note, rows)]


def methods(cases: list[CaseRows]) -> list[Table]:
    """One for each critic, the first with the note; and memory against batch."""
    note = (
        "A penalty and its backward to the weights. Above 1 the method is faster than the snippet, in the same rounds. "
        "Peak memory is that of a step in a process of its own, parameter gradients included; fresh memory is what the "
        "system handed out while the step was timed. Errors are those of the weights' gradients, against fp64."
    )
    found = [table(f"Methods: {case.label}", note, costs(case)) for case in cases if case.timed]
    return [*found[:1], *(table._replace(note="") for table in found[1:]), growth(cases)]


def costs(case: CaseRows) -> list[Cells]:
    whole = case.value(SNIPPET, "peak_mb")
    return [
        {
            "method": method(name),
            "ms": case.time(name),
            "snippet / method": interval(inverse(row[f"over {SNIPPET}"])) if f"over {SNIPPET}" in row else "",
            "peak MB": case.peak(name),
            "of the snippet's": f"{100 * row['peak_mb'] / whole:.0f} %" if whole and "peak_mb" in row else "",
            "fresh MB": case.number(name, "fresh_mb", "{:.0f}".format),
            "error": case.number(name, "gradient_error", "{:.1e}".format),
            "error, bf16": case.number(name, "bf16_gradient_error", "{:.1e}".format),
        }
        for name, row in case.rows.items()
    ]


def method(name: str) -> str:
    """Of an implementation of ours; a peer keeps its name."""
    words = name.split(", ")[1:]
    default = ["double_backward"] if not words or words[0].startswith("chunks") else []
    return ", ".join(default + words) if is_ours(name) else name


def growth(cases: list[CaseRows]) -> Table:
    """Of the implementations whose memory alone is measured at some batches."""
    cases = sorted(cases, key=lambda case: case.shape[0])
    found = dict.fromkeys((case.name, name) for case in cases if not case.timed for name in case.rows)
    rows = [
        {"batch": f"{critic}, {method(name)}"}
        | {str(case.shape[0]): case.peak(name) for case in cases if case.name == critic}
        for critic, name in found
    ]
    return table("Peak memory against batch, MB", "", rows)


TINY = (64, 2)
SYSTEM_SIZES = {
    (64, 3, 64, 64): "64 images of 3 x 64 x 64, one layer of patches",
    TINY: "64 points of a plane, two hidden layers of 64",
}


def systems(cases: list[CaseRows]) -> list[Table]:
    rows = [
        {
            "system": case.name, "shape": case.size, "ours, ms": case.time(OURS),
            "usual, ms": case.time(USUAL), "tidy, ms": case.time(TIDY),
            "usual / ours": case.ratio(USUAL), "tidy / ours": case.ratio(TIDY),
        }
        for case in cases
    ]  # fmt: skip
    note = "Against the lines as their users write them, and a tidy version; above 1 ours is faster."
    title = "The systems' penalties: the call with a critic, and its backward to the weights"
    return [table(title, note, rows), extremes(cases)]


def extremes(cases: list[CaseRows]) -> Table:
    """Of the ratios, at each size."""
    of_size = {words: [case for case in cases if case.shape == size] for size, words in SYSTEM_SIZES.items()}
    rows = [
        {
            "": words,
            "the usual lines": span(case.value(USUAL, f"over {OURS}") for case in chosen),
            "a tidy version": span(case.value(TIDY, f"over {OURS}") for case in chosen),
        }
        for words, chosen in of_size.items()
        if chosen
    ]
    return table("The systems' ratios to ours: the medians, from the least to the most", "", rows)


def host(cases: list[CaseRows]) -> list[Table]:
    rows = [
        {
            "target and ops": case.name, "launches": case.number(OURS, "launches", str),
            "ours, us": case.time(OURS, unit=1e-3), "empty, us": case.time(names.EMPTY_FUNCTIONS, unit=1e-3),
            "snippet, us": case.time(SNIPPET, unit=1e-3), "ours / snippet": case.ratio(OURS, over=SNIPPET),
        }
        for case in cases
    ]  # fmt: skip
    note = (
        "Processor time of the two ops at (2, 4) on a device that launches nothing, against the snippet's operations "
        "dispatched to CPU tensors; below 1 ours is cheaper. Empty: Functions that do nothing, the least that "
        "`autograd.Function` costs."
    )
    return [table("The host's time, on a simulated GPU", note, rows)]


OF_SUITE = {
    "ops": ops, "penalties": penalties, "training": training, "methods": methods, "systems": systems, "host": host,
    "experiments": experiments,
}  # fmt: skip


def memory(cases: list[CaseRows]) -> Table:
    """Methods have a column of their own for it, and so have penalties on a device."""
    measured = [
        case
        for case in cases
        if case.suite not in ("methods", "experiments")
        and case.has_memory
        and not (case.on_device and case.suite != "ops")
    ]
    found = dict.fromkeys(name for case in measured for name, row in case.rows.items() if "peak_mb" in row)
    return table(
        "Peak memory of a step, MB",
        "Of one step, on a CPU in a process of its own, above what the process held before; what it returns counts.",
        [{"": name, **{case.label: case.peak(name) for case in measured}} for name in found],
    )


def device(cases: list[CaseRows]) -> Table:
    rows = [
        {
            "case": case.label, "": name, "host, ms": case.time(name, "host_ms"),
            "device, ms": case.time(name, "device_ms"), "launches": case.number(name, "launches", str),
        }
        for case in cases
        for name, row in case.rows.items()
        if "device_ms" in row and case.suite not in ("penalties", "experiments")
    ]  # fmt: skip
    note = (
        "Milliseconds that the host takes to put a step into the queue, and that the device takes for it by its own "
        "events; and how many kernels, copies and fills that is."
    )
    return table("Host and device", note, rows)


def where_a_peer_wins(cases: list[CaseRows]) -> Table:
    rows = [
        {
            "suite": slower.case.suite, "case": slower.case.label, "peer": f"{slower.peer} over {slower.over}",
            "ratio": interval(slower.ratio), "why": why(slower),
        }
        for slower in sorted(slower_cases(cases), key=lambda slower: slower.ratio[0])
    ]  # fmt: skip
    note = (
        "Every case in which the whole interval of a peer's ratio lies below 1, the largest loss first. A compiled "
        "call is compared with ours compiled, where that was timed, and everything else with our plain call."
    )
    return table("Where a peer wins", note, rows)


def not_timed(cases: list[CaseRows]) -> Table:
    reasons = dict.fromkeys(
        (name, case.label if "failed" in row else "", row.get("failed") or row["absent"])
        for case in cases
        for name, row in case.rows.items()
        if "failed" in row or "absent" in row
    )
    return table("Not timed", "", [{"peer": peer, "case": case, "reason": reason} for peer, case, reason in reasons])
