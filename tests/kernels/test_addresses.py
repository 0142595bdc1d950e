"""Every launch accesses its tensors and nothing else, each element as often as the budgets allow, at any size.

This holds for the grids and arguments that the launchers give, in the kernels' own index arithmetic.
"""

import random

import numpy as np
import pytest
import torch

from fused_gp.form import PenaltyForm, accumulation_type

pytest.importorskip("triton", reason="Triton is not installed")

from fused_gp import kernels
from tests.support.kernels.virtual_memory import virtual_memory

TILE_BYTES = 8192  # grids change at widths around one tile, and around those at which rows are split


def shapes(dtype):
    """From one element up, wide and tall; rows of one tile, more and less, and of several."""
    tile = TILE_BYTES // dtype.itemsize
    small = [(1, 1), (1, 7), (2, 4), (7, 1), (65, 33), (1023, 2), (1025, 3)]
    return [*small, (3, tile // 2 + 1), (3, tile - 1), (2, tile), (3, tile + 1), (2, 2 * tile + 1), (1, 4 * tile + 9)]


# Past 2^31 elements: in one row, in all rows together, in many short rows; the last two are rows of a wider tensor.
LARGE = [
    ((1, 2**31 + 5), None),
    ((1, 2**31 + 16), None),
    ((2**16 + 1, 2**16 - 1), None),
    ((2**31 + 9, 1), None),
    ((3, 1000), 2**31 + 8),
    ((2**20 + 1, 5), 2**12),
]

CUDA_GRID = 2**31 - 1

# The arguments that are a batch of rows, each element of which is read or written.
ROW_TENSORS = {"real", "fake", "out", "cotangent", "real_grad", "fake_grad", "points", "gradients", "plus", "minus",
               "cotangents"}  # fmt: skip

DTYPES = [torch.float32, torch.float16, torch.float64]


def form(rows, one_sided=False, squared=False, kappa=None, reduce=True):
    return PenaltyForm(rows, 1.0, one_sided, squared, 1e-12, kappa, 1.0, reduce)


def batch(shape, dtype, stride=None):
    return torch.empty_strided(shape, (stride or shape[1], 1), dtype=dtype)


def contiguous_like(x):
    """A batch of the shape of x with contiguous rows, whatever the stride of x."""
    return batch(x.shape, x.dtype)


def column(x):
    return torch.empty(len(x), 1, dtype=accumulation_type(x.dtype))


def penalty(call, x, form, tensors=1):
    gradients, cotangents, norms = [x] * tensors, [contiguous_like(x)] * tensors, column(x)[:, 0]
    upstream = norms.new_empty(()) if form.reduce else norms
    if call == "forward":
        kernels.penalty_forward(gradients, form)
    elif call == "backward":
        kernels.penalty_backward(gradients, norms, upstream, form)
    else:
        kernels.penalty_double_backward(gradients, norms, upstream, cotangents, form, True)


# op: a call on a batch x; launches; elements read and written, in units of the batch.
OPS = {
    "interpolate": (lambda x: kernels.interpolate(x, contiguous_like(x), column(x)), 1, 2, 1),
    "adjoint": (lambda x: kernels.interpolate_adjoint(x, column(x), True, True), 1, 1, 2),
    "adjoint of fake": (lambda x: kernels.interpolate_adjoint(x, column(x), False, True), 1, 1, 1),
    "perturb": (lambda x: kernels.perturb(x, contiguous_like(x), column(x)), 1, 2, 2),
    "forward": (lambda x: penalty("forward", x, form(len(x))), 1, 1, 0),
    "forward, squared": (lambda x: penalty("forward", x, form(len(x), squared=True, reduce=False)), 1, 1, 0),
    "backward": (lambda x: penalty("backward", x, form(len(x), one_sided=True)), 1, 1, 1),
    "double": (lambda x: penalty("double", x, form(len(x))), 2, 4, 1),
    "double, per sample": (lambda x: penalty("double", x, form(len(x), one_sided=True, reduce=False)), 2, 4, 1),
    "double, squared": (lambda x: penalty("double", x, form(len(x), squared=True)), 2, 3, 1),
    "forward, two tensors": (lambda x: penalty("forward", x, form(len(x)), 2), 2, 2, 0),
    "double, two tensors": (lambda x: penalty("double", x, form(len(x), kappa=column(x)[0, 0]), 2), 4, 8, 2),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [0, 3, 4])
def test_every_element_is_accessed_once(op, dtype, gap):
    """All programs of each launch, on contiguous rows and on rows of a wider tensor."""
    call, expected_launches, reads, writes = OPS[op]
    for shape in shapes(dtype):
        with virtual_memory() as launches:
            call(batch(shape, dtype, shape[1] + gap))
        assert len(launches) == expected_launches
        moved = {"read": 0, "written": 0}
        for launch in launches:
            for program in range(launch.programs):
                launch.run(program)
            for name, tensor in launch.tensors.items():
                where = f"{launch.name}, {name}, {shape}"
                read, written = (access_counts(accessed[name], tensor) for accessed in (launch.read, launch.written))
                if name == "partials":  # a row has a power of two of them, and uses as many as it has programs
                    assert written <= {0, 1}, f"{where}: elements are written {written} times"
                    assert sum(map(len, launch.written[name])) == launch.programs
                else:
                    assert written in ({0}, {1}), f"{where}: elements are written {written} times"
                counted = access_counts(launch.counted[name], tensor)
                assert counted == ({launch.programs} if name == "arrived" else {0}), f"{where}: counted {counted} times"
                if name in ROW_TENSORS:
                    assert len(read) == 1, f"{where}: elements are read {read} times"
                    moved["read"] += read.pop()
                    moved["written"] += written.pop()
                else:
                    assert read == {0} or 0 not in read, f"{where}: elements are left out"
        assert moved == {"read": reads, "written": writes}, shape


def access_counts(accessed, tensor):
    """How often elements of the tensor were accessed: one number, where all were equally often."""
    return set(np.bincount(np.concatenate([np.zeros(0, int), *accessed]), minlength=tensor.numel()).tolist())


@pytest.mark.parametrize("op", ["interpolate", "adjoint", "perturb", "forward", "backward", "double"])
@pytest.mark.parametrize(("shape", "stride"), LARGE)
def test_tensors_of_more_than_2_31_elements(op, shape, stride):
    """The first program, the last, and one between them, of tensors larger than the memory of this machine."""
    with virtual_memory() as launches:
        OPS[op][0](batch(shape, torch.float16, stride))
    for launch in launches:
        assert launch.programs <= CUDA_GRID
        for program in sorted({0, random.Random(0).randrange(launch.programs), launch.programs - 1}):
            launch.run(program)
        for name in ROW_TENSORS & launch.tensors.keys():
            accessed = np.concatenate(launch.read[name] + launch.written[name])
            assert accessed.min() == 0
            if launch.name != "reduce_rows_kernel":  # the last element of a split row is not always the last program's
                assert accessed.max() == launch.tensors[name].numel() - 1
