"""Pictures, docs/benchmarks.md and the README's numbers, made of the runs committed in benchmarks/results/.

With the folder that `python -m benchmarks gpu` has left, its run is committed there first, by the device's name. Of a
rehearsal on a CPU the same is made in a folder `report` beside its files, and nothing is committed.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import results
from benchmarks.names import RUN
from benchmarks.report import device_run, readme
from benchmarks.report.case_rows import Row, by_case
from benchmarks.report.device_run import DeviceRun
from benchmarks.report.readme import UNMEASURED
from benchmarks.report.tables import Table, table, tables

ROOT = Path(__file__).parent.parent.parent
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
Runs = dict[str, list[Row]]  # by the file's name

HEAD = """\
# Benchmarks

`make bench`, `make bench-methods`, `make bench-systems` and `make bench-host` measured this page and wrote it
(`python -m benchmarks report` writes it from the committed runs). With `ARGS=--quick` they measure a few cases on your
machine. `python -m benchmarks compare A.json B.json` says what changed between two runs beyond noise.

- **Peers** ([benchmarks/peers](../benchmarks/peers)) are what people use, each in its best form: the snippet that is
  copied from one repository to the next; `norm(2, 1)` without an epsilon; a tidy version of `lerp` and `vector_norm`;
  TF-GAN's formula; `torch.func.grad`; the same under `torch.compile`, and the snippet's two ops under it; and the
  package `ctgan`'s own method.
- **Correctness first.** Value and gradients of every implementation are compared with the reference in fp64 from the
  same inputs and alphas; one that is wrong, or cannot run here, is not timed, and listed.
- **Interleaved.** All run in one process, round after round, each in random order, so that a change of the machine's
  speed affects all. A ratio is taken round by round; its median stands with the interval of order statistics that
  holds the true median in 95 % of all draws. Autograd is timed against autograd, compiled against compiled.
- **Bytes moved.** Each op has to move so many bytes ([the model](../benchmarks/cases/bytes_moved.py)). GB/s are these
  over the time, "of copying" is the share of what a large copy reached in the same run (batches in cache may exceed
  it), and "plain copies" copy as many bytes into freshly allocated tensors.
- Peak memory is that of one step, on a CPU in a process of its own. The first call, which compiles, is not part of any
  time.
- **On a GPU**, where `make gpu` measures, an op's own time on the device is that of one replay of a CUDA graph of many
  calls, over copies of the inputs that together are three times the cache; a penalty's is that between two events
  around work that is all in the queue. The host's time is that of putting it there.
