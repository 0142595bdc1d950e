"""Pictures, docs/benchmarks.md and the README's numbers, made of the runs committed in benchmarks/results/.

python -m benchmarks.report
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.ops import BOTH
from benchmarks.ours import OURS
from benchmarks.peers import PEERS
from benchmarks.tables import Table, contests, interval, lost, shape, tables

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- written by python -m benchmarks.report -->", "<!-- end -->"
Rows = list[dict[str, Any]]

UNMEASURED = "**GPU times have not been measured yet.**"

METHOD = """\
# Benchmarks

`make bench` measured this page and wrote it (`python -m benchmarks.report` writes it from the committed runs).
`make bench ARGS=--quick` measures a few cases on your machine. `python -m benchmarks.compare A.json B.json` says what
changed between two runs beyond noise.

- **Peers** ([benchmarks/peers](../benchmarks/peers)) are what people use, each in its best form: the snippet that is
  copied from one repository to the next; `norm(2, 1)` without an epsilon; a tidy version of `lerp` and `vector_norm`;
  TF-GAN's formula; `torch.func.grad`; the same under `torch.compile`, and the snippet's two ops under it; and the
  package `ctgan`'s own method.
- **Right first.** Value and gradients of everybody are held to the reference in fp64 from the same inputs and alphas;
  who is wrong, or cannot run here, is not timed, and listed.
- **In turns.** All run in one process, round after round, each in another order, so that a change of the machine's
  speed meets all. A ratio is taken round by round; its median stands with the interval of order statistics that holds
  the true median in 95 % of all draws. Autograd is timed against autograd, compiled against compiled.
- **Roofs.** Each op has to move so many bytes ([benchmarks/traffic.py](../benchmarks/traffic.py)). GB/s are these over
  the time, "of copying" is the share of what a large copy reached in the same run (batches in cache may exceed it), and
  "plain copies" copy as many bytes into freshly allocated tensors.
- Peak memory is that of one step in a process of its own. The first call, which compiles, is not part of any time.
"""


def page(cpu: Rows, cuda: Rows, host: Rows) -> str:
    parts = [METHOD]
    for name, rows in (("CPU", cpu), ("GPU", cuda)):
        parts.append(f"## {name}\n")
        if not rows:
            parts.append(f"{UNMEASURED}\n" if name == "GPU" else "Not measured yet.\n")
            continue
        about = rows[0]
        parts.append(
            f"{about['machine']}; {about['versions']}; commit {about['commit']}, {about['date']}; load of the machine "
            f"before it began: {about['load']}. Copying reaches {_copying(rows):.1f} GB/s, read and written.\n"
        )
        parts.append(f"![The tables below as pictures](../benchmarks/results/{about['device']}.png)\n")
        parts += [markdown(table) for table in tables(rows)]
        parts.append(first_calls(rows))
    if host:
        parts.append(host_time(host))
    return "\n".join(parts)


def host_time(rows: Rows) -> str:
    """What a GPU's launches cost the host, without the GPU."""
    about = rows[0]
    note = (
        "`make bench-host`: processor time of the two ops at (2, 4) on a device that launches nothing, against the "
        "snippet's operations dispatched to CPU tensors; below 1 ours is cheaper (median and quartiles). Bare: "
        "Functions that do nothing, the least that `autograd.Function` costs. "
        f"{about['machine']}; {about['versions']}; commit {about['commit']}, {about['date']}."
    )
    cells = []
    for row in rows:
        times = [f"{row[f'{name}_us']:.0f}" for name in ("ours", "bare", "snippet")]
        ratio = interval([row["ratio"], row["ratio_low"], row["ratio_high"]])
        cells.append([row["target"], row["case"], str(row["launches"]), *times, ratio])
    headings = ["target", "case", "launches", "ours, us", "bare, us", "snippet, us", "ours / snippet"]
    return markdown(Table("The host's time, on a GPU that is not there", note, headings, cells))


