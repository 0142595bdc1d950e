"""Small experiments on a device, whose answers decide code: the second derivatives of convolution and attention, tiles.

The ratio is to what is there today, or of attention to the blocks that fit every device: below 1 the other is faster.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import ops
from benchmarks.cases.case import Case, Entry, Make
from benchmarks.cases.ops import FACES, LARGE, OpCase
from benchmarks.cases.ours import ours, plain_autograd
from benchmarks.names import FIRST, TODAY
from benchmarks.peers import Absent, Implementation

# What each experiment is about.
CONVOLUTION, TILES, ATTENTION = "convolution's second derivative", "tiles", "attention's second derivative"


def a_way(step: Callable[..., Any]) -> Implementation:
    """What is tried, in the place of a penalty."""
    return Implementation(step)


class Cotangents(NamedTuple):
    """Of the input gradient gI = convolution_backward(gO, W): its own cotangent is ggI."""

    weight: Tensor
    output: Tensor  # gO
    second: Tensor  # ggI


@dataclass(frozen=True)
class ConvolutionCase(Case):
    """From ggI the gradients of gO and W, by torch's own formula and by two calls: gO's is the convolution of ggI with
    W, and W's is that of an ordinary convolution whose input is ggI.
    """

    suite = "experiments"
    budget = 0.3
    bases = (TODAY,)
    stride: int = 1
    groups: int = 1
    tf32: bool = False
    channels_last: bool = False

    def all_implementations(self) -> dict[str, Make]:
        ways = {TODAY: self.by_torch, "convolution_backward": self.by_two_calls}
        return {name: partial(a_way, way) for name, way in ways.items()}

    @contextmanager
    def prepared(self, device: str) -> Iterator[Cotangents]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=self.tf32):
            yield self.inputs(device)

    def inputs(self, device: str) -> Cotangents:
        torch.manual_seed(0)
        batch, channels, height, width = self.shape
        weight = torch.randn(channels, channels // self.groups, 3, 3) / (9 * channels / self.groups) ** 0.5
        output = torch.randn(batch, channels, height // self.stride, width // self.stride)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        tensors = (weight, output, torch.randn(self.shape))
        return Cotangents(*(t.to(device, self.dtype).contiguous(memory_format=layout) for t in tensors))

    def exact(self, inputs: Cotangents) -> Cotangents:
        return Cotangents(*(t.double() for t in inputs))

    def reference_implementation(self) -> Implementation:
        return a_way(self.by_torch)

    def enter(self, implementation: Implementation, inputs: Cotangents) -> Entry:
        step: Any = implementation.gradient_penalty(inputs)
        return Entry(step, step)

    def by_torch(self, given: Cotangents) -> Callable[[], list[Tensor]]:
        weight, output = given.weight.detach().requires_grad_(), given.output.detach().requires_grad_()
        x = torch.zeros_like(given.second).requires_grad_()
        y = F.conv2d(x, weight, None, self.stride, 1, 1, self.groups)
        (input_gradient,) = torch.autograd.grad(y, x, output, create_graph=True)
        return lambda: list(torch.autograd.grad(input_gradient, (output, weight), given.second, retain_graph=True))

    def by_two_calls(self, given: Cotangents) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            of_output = F.conv2d(given.second, given.weight, None, self.stride, 1, 1, self.groups)
            _, of_weight, _ = torch.ops.aten.convolution_backward(
                given.output, given.second, given.weight, None, [self.stride] * 2, [1, 1], [1, 1], False, [0, 0],
                self.groups, [False, True, False],
            )  # fmt: skip
            return [of_output, of_weight]

        return step


@contextmanager
def tiling(tile_bytes: int, warps: int, programs: int) -> Iterator[None]:
    """The kernels with other launch settings, and without those that were compiled or computed before."""
    from fused_gp.kernels import launch, tiles

    def forget() -> None:
        tiles.tile.cache_clear()
        tiles.reduction_tile.cache_clear()

    with (
        mock.patch.multiple(tiles, TILE_BYTES=tile_bytes, PROGRAMS=programs),
        mock.patch.multiple(launch, NUM_WARPS=warps, _compiled={}),
    ):
        forget()
        yield
    forget()


SETTINGS = {
    TODAY: (8192, 4, 2048),
    "4 kB": (4096, 4, 2048), "16 kB": (16384, 4, 2048), "32 kB": (32768, 4, 2048),
    "2 warps": (8192, 2, 2048), "8 warps": (8192, 8, 2048), "16 kB, 8 warps": (16384, 8, 2048),
    "1024 programs": (8192, 4, 1024), "4096 programs": (8192, 4, 4096),
}  # fmt: skip


@dataclass(frozen=True)
class TileCase(OpCase):
    """One at a time, from the settings of `kernels.tiles`."""

    suite = "experiments"
    budget = 0.3
    bases = (TODAY,)
    op: str = ""

    def all_implementations(self) -> dict[str, Make]:
        return {name: partial(self.under, settings) for name, settings in SETTINGS.items()}

    def compiled_ways(self) -> dict[str, Make]:
        return self.implementations()

    def reference_implementation(self) -> Implementation:
        return a_way(partial(ops.OPS[self.op].step, plain_autograd()))

    def under(self, settings: tuple[int, int, int]) -> Implementation:
        def step(inputs: ops.Inputs) -> list[Tensor]:
            with tiling(*settings):
                return ops.OPS[self.op].step(ours()(), inputs)

        return a_way(step)

    def enter(self, implementation: Implementation, inputs: ops.Inputs) -> Entry:
        step: Any = partial(implementation.gradient_penalty, inputs)
        return Entry(step, step)

    def baselines(self, inputs: ops.Inputs) -> dict[str, Any]:
        return {}

    def bytes_moved(self) -> int:
        return OpCase(self.op, self.shape, self.dtype).bytes_moved()


# Stationary and moving block, warps, stages: none of them spills on sm_90, and the first of each on no target.
BLOCKS: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    "row sums": {
        64: ((64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)), 128: ((64, 32, 4, 2), (128, 32, 8, 2)),
    },
    "rows": {
        64: ((64, 32, 4, 2), (64, 32, 8, 2), (128, 64, 8, 2)), 128: ((32, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2)),
    },
    "columns": {
        64: ((64, 32, 4, 2), (64, 32, 8, 2), (128, 64, 8, 2)), 128: ((64, 16, 4, 1), (64, 32, 8, 2), (128, 32, 8, 2)),
    },
}  # fmt: skip


class AttentionInputs(NamedTuple):
    """Of (heads, N, size): q, k, v, do and the cotangents a, b, c; of (heads, N): L, D, t, g."""

    tensors: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    scale: float


@dataclass(frozen=True)
class AttentionCase(Case):
    """One of its three passes, or by torch's math attention all that two of them give."""

    suite = "experiments"
    budget = 0.3
    bases = (FIRST,)
    kernel: str = "rows"

    def all_implementations(self) -> dict[str, Make]:
        size = self.shape[-1]
        first, *others = BLOCKS[self.kernel][64 if size <= 64 else 128]
        ways: dict[str, Make] = {FIRST: partial(self.under, first)}
        ways |= {f"{at[0]} x {at[1]}, {at[2]} warps, {at[3]} stages": partial(self.under, at) for at in others}
        if self.kernel != "row sums":
            ways["math attention, all passes and the first two derivatives"] = lambda: a_way(self.by_math)
        return ways

    def compiled_ways(self) -> dict[str, Make]:
        return {name: make for name, make in self.implementations().items() if not name.startswith("math")}

    def under(self, blocks: tuple[int, int, int, int]) -> Implementation:
        from benchmarks.cases import attention
        from fused_gp.kernels import is_interpreted

        def step(given: AttentionInputs) -> list[Tensor]:
            q, sums = given.tensors[0], given.sums
            if q.device.type == "cpu" and not is_interpreted(attention.rows_kernel):
                raise Absent("needs a device")
            kept, like = (sums[:2], sums[0]) if self.kernel == "row sums" else (sums, q)
            out = [torch.empty_like(like) for _ in range(2)]
            return attention.launch(self.kernel, (*given.tensors, *kept), out, given.scale, *blocks)

        return a_way(step)

    def inputs(self, device: str) -> AttentionInputs:
        torch.manual_seed(0)
        batch, heads, n, size = self.shape
        tensors = tuple(torch.randn(batch * heads, n, size).to(device, self.dtype) for _ in range(7))
        exact = [t.double() for t in tensors]
        sums = _sums(exact, size**-0.5)
        return AttentionInputs(tensors, tuple(t.float() for t in sums), size**-0.5)

    def exact(self, inputs: AttentionInputs) -> AttentionInputs:
        return inputs._replace(tensors=tuple(t.double() for t in inputs.tensors))

    def reference_implementation(self) -> Implementation:
        if self.kernel == "row sums":
            return a_way(lambda given: list(_sums(given.tensors, given.scale)[2:]))
        return a_way(self.by_math)

    def by_math(self, given: AttentionInputs) -> list[Tensor]:
        """For dO and Q, or for K and V: what autograd gives."""
        q, k, v, do, *cotangents = given.tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v, do)]
            out = torch.softmax(leaves[0] @ leaves[1].mT * given.scale, -1) @ leaves[2]
            firsts = torch.autograd.grad(out, leaves[:3], leaves[3], create_graph=True)
            for_q, for_k, for_v, for_do = torch.autograd.grad(firsts, leaves, cotangents)
        return [for_do, for_q] if self.kernel == "rows" else [for_k, for_v]

    def enter(self, implementation: Implementation, inputs: AttentionInputs) -> Entry:
        step: Any = partial(implementation.gradient_penalty, inputs)
        return Entry(step, step)


