"""The two ops by themselves: forward, forward and backward, and through the double backward."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks import bandwidth, traffic
from benchmarks.case import Case, Entry, Step
from benchmarks.ours import OURS, ours
from benchmarks.peers import COMPILED_OPS, Peer, peers_of_ops
from benchmarks.traffic import Traffic


class Inputs(NamedTuple):
    real: Tensor
    fake: Tensor
    alpha: Tensor
    gradients: Tensor
    cotangent: Tensor


def interpolation_forward(peer: Peer, x: Inputs) -> list[Tensor]:
    assert peer.interpolate
    return [peer.interpolate(x.real, x.fake, x.alpha)]


def interpolation_backward(peer: Peer, x: Inputs) -> list[Tensor]:
    assert peer.interpolate
    real, fake = x.real.detach().requires_grad_(), x.fake.detach().requires_grad_()
    x_hat = peer.interpolate(real, fake, x.alpha)
    return [x_hat, *torch.autograd.grad(x_hat, (real, fake), x.cotangent)]


def interpolation_double(peer: Peer, x: Inputs) -> list[Tensor]:
    """The backward is linear in its cotangent, and its own backward an interpolation again."""
    assert peer.interpolate
    real, fake, cotangent = (t.detach().requires_grad_() for t in (x.real, x.fake, x.cotangent))
    x_hat = peer.interpolate(real, fake, x.alpha)
    grads = torch.autograd.grad(x_hat, (real, fake), cotangent, create_graph=True)
    return [x_hat, *grads, *torch.autograd.grad(grads, cotangent, (x.gradients, x.real))]


def penalty_forward(peer: Peer, x: Inputs) -> list[Tensor]:
    assert peer.norm_penalty
    return [peer.norm_penalty(x.gradients)]


def penalty_backward(peer: Peer, x: Inputs) -> list[Tensor]:
    assert peer.norm_penalty
    gradients = x.gradients.detach().requires_grad_()
    penalty = peer.norm_penalty(gradients)
    return [penalty, *torch.autograd.grad(penalty, gradients)]


def penalty_double(peer: Peer, x: Inputs) -> list[Tensor]:
    assert peer.norm_penalty
    gradients = x.gradients.detach().requires_grad_()
    penalty = peer.norm_penalty(gradients)
    (grad,) = torch.autograd.grad(penalty, gradients, create_graph=True)
    return [penalty, grad, *torch.autograd.grad(grad, gradients, x.cotangent)]


def both(peer: Peer, x: Inputs) -> list[Tensor]:
    """All that a critic's step has of a penalty, but the critic."""
    return interpolation_forward(peer, x) + penalty_backward(peer, x)


class Op(NamedTuple):
    step: Callable[[Peer, Inputs], list[Tensor]]
    traffic: Traffic


BOTH = "interpolation + penalty, forward and backward"
OPS = {
    BOTH: Op(both, traffic.total(traffic.INTERPOLATE, traffic.PENALTY, traffic.PENALTY_BACKWARD)),
    "interpolation, forward": Op(interpolation_forward, traffic.INTERPOLATE),
    "interpolation, forward and backward": Op(
        interpolation_backward, traffic.total(traffic.INTERPOLATE, traffic.INTERPOLATE_BACKWARD)
    ),
    "interpolation, double backward": Op(
        interpolation_double, traffic.total(traffic.INTERPOLATE, traffic.INTERPOLATE_BACKWARD, traffic.INTERPOLATE)
    ),
    "penalty, forward": Op(penalty_forward, traffic.PENALTY),
    "penalty, forward and backward": Op(penalty_backward, traffic.total(traffic.PENALTY, traffic.PENALTY_BACKWARD)),
    "penalty, double backward": Op(
        penalty_double, traffic.total(traffic.PENALTY, traffic.PENALTY_BACKWARD, traffic.PENALTY_DOUBLE_BACKWARD)
    ),
}


@dataclass(frozen=True)
class OpCase(Case):
    group: ClassVar[str] = "op"

    def everybody(self) -> dict[str, Callable[[], Peer]]:
        peers = peers_of_ops()
        if self.name != BOTH:  # compiling takes longer than all the rest, and cannot do the double backward
            del peers[COMPILED_OPS]
        return {OURS: ours(), **peers}

    def inputs(self, device: str) -> Inputs:
        torch.manual_seed(0)
        real, fake, gradients, cotangent = (torch.randn(self.shape) for _ in range(4))
        gradients *= 2 / prod(self.shape[1:]) ** 0.5  # norms around 2: in fp16 the sum of larger squares is infinite
        alpha = torch.rand(self.shape[0], *[1] * (len(self.shape) - 1))
        return Inputs(*(t.to(device, self.dtype) for t in (real, fake, alpha, gradients, cotangent)))

    def exact(self, inputs: Inputs) -> Inputs:
        return Inputs(*(t.double() for t in inputs))

    def enter(self, peer: Peer, inputs: Inputs) -> Entry:
        step = partial(OPS[self.name].step, peer, inputs)
        return Entry(step, step)

    def yardsticks(self, inputs: Inputs) -> dict[str, Step]:
        return {bandwidth.COPIES: bandwidth.copies(inputs.real, OPS[self.name].traffic)}

    def moved(self) -> int:
        return OPS[self.name].traffic.moved * prod(self.shape) * self.dtype.itemsize
