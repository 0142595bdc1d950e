"""A run on one page of pictures: ratios by case, time against size, memory by method."""

from math import prod
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.names import BOTH, COMPILED, COMPILED_CALL, COMPILED_OPS, COPIES, OURS, SNIPPET, TIDY, is_ours
from benchmarks.report.case_rows import CaseRows, Row, by_case

PEERS = {
    SNIPPET: "#003f5c", "norm(2, 1)": "#2f6c8f", TIDY: "#5aa9c9", "TF-GAN": "#7a9e7e", "torch.func": "#8f6fb1",
    COMPILED_CALL: "#c9a227", COMPILED_OPS: "#d98032", "ctgan": "#a0a0a0",
}  # fmt: skip
MOST_PEAKS = 4  # panels of peak memory, those with the most

COLOURS = {OURS: "#d1495b", COMPILED: "#8c1c13", COPIES: "#000000"} | PEERS


def draw(rows: list[Row], path: Path, mark: str = "") -> bool:
    """Whether any of the rows are such that a picture shows. The mark stands above all."""
    every = by_case(rows)
    every = [case for case in every if case.suite != "experiments"]
    one = [case for case in every if case.dtype == "float32" and (case.suite != "ops" or case.name == BOTH)]
    ops = [case for case in one if case.suite == "ops" and "gb_s" in case.rows.get(OURS, {})]
    calls = [case for case in one if case.suite != "ops"]
    if not ops and not calls:
        return False
    has_memory = [case for case in every if case.has_memory and not (case.on_device and case.suite == "ops")]
    largest = sorted(map(largest_peak, has_memory))[-MOST_PEAKS:]
    has_memory = [case for case in has_memory if largest_peak(case) in largest]

    figure = plt.figure(figsize=(13, 17), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=[9, 5, 3.5])
    top, middle, bottom = parts
    about = next(row for row in rows if "machine" in row)
    figure.suptitle(
        f"{mark}Measured on {about['machine']}\n{about['versions']}; commit {about['commit']}, {about['date']}",
        fontsize=10,
    )
    both = ((ops, "the two ops, forward and backward"), (calls, "with a critic; a training step"))
    panels = [(some, title) for some, title in both if some]
    for axes, (some, title) in zip(top.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if some is calls and by_hand(every):
            ways(axes, by_hand(every))
        else:
            ratios(axes, some, title)
    if ops:
        sizes(middle.subplots(), ops)
    if has_memory:
        for axes, case in zip(bottom.subplots(1, len(has_memory), squeeze=False)[0], has_memory, strict=True):
            peaks(axes, case)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def by_hand(cases: list[CaseRows]) -> list[CaseRows]:
    """Those of which every way is compared with the lines by hand, as on a device."""
    return [
        case
        for case in cases
        if case.suite == "penalties" and any(f"over {SNIPPET}" in row for row in case.rows.values())
    ]


def ways(axes: Axes, cases: list[CaseRows]) -> None:
    """Bars of the time by hand over that of each way of ours; beyond the line ours is faster."""
    every = list(dict.fromkeys(name for case in cases for name in case.rows if is_ours(name)))
    shades = mpl.colormaps["plasma"]
    colours = {name: shades(at / max(1, len(every))) for at, name in enumerate(every)}
    place, ticks = 0.0, []
    for case in cases:
        start = place
        for name in every:
            found = case.rows.get(name, {}).get(f"over {SNIPPET}")
            if found is not None:
                axes.barh(place, 1 / found[0], 0.9, color=colours[name], label=name)
                place += 1
        ticks.append(((start + place - 1) / 2, f"{case.name}\n{case.size}"))
        place += 1
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time by hand / time of the way")
    axes.set_title("the whole penalty, and its backward to the weights", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)


def largest_peak(case: CaseRows) -> float:
    return max(row.get("peak_mb", 0.0) for row in case.rows.values())


def ratios(axes: Axes, some: list[CaseRows], title: str) -> None:
    """Bars of each peer's time over ours, with the interval of the ratio; beyond the line ours is faster."""
    place = 0.0
    ticks = []
    for case in some:
        start = place
        for name in PEERS:
            over = COMPILED if name == COMPILED_CALL and "ms" in case.rows.get(COMPILED, {}) else OURS
            found = case.compared(name, over)
            if found is None:
                continue
            value, low, high = found
            label = name if over == OURS else f"{name}, over ours compiled"
            axes.barh(
                place, value, 0.9, color=COLOURS[name], label=label, xerr=[[value - low], [high - value]],
                error_kw={"elinewidth": 0.8},
            )  # fmt: skip
            place += 1
        label = case.size if case.suite == "ops" else f"{case.name}\n{case.size}"
        if case.suite == "training":
            label = f"training step, {label}"
        ticks.append(((start + place - 1) / 2, label))
        place += 1
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time of the peer / ours")
    axes.set_title(title, fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)


def sizes(axes: Axes, ops: list[CaseRows]) -> None:
    """Time against size; the dashed line is the bytes that the step has to move, at copy bandwidth."""
    ordered = sorted(ops, key=lambda case: prod(case.shape))
    what = "device_ms" if any("device_ms" in case.rows[OURS] for case in ordered) else "ms"
    for name in (OURS, *PEERS, COPIES):
        points = [(prod(c.shape), c.rows[name][what][0]) for c in ordered if what in c.rows.get(name, {})]
        if points:
            label = f"{name} of as many bytes" if name == COPIES else name
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=label, markersize=3, linewidth=1.5)
    bound = [(prod(c.shape), 1e-6 * c.rows[OURS]["bytes"] / c.rows[OURS]["copy_gb_s"]) for c in ordered]
    axes.plot(*zip(*bound, strict=True), "--", color="grey", label="the same bytes at copy bandwidth")
    axes.set(xscale="log", yscale="log", xlabel="elements of the batch, fp32", ylabel="milliseconds")
    axes.set_ylim(bottom=0.3 * min(c.rows[OURS][what][0] for c in ordered))  # below it the bound is of no interest
    axes.set_title("interpolation + penalty, forward and backward: time against size", fontsize=11)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def peaks(axes: Axes, case: CaseRows) -> None:
    found = {name: row["peak_mb"] for name, row in case.rows.items() if "peak_mb" in row}
    colours = [COLOURS.get(name, COLOURS[OURS]) for name in found]
    bars = axes.barh(list(found), list(found.values()), color=colours)
    axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(f"peak memory, MB:\n{case.label}", fontsize=10)
