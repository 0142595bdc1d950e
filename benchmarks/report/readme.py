"""The parts of the README that are numbers, between markers."""

from math import inf

from benchmarks.names import BOTH, OURS, SNIPPET, is_ours, is_peer
from benchmarks.report.case_rows import CaseRows, Row, by_case, interval, inverse, span
from benchmarks.report.device_run import DeviceRun
from benchmarks.report.slower_cases import slower_cases
from benchmarks.report.tables import TINY, extremes, methods, table

END = "<!-- end -->"
PAGE = "[The page of benchmarks](docs/benchmarks.md)"
UNMEASURED_HERE = "Not measured yet.\n"
UNMEASURED = "**GPU times have not been measured yet.**"


def begin(name: str) -> str:
    return f"<!-- {name}: written by python -m benchmarks report -->"


def readme(text: str, runs: dict[str, list[Row]], devices: dict[str, DeviceRun]) -> str:
    parts = {
        "methods": of_methods(runs["cpu_methods"]),
        "numbers": numbers(runs["cpu"], devices),
        "systems": of_systems(runs["cpu_systems"]),
    }
    for name, part in parts.items():
        before, rest = text.split(begin(name) + "\n")
        text = f"{before}{begin(name)}\n\n{part}\n{rest[rest.index(END) :]}"
    return text


def measured_on(rows: list[Row]) -> str:
    row = next(row for row in rows if "ms" in row)
    return f"Measured on {row['machine']} ({row['versions'].split(',')[0]}, commit {row['commit']})"


def numbers(cpu: list[Row], devices: dict[str, DeviceRun]) -> str:
    """The two ops against the snippet, and against the fastest of the peers; on a device whole penalties, too."""
    parts = []
    devices = {name: run for name, run in devices.items() if any("ms" in row for row in run.rows)}
    for rows in filter(None, (cpu, *(run.rows for run in devices.values()))):
        cases = by_case(rows)
        chosen = [case for case in cases if case.suite == "ops" and case.name == BOTH and case.dtype == "float32"]
        whose = "the peer's time on the device" if chosen and chosen[0].on_device else "the peer's time"
        parts.append(
            f"{measured_on(rows)}: the interpolation, and the penalty forward and backward, in fp32; {whose} "
            f"divided by ours, with the 95 % interval of the median.\n\n"
            f"{table('', '', list(filter(None, map(against_peers, chosen)))).markdown()}\n"
            f"{whole_penalties(cases)}{PAGE} has all peers, critics, types and sizes, training steps, memory, and the "
            f"{sum(1 for _ in slower_cases(cases))} comparisons that a peer wins.\n"
        )
    if not devices:
        parts.append(
            f"{UNMEASURED} The kernels are compiled for NVIDIA sm_75 to sm_120 and AMD gfx90a, gfx942\n"
            "and gfx1100 in the tests, where what comes out is compared with a budget, and run there under Triton's\n"
            "interpreter; `make gpu` runs the same tests on a device and measures it, in seven minutes.\n"
        )
    return "\n".join(parts)


def whole_penalties(cases: list[CaseRows]) -> str:
    """On a device: by hand, and by the fastest of our exact ways."""
    rows = []
    for case in cases:
        exact = [name for name in case.rows if is_ours(name) and "directional" not in name]
        ours = [name for name in exact if f"over {SNIPPET}" in case.rows[name]]
        if case.suite == "penalties" and ours and "ms" in case.rows.get(SNIPPET, {}):
            fastest = min(ours, key=lambda name: case.value(name, f"over {SNIPPET}") or inf)
            rows.append(
                {
                    "critic": case.label, "by hand, ms": case.time(SNIPPET), "MB": case.peak(SNIPPET),
                    "our fastest exact way": fastest, "ms": case.time(fastest), "its MB": case.peak(fastest),
                    "by hand / ours": interval(inverse(case.rows[fastest][f"over {SNIPPET}"])),
                }
            )  # fmt: skip
    if not rows:
        return ""
    return f"The whole penalty and its backward to the weights:\n\n{table('', '', rows).markdown()}\n"


def against_peers(case: CaseRows) -> dict[str, str]:
    found = {name: case.compared(name) for name in case.rows if is_peer(name) and case.compared(name)}
    if not found:
        return {}
    fastest = min(found, key=lambda name: found[name][0])
    return {
        "shape": case.size, "the lines above / ours": case.ratio(SNIPPET),
        "the fastest peer": fastest, "its time / ours": interval(found[fastest]),
    }  # fmt: skip


def of_methods(rows: list[Row]) -> str:
    """The tables of the ViT; of the other critics the least and the most."""
    if not rows:
        return UNMEASURED_HERE
    cases = by_case(rows)
    vit, others = ([case for case in cases if (case.name == "ViT") == wanted] for wanted in (True, False))
    ours = [(case, name) for case in others for name, row in case.rows.items() if is_ours(name) and "ms" in row]
    times = [case.value(name, f"over {SNIPPET}") for case, name in ours]
    peaks = [(case.value(name, "peak_mb"), case.value(SNIPPET, "peak_mb")) for case, name in ours]
    shares = [peak / whole for peak, whole in peaks if peak and whole]
    parts = [f"{measured_on(rows)}; batch {vit[0].shape[0]}.\n"]
    in_rounds, against_batch = methods(vit)
    parts += [in_rounds.markdown(), f"Peak memory against batch, MB:\n\n{against_batch.markdown()}"]
    parts.append(
        "On the conv nets of [the page of benchmarks](docs/benchmarks.md) the methods take "
        f"{span(times)} times as long as the snippet, and {span(shares)} times its memory.\n"
    )
    return "\n".join(parts)


def of_systems(rows: list[Row]) -> str:
    if not rows:
        return UNMEASURED_HERE
    cases = by_case(rows)
    ms = [case.value(OURS, "ms") for case in cases if case.shape == TINY]
    return (
        f"{measured_on(rows)}: their time divided by ours, round by round; the median of each penalty, from the least "
        f"of the {len({case.name for case in cases})} to the most.\n\n{extremes(cases).markdown()}\n"
        f"On a problem as small as the second, where a step of ours takes {span(ms)} ms, a step is Python and small "
        "operations alone, and ours\nchecks its arguments and chooses the method in that time, which neither of the "
        "others does.\n"
    )
