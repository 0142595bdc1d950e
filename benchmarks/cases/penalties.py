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

from benchmarks.cases import critics, ops
from benchmarks.cases.case import CallCase, Case, Entry, Step
from benchmarks.cases.ops import HALVES, MNIST
from benchmarks.cases.ours import ours
from benchmarks.names import TWO_OPS
from benchmarks.peers import Implementation


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

    def inputs(self, device: str) -> Inputs:
        torch.manual_seed(0)
        real, fake = torch.randn(self.shape), torch.randn(self.shape)
        return Inputs(self.critic().to(device, self.dtype), real.to(device, self.dtype), fake.to(device, self.dtype))

    def exact(self, inputs: Inputs) -> Inputs:
        return Inputs(copy.deepcopy(inputs.critic).double(), inputs.real.double(), inputs.fake.double())

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
    large = device != "cpu"
    batch, resnet_batch = (64, 64) if large else (16, 8)  # a ResNet's step is the longest
    few: tuple[dict[str, Any], ...] = ({}, {"method": "compiled"})
    dcgan, resnet, vit = (batch, 3, 64, 64), (resnet_batch, 3, 32, 32), (batch // 4, 3, 64, 64)
    vit_options = (*few, {"chunk_size": 1}, {"method": "directional"}, {"method": "directional", "chunk_size": 1})
    return [
        PenaltyCase("MLP", (256, 2), critic=partial(critics.mlp, 2)),
        PenaltyCase("MLP", MNIST, critic=partial(critics.mlp, 784), quick=True),
        PenaltyCase("packed table", (500, 100), critic=partial(critics.Packed, 100), group_size=10, quick=True),
        PenaltyCase("DCGAN", dcgan, critic=critics.dcgan, options=(*few, {"chunk_size": batch // 4}), memory=True),
        *(PenaltyCase("DCGAN", dcgan, dtype, critic=critics.dcgan) for dtype in (HALVES if large else ())),
        # Compiled it takes as long as under spectral normalisation, and on a CPU a minute before it runs.
        PenaltyCase("WGAN-GP ResNet", resnet, compiling=large, critic=critics.resnet),
        PenaltyCase("spectral-norm ResNet", resnet, critic=critics.spectral_resnet),
        PenaltyCase(
            "ViT", vit, critic=partial(critics.ViT, 128, 3, 8), attention=True, options=vit_options, memory=True
        ),
    ]
