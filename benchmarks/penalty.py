"""The whole penalty: the call with a critic, and the backward to the critic's weights."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import ops
from benchmarks.case import CallCase, Entry, Step
from benchmarks.ours import ours
from benchmarks.peers import Peer

TWO_OPS = "the two ops alone"


class Inputs(NamedTuple):
    critic: nn.Module
    real: Tensor
    fake: Tensor


@dataclass(frozen=True)
class PenaltyCase(CallCase):
    group: ClassVar[str] = "penalty"
    critic: Callable[[], nn.Module] = nn.Identity
    group_size: int = 1

    def inputs(self, device: str) -> Inputs:
        torch.manual_seed(0)
        real, fake = torch.randn(self.shape), torch.randn(self.shape)
        return Inputs(self.critic().to(device, self.dtype), real.to(device, self.dtype), fake.to(device, self.dtype))

    def exact(self, inputs: Inputs) -> Inputs:
        return Inputs(copy.deepcopy(inputs.critic).double(), inputs.real.double(), inputs.fake.double())

    def enter(self, peer: Peer, inputs: Inputs) -> Entry:
        critic = copy.deepcopy(inputs.critic)
        penalty = self.penalty_of(peer)
        weights = list(critic.parameters())

        def step() -> list[Tensor]:
            with math_attention():
                value = penalty(critic, inputs.real, inputs.fake)
                return [value, *torch.autograd.grad(value, weights, materialize_grads=True)]

        return Entry(step, step)

    def penalty_of(self, peer: Peer) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        """For groups, whoever knows none of them is given the rows of a group as one row: a view."""
        if self.group_size == 1:
            return peer.gradient_penalty
        if peer.groups:
            return partial(peer.gradient_penalty, group_size=self.group_size)
        groups = self.shape[0] // self.group_size
        return lambda critic, real, fake: peer.gradient_penalty(critic, real.view(groups, -1), fake.view(groups, -1))

    def yardsticks(self, inputs: Inputs) -> dict[str, Step]:
        return {TWO_OPS: two_ops(inputs.real, inputs.fake)}


def two_ops(real: Tensor, fake: Tensor) -> Step:
    """Ours, on samples of this shape."""
    alpha = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device, dtype=real.dtype)
    given = ops.Inputs(real, fake, alpha, gradients=torch.randn_like(real), cotangent=real)
    return partial(ops.both, ours()(), given)


def math_attention() -> AbstractContextManager[Any]:
    """The only attention that autograd can differentiate twice."""
    return sdpa_kernel(SDPBackend.MATH)
