"""The whole penalty: the call with a critic, and its backward to the weights."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_gp
from benchmarks.cases import critics, ops
from benchmarks.cases.case import CallCase, Case, Entry, Make, Step, seeded
from benchmarks.cases.ops import MNIST
from benchmarks.cases.ours import ours, planned
from benchmarks.names import COMPILED, COMPILED_CALL, FLASH, GRAPH, GROUPED, OURS, SNIPPET, TIDY, TWO_OPS, is_ours
from benchmarks.peers import Implementation

# Of a central difference, whose weights are rounded to bf16: 9e-2 was seen behind thirty blocks of attention. The error
# itself stands in the row.
FIRST_ORDER_BF16 = 0.15


class Inputs(NamedTuple):
    critic: nn.Module
    real: Tensor
    fake: Tensor


@dataclass(frozen=True)
class PenaltyCase(CallCase):
    suite = "penalties"
    budget = 6.0
    critic: Callable[[], nn.Module] = nn.Identity
    group_size: int = 1
    attention: bool = False  # in the critic
    peers: tuple[str, ...] = ()  # these alone
    to_come: tuple[str, ...] = ()  # of `names.PLANNED`, what would serve this critic

    def all_implementations(self) -> dict[str, Make]:
        every = super().all_implementations()
        if self.peers:
            every = {name: make for name, make in every.items() if is_ours(name) or name in self.peers}
        return {**every, **planned(*self.to_come)}

    def compiled_ways(self) -> dict[str, Make]:
        """The kernels of the others are those of the ops."""
        return {name: make for name, make in self.implementations().items() if "compiled" in name}

    def inputs(self, device: str) -> Inputs:
        torch.manual_seed(0)
        real, fake = torch.randn(self.shape), torch.randn(self.shape)
        return Inputs(self.critic().to(device, self.dtype), real.to(device, self.dtype), fake.to(device, self.dtype))

    def exact(self, inputs: Inputs) -> Inputs:
        return Inputs(copy.deepcopy(inputs.critic).double(), inputs.real.double(), inputs.fake.double())

    def reference(self, inputs: Inputs) -> list[Tensor] | None:
        """With attention, sample by sample: in fp64, that of a whole batch with long sequences fits no device."""
        if not self.attention:
            return super().reference(inputs)
        critic, real, fake = self.exact(inputs)

        def step() -> list[Tensor]:
            alpha = torch.rand((len(real), *[1] * (real.ndim - 1)), device=real.device).double()
            total = [torch.zeros_like(t) for t in (real.new_zeros(()), *critic.parameters())]
            for sample in zip(real, fake, alpha, strict=True):
                x, y, a = (t[None] for t in sample)
                with math_attention():
                    value = fused_gp.reference.fused_gradient_penalty(critic, x, y, alpha=a)
                    grads = torch.autograd.grad(value, list(critic.parameters()), materialize_grads=True)
                for part, new in zip(total, (value.detach(), *grads), strict=True):
                    part += new / len(real)
            return total

        return seeded(step)

    def tolerance(self, device: str, implementation: Implementation) -> float:
        allowed = super().tolerance(device, implementation)
        return FIRST_ORDER_BF16 if implementation.first_order and self.dtype == torch.bfloat16 else allowed

    def enter(self, implementation: Implementation, inputs: Inputs) -> Entry:
        critic = copy.deepcopy(inputs.critic)
        penalty = self.penalty_of(implementation)
        weights = list(critic.parameters())
        attention = math_attention if self.attention and not implementation.first_order else nullcontext

        def step() -> list[Tensor]:
            with attention():
                value = penalty(critic, inputs.real, inputs.fake)
                return [value, *torch.autograd.grad(value, weights, materialize_grads=True)]

        return Entry(step, step)

    def penalty_of(self, implementation: Implementation) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        """With groups, an implementation that has none is given the rows of a group as one row: a view."""
        penalty = implementation.gradient_penalty
        if self.group_size == 1:
            return penalty
        if implementation.groups:
            return partial(penalty, group_size=self.group_size)
        groups = self.shape[0] // self.group_size
        return lambda critic, real, fake: penalty(critic, real.view(groups, -1), fake.view(groups, -1))

    def baselines(self, inputs: Inputs) -> dict[str, Step]:
        return {TWO_OPS: two_ops(inputs.real, inputs.fake)}


def two_ops(real: Tensor, fake: Tensor) -> Step:
    """Ours, on samples of this shape."""
    alpha = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device, dtype=real.dtype)
    given = ops.Inputs(real, fake, alpha, gradients=torch.randn_like(real), cotangent=real)
    return partial(ops.both, ours()(), given)


def math_attention() -> AbstractContextManager[Any]:
    """The only attention that autograd can differentiate twice."""
    return sdpa_kernel(SDPBackend.MATH)


def cases(device: str) -> list[Case]:
    return of_cpu() if device == "cpu" else of_device()


def of_cpu() -> list[Case]:
    few: tuple[dict[str, Any], ...] = ({}, {"method": "compiled"})
    vit_options = (*few, {"chunk_size": 1}, {"method": "directional"}, {"method": "directional", "chunk_size": 1})
    dcgan, resnet, vit = (16, 3, 64, 64), (8, 3, 32, 32), (4, 3, 64, 64)  # a ResNet's step is the longest
    return [
        PenaltyCase("MLP", (256, 2), critic=partial(critics.mlp, 2)),
        PenaltyCase("MLP", MNIST, critic=partial(critics.mlp, 784), quick=True),
        PenaltyCase("packed table", (500, 100), critic=partial(critics.Packed, 100), group_size=10, quick=True),
        PenaltyCase("DCGAN", dcgan, critic=critics.dcgan, options=(*few, {"chunk_size": 4}), memory=True),
        # Compiled it takes as long as under spectral normalisation, and a minute before it runs.
        PenaltyCase("WGAN-GP ResNet", resnet, compiling=False, critic=critics.resnet),
        PenaltyCase("spectral-norm ResNet", resnet, critic=critics.spectral_resnet),
        PenaltyCase(
            "ViT", vit, critic=partial(critics.ViT, 128, 3, 8), attention=True, options=vit_options, memory=True
        ),
    ]


@dataclass(frozen=True)
class DeviceCase(PenaltyCase):
    bases = (OURS, COMPILED, SNIPPET)


def of_device() -> list[Case]:
    """In the order of their worth; by hand, and by every way of ours that serves the critic."""
    case = partial(DeviceCase, peers=(SNIPPET, TIDY, COMPILED_CALL))
    plain: dict[str, Any] = {}
    compiled, directional = {"method": "compiled"}, {"method": "directional"}
    images = (4, 3, 16, 16)
    robotics = case(
        "MLP 2 x 1024", (4096, 210), critic=partial(critics.mlp, 210, 1024, 2), to_come=(GRAPH,),
        options=(plain, compiled, {"chunk_size": 1024}),
        tiny={"shape": (8, 6), "critic": partial(critics.mlp, 6, 8, 2)},
    )  # fmt: skip
    table = case(
        "packed table", (500, 100), critic=partial(critics.Packed, 100), group_size=10, to_come=(GRAPH,),
        tiny={"shape": (20, 4), "critic": partial(critics.Packed, 4, width=8), "compiling": False},
    )  # fmt: skip
    dcgan = case(
        "DCGAN", (64, 3, 64, 64), critic=critics.dcgan, options=(plain, compiled, {"chunk_size": 16}),
        to_come=(GROUPED, GRAPH),
        tiny={"shape": images, "critic": partial(critics.dcgan, 16, 4), "compiling": False},
    )  # fmt: skip
    grouped = case(
        # torch's second derivative of a convolution is one for each group: thousands of operations to compile.
        "grouped convolutions", (64, 3, 64, 64), compiling=False, critic=critics.grouped, to_come=(GROUPED,),
        options=(plain, {"chunk_size": 16}), tiny={"shape": images, "critic": partial(critics.grouped, 16, 8, 16)},
    )  # fmt: skip
    resnet = case(
        "WGAN-GP ResNet", (64, 3, 32, 32), critic=critics.resnet, to_come=(GROUPED, GRAPH),
        tiny={"shape": images, "critic": partial(critics.resnet, 8), "compiling": False},
    )  # fmt: skip

    def vit(batch: int, size: int) -> DeviceCase:
        return case(
            "ViT", (batch, 3, size, size), torch.bfloat16, attention=True, to_come=(FLASH,),
            critic=partial(critics.ViT, 512, 4, 8, (size // 4) ** 2),
            options=(plain, compiled, {"chunk_size": 1}, directional, {**directional, "chunk_size": 1}),
            tiny={"shape": (2, 3, 16, 16), "critic": partial(critics.ViT, 16, 1, 2, 16), "compiling": False},
        )  # fmt: skip

    return [robotics, vit(8, 128), dcgan, grouped, vit(2, 256), table, resnet, vit(32, 64)]