"""
REHEARSAL = (
    "**This is a rehearsal of `make gpu` on a CPU, at tiny sizes: it shows that the command works. None of its numbers "
    "is a measurement.**\n"
)


def page(runs: Runs, devices: dict[str, DeviceRun]) -> str:
    parts = [HEAD, "## CPU\n"]
    if not runs["cpu"]:
        parts.append("Not measured yet.\n")
    for file in ("cpu", "cpu_methods", "cpu_systems"):
        parts += section(file, runs[file])
    parts.append("## GPU\n")
    if not devices:
        parts.append(f"{UNMEASURED}\n")
    parts += section("host", runs["host"])
    for file, run in devices.items():
        parts += of_device(file, run)
    return "\n".join(parts)


def of_device(file: str, run: DeviceRun) -> list[str]:
    """What `gpu` found on it."""
    parts = [
        f"## {run.machine}\n",
        *([REHEARSAL] if run.dry else []),
        f"{provenance([run.about])}{copying(run.rows)}\n",
    ]
    if run.rows:
        parts.append(f"![The tables below as pictures](../benchmarks/results/{file}.png)\n")
    return parts + [titled(table) for table in [*device_run.tables(run), *tables(run.rows)] if table.rows]


def section(file: str, rows: list[Row]) -> list[str]:
    """Of one run."""
    if not rows:
        return []
    parts = [f"{provenance(rows)}{copying(rows)}\n"]
    if picture(file):
        parts.append(f"![The tables below as pictures](../benchmarks/results/{file}.png)\n")
    return parts + [titled(table) for table in [*tables(rows), first_calls(rows)] if table.rows]


def titled(table: Table) -> str:
    return "\n".join([f"### {table.title}\n", *([f"{table.note}\n"] if table.note else []), table.markdown()])


def provenance(rows: list[Row]) -> str:
    row = rows[0]
    return (
        f"{row['machine']}; {row['versions']}; commit {row['commit']}, {row['date']}; load of the machine before it "
        f"began: {row['load']}."
    )


def copying(rows: list[Row]) -> str:
    reached = next((row["copy_gb_s"] for row in rows if "copy_gb_s" in row), None)
    return "" if reached is None else f" Copying reaches {reached:.1f} GB/s, read and written."


def first_calls(rows: list[Row]) -> Table:
    """What compiling takes, once. A training step finds graphs of the penalties before it, and is left out."""
    calls = [
        {"suite": case.suite, "case": case.label, "": name, "seconds": f"{row['first_call_s']:.1f}"}
        for case in by_case(rows)
        for name, row in case.rows.items()
        if "compiled" in name and "ms" in row and "first_call_s" in row and case.suite != "training"
    ]
    note = (
        "Each run begins with an empty cache of compiled graphs; a case may find there a graph of one before it, as "
        "the training steps do, which are left out."
    )
    return table("The first call, seconds", note, calls)


def picture(file: str) -> bool:
    """Whether pictures are drawn of this file's run: of a device's, and of the suites that go with it on a CPU."""
    return file not in {name.format(device="cpu") for name in results.FILES} - {"cpu"}


def draw(path: Path, mark: str = "") -> None:
    """The page of pictures, beside the rows."""
    if not picture(path.stem):
        return
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is missing. Where it is installed, `python -m benchmarks report` draws them")
        return
    from benchmarks.report import pictures

    if pictures.draw(results.load(path), path.with_suffix(".png"), mark):
        print(f"pictures: {path.with_suffix('.png')}")
    else:
        print("no pictures: they are of fp32, of the two ops together and of critics")


def committed_devices() -> dict[str, DeviceRun]:
    return {name: device_run.saved(path) for name, path in results.devices().items()}


def write() -> None:
    runs, devices = results.committed(), committed_devices()
    PAGE.write_text(page(runs, devices))
    README.write_text(readme.readme(README.read_text(), runs, devices))
    print(f"pages: {PAGE.relative_to(ROOT)}, {README.name}")


def main(words: Sequence[str]) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="what `python -m benchmarks gpu` has left")
    parser.add_argument("--replace", action="store_true", help="the committed run of the same device")
    options = parser.parse_args(words)
    if options.folder is not None:
        if not (options.folder / RUN).exists():
            parser.error(f"{options.folder} holds no run of `python -m benchmarks gpu`: there is no {RUN}")
        run = device_run.load(options.folder)
        if run.dry:
            rehearse(run, options.folder / "report")
            return 0
        path = results.COMMITTED / f"{run.name}.json"
        if path.exists() and not options.replace:
            parser.error(f"there is a run of this device already, {path}: --replace takes this one instead")
        run.save(path)
        path.with_suffix(".png").unlink(missing_ok=True)  # the picture of another run
        print(f"run: {path}")
    runs = results.committed()
    if not runs["cpu"]:
        parser.error("there is no benchmarks/results/cpu.json, of which the pages are made: run `make bench` first")
    write()
    for name in [*(name for name, rows in runs.items() if rows), *results.devices()]:
        draw(results.COMMITTED / f"{name}.json")
    return 0


def rehearse(run: DeviceRun, folder: Path) -> None:
    """The same as for a device, and marked: not where the committed runs are."""
    path = folder / "rehearsal.json"
    run.save(path)
    draw(path, "REHEARSAL ON A CPU, NO MEASUREMENT\n")
    nothing: Runs = {name: [] for name in results.committed()}
    text = page(nothing, {path.stem: run}).replace(f"../benchmarks/results/{path.stem}.png", f"{path.stem}.png")
    (folder / PAGE.name).write_text(f"{REHEARSAL}\n{text}")
    (folder / README.name).write_text(f"{REHEARSAL}\n{readme.numbers([], {path.stem: run})}")
    print(f"rehearsed pages: {folder / PAGE.name}, {folder / README.name}")
