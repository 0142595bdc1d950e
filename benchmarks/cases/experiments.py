"""Small experiments on a device, whose answers decide code: convolution's second derivative, and the tiles of the ops.

The ratio is to what is there today: below 1 the other way is faster.
"""

from collections.abc import Callable, Iterator
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
from benchmarks.names import TODAY
from benchmarks.peers import Absent, Implementation

# What each experiment is about; ATTENTION waits for its kernels.
CONVOLUTION, TILES, ATTENTION = "convolution's second derivative", "tiles", "attention's block sizes and warps"


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


@dataclass(frozen=True)
class AttentionCase(Case):
    suite = "experiments"
    budget = 0.0

    def all_implementations(self) -> dict[str, Make]:
        def missing() -> Implementation:
            raise Absent("its kernels do not exist yet")

        return {"every setting": missing}

    def inputs(self, device: str) -> None:
        return None

    def enter(self, implementation: Implementation, inputs: None) -> Entry:
        raise NotImplementedError


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
    attention = AttentionCase(ATTENTION, (1,), tiny={"shape": (1,)})
    return [*some, *of_tiles[:3], *others, *of_tiles[3:], attention]
