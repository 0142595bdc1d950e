"""Run every launcher under Triton's interpreter on tensors that end, or begin, beside pages without access.

Run by tests/kernels/test_memory_safety.py in processes of their own, because an access outside of a tensor ends the
process; the last line printed is the case:

    python -m tests.support.kernels.guarded_kernels float32
"""

import ctypes
import itertools
import mmap
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

from fused_gp import arguments, kernels
from fused_gp.form import accumulation_type
from fused_gp.kernels import launch, tiles
from tests.support.kernels import interpreter

interpreter.mend()

PAGE = mmap.PAGESIZE
BORDER = 0xFF  # in every byte: NaN in each of the floating types

mprotect = ctypes.CDLL(None, use_errno=True).mprotect
mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


new_empty, empty_like, zeros = torch.Tensor.new_empty, torch.empty_like, torch.zeros


class Memory:
    """Allocates tensors in pages of their own between two pages without access, flush with the latter or the former."""

    def __init__(self, side):
        self.side, self.made = side, []

    def __enter__(self):
        """Tensors that the launchers allocate are allocated here too."""
        torch.Tensor.new_empty = lambda like, *shape, dtype=None, **options: (
            new_empty(like, *shape, dtype=dtype, **options) if options else self.empty(shape, dtype or like.dtype)
        )  # with options: the interpreter's own, which is empty
        torch.empty_like = lambda like: self.empty(like.shape, like.dtype)
        torch.zeros = lambda *shape, dtype, device: self.empty(shape, dtype).zero_()
        launch._zeroed.clear()

    def __exit__(self, *error):
        torch.Tensor.new_empty, torch.empty_like, torch.zeros = new_empty, empty_like, zeros
        launch._zeroed.clear()

    def empty(self, shape, dtype):
        """As torch.empty; full of NaN."""
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        room = -(-nbytes // PAGE) * PAGE
        pages = mmap.mmap(-1, room + 2 * PAGE)
        begin = PAGE + (room - nbytes if self.side == "end" else 0)
        pages[PAGE : PAGE + room] = bytes([BORDER]) * room
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        for guard in (address, address + PAGE + room):
            if mprotect(guard, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.made.append((pages, PAGE, begin, begin + nbytes, PAGE + room))
        return torch.frombuffer(pages, dtype=dtype, count=nbytes // dtype.itemsize, offset=begin).view(shape)

    def rows(self, values, gap):
        """A copy with `gap` elements between rows, and none after the last row."""
        rows, width = values.shape
        stride = width + gap
        flat = self.empty([(rows - 1) * stride + width], values.dtype)
        copy = flat.as_strided((rows, width), (stride, 1))
        copy.copy_(values)
        return copy

    def check_borders(self):
        for pages, first, begin, end, last in self.made:
            outside = pages[first:begin] + pages[end:last]
            assert outside == bytes([BORDER]) * len(outside), "written outside of a tensor"


# Constants of tiles.py, so small that all its thresholds lie close together.
SMALL = {"TILE_BYTES": 256, "PROGRAMS": 8}


def cases(dtype):
    """Constants, rows and widths: on both sides of every threshold of the small constants, and around a real tile."""
    tile = SMALL["TILE_BYTES"] // dtype.itemsize
    widths = [1, 2, 3, 5, *[n + d for n in (tile // 2, tile, 2 * tile, 4 * tile) for d in (-1, 0, 1)], 8 * tile]
    for rows, width in itertools.product((1, 2, 3, 5, 7, 8, 9), widths):
        if rows * width <= 8 * tile:
            yield SMALL, rows, width
    for rows, width in itertools.product((tile - 1, tile, tile + 1), (1, 2)):
        yield SMALL, rows, width
    tile = tiles.TILE_BYTES // dtype.itemsize
    for width in (1, 37, tile - 1, tile, tile + 1, 2 * tile + 1, 4 * tile + 1):
        yield {}, 3, width
    for rows in (tile - 1, tile, tile + 1):
        yield {}, rows, 1


def calls(memory, rows, width, dtype, gap, reduction):
    """Every launcher and its arguments."""
    acc = accumulation_type(dtype)
    x, y = (memory.rows(torch.randn(rows, width).to(dtype), gap) for _ in range(2))
    column, upstream = (memory.rows(torch.rand(1, rows).to(acc) + 0.1, 0)[0] for _ in range(2))
    norms = memory.rows(torch.rand(1, rows).to(acc) + 1, 0)[0]  # with small ones fp16 results would overflow
    yield "interpolate", (x, y, column.view(rows, 1))
    yield "interpolate_adjoint", (x, column.view(rows, 1), True, True)
    yield "perturb", (x, y, column.view(rows, 1))
    form = arguments.penalty_form(len(x), 0.7, False, 1e-12, 1.0, reduction, False)
    form = form._replace(kappa=memory.rows(torch.ones(1, 1).to(acc), 0))
    upstream = memory.rows(torch.ones(1, 1).to(acc), 0).view(()) if form.reduce else upstream
    yield "penalty_forward", ([x, y], form)
    yield "penalty_backward", ([x], norms, upstream, form)
    yield "penalty_double_backward", ([x], norms, upstream, [y], form, True)


def flat(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for result in results for tensor in flat(result)]


def check(rows, width, dtype, side, gap, reduction):
    memory = Memory(side)
    for name, args in calls(memory, rows, width, dtype, gap, reduction):
        print(name, f"({rows}, {width}) {dtype}, {gap} elements between rows, at the {side} of a page", flush=True)
        with memory:
            results = flat(getattr(kernels, name)(*args))
        assert all(result.isfinite().all() for result in results), (
            "uninitialised memory was read, or a result not written"
        )
        memory.check_borders()


@triton.jit
def lost_mask_kernel(x, out, width, COLS: tl.constexpr):
    col = tl.arange(0, COLS)
    tl.store(out + col, tl.load(x + col), mask=col < width)


def main(name: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "lost-mask":  # to check that it is detected
        memory = Memory("end")
        print(name, flush=True)
        lost_mask_kernel[(1,)](memory.empty([5], torch.float32), memory.empty([5], torch.float32), 5, COLS=8)
        return
    dtype = getattr(torch, name)
    real = {constant: getattr(tiles, constant) for constant in SMALL}
    for index, (table, rows, width) in enumerate(cases(dtype)):
        vars(tiles).update(real | table)
        tiles.tile.cache_clear()
        tiles.reduction_tile.cache_clear()
        side, gap, reduction = (
            ("end", "end", "beginning")[index % 3],
            (0, 5)[index % 2],
            ("mean", "none")[index // 2 % 2],
        )
        check(rows, width, dtype, side, gap, reduction)
    print(index + 1, "shapes")


if __name__ == "__main__":
    main(*sys.argv[1:])
