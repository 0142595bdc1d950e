"""Every kernel, compiled for every target without a GPU, keeps its budget: each row of `fused_gp inspect`."""

import json
from functools import cache

import pytest

from tests.support.processes import ROOT, python_compiled

pytest.importorskip("triton", reason="Triton is not installed")

import triton

COMPLETE = ["sm_90", "gfx942"]  # all variants of the kernels
PART = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx90a", "gfx1100"]  # the most used variants
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

CONSTRAINTS = (ROOT / "constraints.txt").read_text()
TESTED = dict(line.split("==") for line in CONSTRAINTS.splitlines() if "==" in line)["triton"]
only_for_the_tested_triton = pytest.mark.skipif(
    triton.__version__ != TESTED, reason=f"counts instructions as Triton {TESTED} compiles the kernels"
)

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# Elements read and written for each element of a row.
READ = {
    "interpolate": 2, "interpolate_adjoint": 1, "perturb": 2, "reduce_rows": 1, "reduce_rows, second order": 2,
    "scale_rows": 1, "scale_rows, second order": 2, "scale_rows, second order, squared": 1,
}  # fmt: skip
WRITTEN = {
    "interpolate": 1, "interpolate_adjoint": 2, "interpolate_adjoint of one": 1, "perturb": 2, "reduce_rows": 0,
    "scale_rows": 1,
}  # fmt: skip

# The most instructions for an element of a row, in fp32, half types and fp64: 15 % above those of Triton 3.7.1. In the
# elementwise kernels the few elements of a thread (8 of fp32 where a wavefront has 64 threads) share the fixed costs of
# a program; the reductions are their loop over tiles, or, "short", all but the last sum.
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

# Bytes that a multiprocessor must have in flight: its share of the bandwidth of a device of this target, times
# 0.8 us (1 us on AMD); kernels/tiles.py says why. GB/s and processors of T4, A100, RTX 3090, RTX 4090, H100, B200,
# RTX 5090, one half of an MI250X, MI300X, RX 7900 XTX.
BANDWIDTH = {
    "sm_75": (320, 40), "sm_80": (2039, 108), "sm_86": (936, 82), "sm_89": (1008, 128), "sm_90": (3350, 132),
    "sm_100": (8000, 148), "sm_120": (1792, 170), "gfx90a": (1638, 110), "gfx942": (5300, 304), "gfx1100": (960, 96),
}  # fmt: skip

# From the store of a partial sum to the first loads of others: every thread's store, a barrier, the atomic on the
# arrival counter, which releases and acquires, a barrier. LLVM writes a release as the write-back of caches (where the
# hardware needs one) and a wait for stores, an acquire as an invalidation. gfx1100 waits for its stores before the
# barrier.
ARRIVAL = {
    "sm": ["store", "bar.sync", "atom.global.gpu.acq_rel.add.u32", "bar.sync"],
    "gfx90a": ["store", "s_barrier", "s_waitcnt vmcnt(0)", "global_atomic_add", "s_waitcnt vmcnt(0)",
               "buffer_wbinvl1_vol", "s_barrier"],
    "gfx942": ["store", "s_barrier", "buffer_wbl2", "s_waitcnt vmcnt(0)", "global_atomic_add", "s_waitcnt vmcnt(0)",
               "buffer_inv", "s_barrier"],
    "gfx1100": ["store", "s_waitcnt_vscnt", "s_barrier", "buffer_gl0_inv", "global_atomic_add_u32",
                "s_waitcnt vmcnt(0)", "buffer_gl1_inv", "buffer_gl0_inv", "s_barrier"],
}  # fmt: skip


@cache
def inspected(target):
    return json.loads(python_compiled("-m", "fused_gp", "inspect", "--json", "--target", target))


@cache
def inspected_in_part():
    return json.loads(python_compiled("-c", INSPECT_PART, *PART))


@pytest.fixture(
    params=[
        *[pytest.param(target, marks=pytest.mark.xdist_group(target)) for target in COMPLETE],
        *[pytest.param(target, marks=pytest.mark.xdist_group("in part")) for target in PART],
    ]
)
def rows(request):
    """Compiled once for all tests of a target."""
    if request.param in COMPLETE:
        return inspected(request.param)
    return [row for row in inspected_in_part()["rows"] if row["target"] == request.param]


def family(row):
    return "sm" if row["target"].startswith("sm") else "gfx"


def is_aligned(row):
    return not row["variant"].startswith(("odd rows", "rows of one", "one number"))


def kind_of_rows(row):
    return row["variant"].split(",")[0]


def access_bits(row):
    """The most bits that divide a row, up to the widest access."""
    return 64 if (kind_of_rows(row), row["dtype"]) == ("short rows of 100", "float16") else 128


def lookup(table, row):
    """The entry for a kernel and the options that matter to it: the longest key that fits."""
    kernel = row["kernel"]
    if "second order" in row["variant"]:
        kernel += ", second order"
    for option in ("squared", "short"):
        if option in row["variant"] and f"{kernel}, {option}" in table:
            kernel += f", {option}"
    return table[kernel] if kernel in table else table[row["kernel"]]


def elements_moved(row):
    written = lookup(WRITTEN, row)
    if row["kernel"] == "interpolate_adjoint" and "real and fake" not in row["variant"]:
        written = WRITTEN["interpolate_adjoint of one"]
    return lookup(READ, row), written


