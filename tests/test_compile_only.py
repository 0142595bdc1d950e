"""Every kernel, compiled for every GPU we name with no GPU here, keeps its budget: each row of `fused_gp inspect`."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import triton

from fused_gp import kernels
from fused_gp.__main__ import main

COMPLETE = ["sm_90", "gfx942"]  # all variants
PART = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx90a", "gfx1100"]  # what is called most
INSPECT_PART = """
import json, sys, torch
from fused_gp.inspection import LONG, inspect, table
found = []
for target in sys.argv[1:]:
    two = target in ("sm_75", "gfx90a", "gfx1100")  # bf16 is not native to all of them
    dtypes = (torch.float32, torch.bfloat16) if two else (torch.float32,)
    found += inspect(target, [LONG._replace(dtypes=dtypes, calls=("forward", "interpolate", "double"))])
print(json.dumps({"rows": [row._asdict() for row in found], "table": table(found)}))
"""

CONSTRAINTS = (Path(__file__).parent.parent / "constraints.txt").read_text()
TESTED = dict(line.split("==") for line in CONSTRAINTS.splitlines() if "==" in line)["triton"]
counts = pytest.mark.skipif(triton.__version__ != TESTED, reason=f"counts of what Triton {TESTED} makes of the kernels")

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# Elements read and written for each element of a row: the table of the design.
READ = {
    "interpolate": 2, "interpolate_adjoint": 1, "perturb": 2, "reduce_rows": 1, "reduce_rows, second order": 2,
    "scale_rows": 1, "scale_rows, second order": 2, "scale_rows, second order, squared": 1,
}  # fmt: skip
WRITTEN = {
    "interpolate": 1, "interpolate_adjoint": 2, "interpolate_adjoint of one": 1, "perturb": 2, "reduce_rows": 0,
    "scale_rows": 1,
}  # fmt: skip

# The most instructions for an element of a row, in fp32, half types and fp64: what Triton 3.7.1 makes of the kernels,
# and some 15 %. In the elementwise kernels the few elements of a thread (8 of fp32 where a wavefront has 64 threads)
# share all that a program does once; the reductions are their loop over tiles, or, "short", all but the last sum.
INSTRUCTIONS = {
    "sm": {
        "interpolate": (10, 10.5, 18), "interpolate_adjoint": (9.3, 8.7, 16.5), "perturb": (10.5, 11.5, 19),
        "reduce_rows": (5.8, 5.8, 7.5), "reduce_rows, second order": (7, 8.7, 15),
        "reduce_rows, short": (15, 13.5, 22), "reduce_rows, second order, short": (18, 18, 26.5),
        "scale_rows": (11, 11, 33), "scale_rows, second order": (18.5, 19.5, 51),
    },
    "gfx": {
        "interpolate": (16, 17, 32), "interpolate_adjoint": (15, 21.5, 30), "perturb": (17.5, 23.5, 33),
        "reduce_rows": (5.5, 4.5, 9.8), "reduce_rows, second order": (8.7, 7.6, 15),
        "reduce_rows, short": (30, 21.5, 50), "reduce_rows, second order, short": (33, 25, 56),
        "scale_rows": (19.5, 17.5, 38), "scale_rows, second order": (26, 23, 53),
    },
}  # fmt: skip

# Bytes that a multiprocessor must have on their way: its share of the bandwidth of a device of this target, times
# 0.8 us (1 us on AMD); kernels/tiles.py says why. GB/s and processors of T4, A100, RTX 3090, RTX 4090, H100, B200,
# RTX 5090, one half of an MI250X, MI300X, RX 7900 XTX.
BANDWIDTH = {
    "sm_75": (320, 40), "sm_80": (2039, 108), "sm_86": (936, 82), "sm_89": (1008, 128), "sm_90": (3350, 132),
    "sm_100": (8000, 148), "sm_120": (1792, 170), "gfx90a": (1638, 110), "gfx942": (5300, 304), "gfx1100": (960, 96),
}  # fmt: skip

# From the store of a partial sum to the first loads of others': every thread's store, a barrier, the arrival, which
# releases and acquires, a barrier. LLVM writes a release as the write-back of caches (where the hardware needs one) and
# a wait for stores, an acquire as an invalidation. gfx1100 waits for its stores before the barrier.
ARRIVAL = {
    "sm": ["store", "bar.sync", "atom.global.gpu.acq_rel.add.u32", "bar.sync"],
    "gfx90a": ["store", "s_barrier", "s_waitcnt vmcnt(0)", "global_atomic_add", "s_waitcnt vmcnt(0)",
               "buffer_wbinvl1_vol", "s_barrier"],
    "gfx942": ["store", "s_barrier", "buffer_wbl2", "s_waitcnt vmcnt(0)", "global_atomic_add", "s_waitcnt vmcnt(0)",
               "buffer_inv", "s_barrier"],
    "gfx1100": ["store", "s_waitcnt_vscnt", "s_barrier", "buffer_gl0_inv", "global_atomic_add_u32",
                "s_waitcnt vmcnt(0)", "buffer_gl1_inv", "buffer_gl0_inv", "s_barrier"],
}  # fmt: skip


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@cache
def inspected(target):
    done = run("-m", "fused_gp", "inspect", "--json", "--target", target)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@cache
def inspected_in_part():
    done = run("-c", INSPECT_PART, *PART)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(
    params=[
        *[pytest.param(target, marks=pytest.mark.xdist_group(target)) for target in COMPLETE],
        *[pytest.param(target, marks=pytest.mark.xdist_group("in part")) for target in PART],
    ]
)
def rows(request):
    """Compiled once for all the tests of a target."""
    if request.param in COMPLETE:
        return inspected(request.param)
    return [row for row in inspected_in_part()["rows"] if row["target"] == request.param]


def family(row):
    return "sm" if row["target"].startswith("sm") else "gfx"


def is_aligned(row):
    return not row["variant"].startswith(("odd rows", "rows of one", "one number"))


def case(row):
    return row["variant"].split(",")[0]


def access_bits(row):
    """As much as divides the rows, and no more than an access can move."""
    return 64 if (case(row), row["dtype"]) == ("short rows of 100", "float16") else 128


def lookup(table, row):
    """The entry for a kernel and the options that matter to it: the longest that fits."""
    kernel = row["kernel"]
    if "second order" in row["variant"]:
        kernel += ", second order"
    for option in ("squared", "short"):
        if option in row["variant"] and f"{kernel}, {option}" in table:
            kernel += f", {option}"
    return table[kernel] if kernel in table else table[row["kernel"]]


def moved(row):
    written = lookup(WRITTEN, row)
    if row["kernel"] == "interpolate_adjoint" and "real and fake" not in row["variant"]:
        written = WRITTEN["interpolate_adjoint of one"]
    return lookup(READ, row), written


def test_all_is_there(rows):
    kernels = {"interpolate", "interpolate_adjoint", "reduce_rows", "scale_rows"}
    if rows[0]["target"] in COMPLETE:
        kernels.add("perturb")
        for kernel in kernels:
            assert {row["dtype"] for row in rows if row["kernel"] == kernel} == set(ITEMSIZE)
    assert {row["kernel"] for row in rows} == kernels


@counts
def test_registers(rows):
    """No spills; four programs of 128 threads fit even with the most registers (65,536 in all)."""
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] <= 128, row
        assert row["shared_bytes"] <= 2048, row


def test_elements_moved(rows):
    for row in rows:
        assert row["moved"] == row["minimum"] == sum(moved(row)), row


@counts
def test_widths(rows):
    """Of aligned rows each element is in one wide access; besides, there are the few numbers that rows have."""
    for row in rows:
        if not is_aligned(row):
            continue
        reads, writes = moved(row)
        bits = access_bits(row)
        vectors = row["elements"] * ITEMSIZE[row["dtype"]] * 8 / bits
        loads, stores = ({int(bits): n for bits, n in row[kind].items()} for kind in ("loads", "stores"))
        assert vectors == int(vectors) > 0, row
        numbers = (
            2 if "short" in row["variant"] and row["dtype"] != "float32" else 0
        )  # of rows, neighbours, in one load
        assert reads * vectors <= loads.pop(bits, 0) <= reads * vectors + numbers, row
        rows_of_thread = vectors if case(row) == "short rows of 100" else 2  # and up to three numbers of each
        assert sum(loads.values()) <= 3 * rows_of_thread, row
        assert stores.pop(bits, 0) == writes * vectors, row
        assert sum(stores.values()) <= (2 if row["kernel"] == "reduce_rows" else 0), row


def test_no_thread_without_an_element(rows):
    """Where a program has fewer elements than threads, several threads treat the same one."""
    for row in rows:
        if row["variant"].startswith(("rows of one", "one number")):
            assert row["elements"] == 1, row


@counts
def test_instructions(rows):
    for row in rows:
        if row["variant"].startswith(("rows of one", "one number")):  # a program of few elements is all fixed costs
            continue
        wide = "beside float64" in row["variant"]
        column = 2 if wide or row["dtype"] == "float64" else 0 if row["dtype"] == "float32" else 1
        limit = lookup(INSTRUCTIONS[family(row)], row)[column]
        if row["variant"].startswith("odd rows"):  # an element an access
            limit *= 2.2
        if case(row) == "short rows of 100":  # of which a thread treats many, an access of each
            limit *= 1.4
        if (row["target"], row["dtype"]) == ("sm_75", "bfloat16"):  # which has no conversion to bf16
            limit *= 2.1
        assert row["instructions"] / row["elements"] <= limit, row


@counts
def test_bytes_in_flight(rows):
    """Memory has enough to do while the program that waits for it waits: its bandwidth is used."""
    for row in rows:
        if not is_aligned(row):
            continue
        gigabytes, processors = BANDWIDTH[row["target"]]
        latency = 800 if family(row) == "sm" else 1000
        threads = 4 * (64 if row["target"].startswith("gfx9") else 32)
        assert row["in_flight_bytes"] * threads * row["programs"] >= gigabytes / processors * latency, row
        if row["kernel"] == "reduce_rows" and "short" not in row["variant"]:  # the whole of the next tile, at once
            assert row["in_flight_bytes"] >= row["elements"] * ITEMSIZE[row["dtype"]] * moved(row)[0], row
        assert row["occupancy"] >= 0.25, row


def test_reductions_may_have_enough_programs():
    """Half of them, as many as many a shape gets, with a tile each on its way, use the bandwidth of a whole device."""
    from fused_gp.kernels.tiles import PROGRAMS, TILE_BYTES

    for target, (gigabytes, _) in BANDWIDTH.items():
        assert gigabytes * (800 if target.startswith("sm") else 1000) <= PROGRAMS // 2 * TILE_BYTES, target


def test_arrival(rows):
    """One in each program of a reduction that has partial sums to hand on, with the order that they need."""
    for row in rows:
        if row["kernel"] != "reduce_rows" or case(row) in ("rows of one", "one number"):  # where a program is alone
            assert row["arrival"] == [], row
        elif row["arrival"] or not row["variant"].endswith("no mean"):
            store, *others = row["arrival"]
            assert store.startswith(("st.global", "global_store", "buffer_store")), row
            expected = ARRIVAL.get(row["target"], ARRIVAL["sm"])
            assert ["store", *others][: len(expected)] == expected, row


def test_code_behind_the_arrival():
    """Compilers may place a loop there; it is what runs before that is read."""
    from fused_gp.inspection import _Instruction, _loops_over_tiles, _up_to

    code = [
        _Instruction("s_cbranch_execz", jump=5),
        _Instruction("s_barrier"),
        _Instruction("global_atomic_add"),
        _Instruction("global_load_dword", load=32),
        _Instruction("s_endpgm"),
        _Instruction("global_load_dwordx4", load=128),
        _Instruction("s_cbranch_scc1", jump=5),
        _Instruction("s_branch", jump=1),
        _Instruction("s_endpgm"),
    ]
    before = _up_to(2, code)
    assert [i.text for i in before] == [code[at].text for at in (0, 1, 5, 6, 7)]
    assert [i.load for loop in _loops_over_tiles(before) for i in loop] == [128, 0]
    assert _up_to(None, code) == code


def refused(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fused_gp", "inspect", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    return capsys.readouterr().err


def test_unknown_targets_are_told(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    error = refused(monkeypatch, capsys, "--target", "sm_90", "sm_91")
    assert "argument --target: must be among sm_75, sm_80" in error
    assert "got sm_91" in error


def test_interpreted_kernels_are_told(monkeypatch, capsys):
    """As they are in this process."""
    assert "TRITON_INTERPRET=1 has them interpreted: unset it" in refused(monkeypatch, capsys)


@pytest.mark.xdist_group("in part")
def test_table():
    """A line for each row, below the names of the columns."""
    found = inspected_in_part()
    head, *lines = found["table"].splitlines()
    assert head.split()[:5] == ["target", "kernel", "variant", "dtype", "regs"]
    assert [line.split()[:2] for line in lines] == [[row["target"], row["kernel"]] for row in found["rows"]]