def _copying(rows: Rows) -> float:
    return next((float(row["copy_gb_s"]) for row in rows if "copy_gb_s" in row), float("nan"))


def markdown(table: Table) -> str:
    lines = [f"### {table.title}\n", *([f"{table.note}\n"] if table.note else [])]
    lines += [_line(table.headings), "|" + "---|" * len(table.headings), *map(_line, table.rows)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def first_calls(rows: Rows) -> str:
    """What compiling takes, once. A training step finds graphs of the penalties before it, and does not tell."""
    lines = [
        [contest.group, contest.label, name, f"{row['first_call_s']:.1f}"]
        for contest in contests(rows)
        for name, row in contest.rows.items()
        if "compiled" in name and "ms" in row and contest.group != "training step"
    ]
    note = (
        "Each run begins with an empty cache of compiled graphs; a case may find there a graph of one before it, as "
        "the training steps do, which are left out."
    )
    return markdown(Table("The first call, seconds", note, ["what", "case", "", "seconds"], lines))


def numbers(cpu: Rows, cuda: Rows) -> str:
    """The README's part: the two ops against the snippet, and against the fastest of the peers."""
    parts = []
    for rows in (cpu, cuda):
        if not rows:
            continue
        about = rows[0]
        lines = []
        for contest in contests(rows):
            if contest.group == "op" and contest.name == BOTH and contest.dtype == "float32":
                found = {
                    name: row[f"over {OURS}"] for name, row in contest.rows.items() if name in PEERS and "ms" in row
                }
                fastest = min(found, key=lambda name: found[name][0])
                cells = [shape(contest.shape), interval(found["snippet"]), fastest, interval(found[fastest])]
                lines.append(cells)
        beaten = sum(1 for _ in lost(contests(rows)))
        parts.append(
            f"Measured on {about['machine']} ({about['versions'].split(',')[0]}, commit {about['commit']}): the "
            "interpolation, and the penalty forward and backward, in fp32; the peer's time divided by ours, with the "
            "95 % interval of the median.\n"
        )
        headings = ["shape", "the lines above / ours", "the fastest peer", "its time / ours"]
        parts += [_line(headings), "|---|---|---|---|", *map(_line, lines), ""]
        parts.append(
            "[The page of benchmarks](docs/benchmarks.md) has all peers, critics, types and sizes, training steps, "
            f"memory, and the {beaten} comparisons that a peer wins.\n"
        )
    if not cuda:
        parts.append(
            f"{UNMEASURED} The kernels are compiled for NVIDIA sm_75 to sm_120 and AMD gfx90a, gfx942\n"
            "and gfx1100 in the tests, where what comes out is held to a budget, and run there under Triton's\n"
            "interpreter; `make test-gpu` runs the same tests on a device, and `make bench-gpu` measures it.\n"
        )
    return "\n".join(parts)


def readme(text: str, cpu: Rows, cuda: Rows) -> str:
    found = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    assert len(found.findall(text)) == 1
    return found.sub(lambda _: "\n" + numbers(cpu, cuda) + "\n", text)


def draw(path: Path) -> None:
    """The page of pictures, beside the rows."""
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is missing. Where it is installed, `python -m benchmarks.report` draws them")
        return
    from benchmarks import pictures

    if pictures.draw(results.load(path), path.with_suffix(".png")):
        print(f"pictures: {path.with_suffix('.png')}")
    else:
        print("no pictures: they are of fp32, of the two ops together and of critics")


def write() -> None:
    cpu, cuda, host = (results.committed(name) for name in ("cpu", "cuda", "host"))
    PAGE.write_text(page(cpu, cuda, host))
    README.write_text(readme(README.read_text(), cpu, cuda))
    print(f"pages: {PAGE.relative_to(ROOT)}, {README.name}")


def main() -> None:
    for device in ("cpu", "cuda"):
        path = results.COMMITTED / f"{device}.json"
        if path.exists():
            draw(path)
    write()


if __name__ == "__main__":
    main()