def test_every_kernel_and_dtype_is_inspected(rows):
    kernels = {"interpolate", "interpolate_adjoint", "reduce_rows", "scale_rows"}
    if rows[0]["target"] in COMPLETE:
        kernels.add("perturb")
        for kernel in kernels:
            assert {row["dtype"] for row in rows if row["kernel"] == kernel} == set(ITEMSIZE)
    assert {row["kernel"] for row in rows} == kernels


@only_for_the_tested_triton
def test_few_registers_and_no_spills(rows):
    """Four programs of 128 threads fit even with the most registers (65,536 in all)."""
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] <= 128, row
        assert row["shared_bytes"] <= 2048, row


def test_no_element_is_moved_twice(rows):
    for row in rows:
        assert row["moved"] == row["minimum"] == sum(elements_moved(row)), row


@only_for_the_tested_triton
def test_aligned_rows_are_read_and_written_in_wide_accesses(rows):
    """Each element is in one wide access; the few other accesses are for numbers that rows have."""
    for row in rows:
        if not is_aligned(row):
            continue
        reads, writes = elements_moved(row)
        bits = access_bits(row)
        vectors = row["elements"] * ITEMSIZE[row["dtype"]] * 8 / bits
        loads, stores = ({int(bits): n for bits, n in row[kind].items()} for kind in ("loads", "stores"))
        assert vectors == int(vectors) > 0, row
        numbers = (
            2 if "short" in row["variant"] and row["dtype"] != "float32" else 0
        )  # norms of neighbouring rows in one load
        assert reads * vectors <= loads.pop(bits, 0) <= reads * vectors + numbers, row
        rows_of_thread = vectors if kind_of_rows(row) == "short rows of 100" else 2  # and up to three numbers of each
        assert sum(loads.values()) <= 3 * rows_of_thread, row
        assert stores.pop(bits, 0) == writes * vectors, row
        assert sum(stores.values()) <= (2 if row["kernel"] == "reduce_rows" else 0), row


def test_programs_of_one_element_have_no_idle_threads(rows):
    """Where a program has fewer elements than threads, several threads compute the same one."""
    for row in rows:
        if row["variant"].startswith(("rows of one", "one number")):
            assert row["elements"] == 1, row


@only_for_the_tested_triton
def test_instructions_per_element(rows):
    for row in rows:
        if row["variant"].startswith(("rows of one", "one number")):  # fixed costs alone
            continue
        wide = "beside float64" in row["variant"]
        column = 2 if wide or row["dtype"] == "float64" else 0 if row["dtype"] == "float32" else 1
        limit = lookup(INSTRUCTIONS[family(row)], row)[column]
        if row["variant"].startswith("odd rows"):  # one element in each access
            limit *= 2.2
        if kind_of_rows(row) == "short rows of 100":  # a thread computes many of them, with one access of each
            limit *= 1.4
        if (row["target"], row["dtype"]) == ("sm_75", "bfloat16"):  # it has no conversion to bf16
            limit *= 2.1
        assert row["instructions"] / row["elements"] <= limit, row


@only_for_the_tested_triton
def test_bytes_in_flight_use_the_bandwidth(rows):
    """Loads in flight cover the latency of memory at its full bandwidth."""
    for row in rows:
        if not is_aligned(row):
            continue
        gigabytes, processors = BANDWIDTH[row["target"]]
        latency = 800 if family(row) == "sm" else 1000
        threads = 4 * (64 if row["target"].startswith("gfx9") else 32)
        assert row["in_flight_bytes"] * threads * row["programs"] >= gigabytes / processors * latency, row
        if row["kernel"] == "reduce_rows" and "short" not in row["variant"]:  # all of the next tile
            assert row["in_flight_bytes"] >= row["elements"] * ITEMSIZE[row["dtype"]] * elements_moved(row)[0], row
        assert row["occupancy"] >= 0.25, row


def test_reductions_can_use_the_bandwidth():
    """Half of the programs, each with one tile in flight, use the bandwidth of a whole device."""
    from fused_gp.kernels.tiles import PROGRAMS, TILE_BYTES

    for target, (gigabytes, _) in BANDWIDTH.items():
        assert gigabytes * (800 if target.startswith("sm") else 1000) <= PROGRAMS // 2 * TILE_BYTES, target


def test_partial_sums_are_ordered_before_the_last_program_reads_them(rows):
    """One atomic in each program of a reduction with partial sums, with release and acquire around it; none
    elsewhere."""
    for row in rows:
        if row["kernel"] != "reduce_rows" or kind_of_rows(row) in (
            "rows of one",
            "one number",
        ):  # one program for each row
            assert row["arrival"] == [], row
        elif row["arrival"] or not row["variant"].endswith("no mean"):
            store, *others = row["arrival"]
            assert store.startswith(("st.global", "global_store", "buffer_store")), row
            expected = ARRIVAL.get(row["target"], ARRIVAL["sm"])
            assert ["store", *others][: len(expected)] == expected, row


@pytest.mark.xdist_group("in part")
def test_the_table_has_a_line_for_each_row():
    """Below the names of the columns."""
    found = inspected_in_part()
    head, *lines = found["table"].splitlines()
    assert head.split()[:5] == ["target", "kernel", "variant", "dtype", "regs"]
    assert [line.split()[:2] for line in lines] == [[row["target"], row["kernel"]] for row in found["rows"]]