def _sums(tensors: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L, D, t and g, head by head: all of them at once need N x N numbers."""

    def of_head(q: Tensor, k: Tensor, v: Tensor, do: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        s = q @ k.mT * scale
        p = torch.softmax(s, -1)
        t_part = scale * (a @ k.mT + q @ b.mT)
        t, d = (p * t_part).sum(-1), (do * (p @ v)).sum(-1)
        g = (p * ((do @ v.mT - d[:, None]) * (t_part - t[:, None]) + do @ c.mT)).sum(-1)
        return torch.stack([torch.logsumexp(s, -1), d, t, g])

    lse, d, t, g = torch.stack([of_head(*each) for each in zip(*tensors, strict=True)], 1).unbind()
    return lse, d, t, g


def attentions() -> Iterator[AttentionCase]:
    for shape in ((2, 8, 4096, 64), (8, 8, 1024, 64), (2, 8, 2048, 128)):
        for kernel in BLOCKS:
            name = f"{ATTENTION}: {kernel}, head size {shape[-1]}"
            tiny = {"shape": (1, 2, 40, 16), "dtype": torch.float32} if shape[-1] == 64 else {}
            yield AttentionCase(name, shape, torch.bfloat16, kernel=kernel, tiny=tiny)


def convolutions() -> Iterator[ConvolutionCase]:
    """The first of each kind first: a run may end at any of them."""
    types = {"TF32": (torch.float32, True), "fp32": (torch.float32, False), "bf16": (torch.bfloat16, False)}
    for (stride, channels_last), groups, name in product(
        ((1, False), (2, False), (1, True), (2, True)), (1, 8, 32, 128), types
    ):
        dtype, tf32 = types[name]
        layout = ", channels_last" if channels_last else ""
        yield ConvolutionCase(
            f"{CONVOLUTION}: stride {stride}, groups {groups}, {name}{layout}", (64, 128, 32, 32), dtype,
            stride=stride, groups=groups, tf32=tf32, channels_last=channels_last,
            tiny={"shape": (2, 128, 4, 4)} if groups == 8 else {},
        )  # fmt: skip


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return []
    singles = ("interpolation, forward", "penalty, forward", "penalty, forward and backward")
    of_tiles = [
        TileCase(f"{TILES}: {op}", shape, op=op, tiny={"shape": tuple(min(at, 5) for at in shape)})
        for shape in (LARGE, FACES)
        for op in singles
    ]
    of_convolution = list(convolutions())
    some, others = of_convolution[:12], of_convolution[12:]
    of_attention = list(attentions())
    return [*some, *of_attention[:3], *of_tiles[:3], *of_attention[3:], *others, *of_tiles[3:]]
