"""The two ops by themselves: forward, forward and backward, and through the double backward."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import cold
from benchmarks.cases import bytes_moved as bytes_
from benchmarks.cases.bytes_moved import BytesMoved, together
from benchmarks.cases.case import Case, Entry, Make, Step
from benchmarks.cases.ours import ours
from benchmarks.names import BOTH, COMPILED_OPS, COPIES, OURS
from benchmarks.peers import Implementation, peers_of_ops

MNIST, FACES, LARGE = (64, 784), (64, 3, 64, 64), (64, 3, 256, 256)
# Rows of a plane, of MNIST at batches of 1 to 4096, of images up to 256 x 256.
SIZES = [(2, 4), (4096, 2), (1, 784), MNIST, (4096, 784), (64, 3, 32, 32), FACES, (64, 3, 128, 128), LARGE]
HALVES = (torch.bfloat16, torch.float16)


# On a device, whose first minutes are short, the peers that must be compiled take part in these alone.
COMPILED_SIZES = (MNIST, FACES, LARGE)


class Inputs(NamedTuple):
    real: Tensor
    fake: Tensor
    alpha: Tensor
    gradients: Tensor
    cotangent: Tensor


def draw(shape: tuple[int, ...]) -> Inputs:
    torch.manual_seed(0)
    real, fake, gradients, cotangent = (torch.randn(shape) for _ in range(4))
    gradients *= 2 / prod(shape[1:]) ** 0.5  # norms around 2: in fp16 the sum of larger squares is infinite
    return Inputs(real, fake, torch.rand(shape[0], *[1] * (len(shape) - 1)), gradients, cotangent)


# On a device several cases of one size follow one another, whose drawing takes longer than all the rest.
drawn_before = lru_cache(maxsize=1)(draw)


def interpolation_forward(by: Implementation, x: Inputs) -> list[Tensor]:
    return [by.interpolate(x.real, x.fake, x.alpha)]


def interpolation_backward(by: Implementation, x: Inputs) -> list[Tensor]:
    real, fake = x.real.detach().requires_grad_(), x.fake.detach().requires_grad_()
    x_hat = by.interpolate(real, fake, x.alpha)
    return [x_hat, *torch.autograd.grad(x_hat, (real, fake), x.cotangent)]


def interpolation_double(by: Implementation, x: Inputs) -> list[Tensor]:
    """The backward is linear in its cotangent, and its own backward an interpolation again."""
    real, fake, cotangent = (t.detach().requires_grad_() for t in (x.real, x.fake, x.cotangent))
    x_hat = by.interpolate(real, fake, x.alpha)
    grads = torch.autograd.grad(x_hat, (real, fake), cotangent, create_graph=True)
    return [x_hat, *grads, *torch.autograd.grad(grads, cotangent, (x.gradients, x.real))]


def penalty_forward(by: Implementation, x: Inputs) -> list[Tensor]:
    return [by.norm_penalty(x.gradients)]


def penalty_backward(by: Implementation, x: Inputs) -> list[Tensor]:
    gradients = x.gradients.detach().requires_grad_()
    penalty = by.norm_penalty(gradients)
    return [penalty, *torch.autograd.grad(penalty, gradients)]


def penalty_double(by: Implementation, x: Inputs) -> list[Tensor]:
    gradients = x.gradients.detach().requires_grad_()
    penalty = by.norm_penalty(gradients)
    (grad,) = torch.autograd.grad(penalty, gradients, create_graph=True)
    return [penalty, grad, *torch.autograd.grad(grad, gradients, x.cotangent)]


def both(by: Implementation, x: Inputs) -> list[Tensor]:
    """Everything in the penalty of a critic's step except the critic itself."""
    return interpolation_forward(by, x) + penalty_backward(by, x)


class Op(NamedTuple):
    step: Callable[[Implementation, Inputs], list[Tensor]]
    moved: BytesMoved


OPS = {
    BOTH: Op(both, together(bytes_.INTERPOLATE, bytes_.PENALTY, bytes_.PENALTY_BACKWARD)),
    "interpolation, forward": Op(interpolation_forward, bytes_.INTERPOLATE),
    "interpolation, forward and backward": Op(
        interpolation_backward, together(bytes_.INTERPOLATE, bytes_.INTERPOLATE_BACKWARD)
    ),
    "interpolation, double backward": Op(
        interpolation_double, together(bytes_.INTERPOLATE, bytes_.INTERPOLATE_BACKWARD, bytes_.INTERPOLATE)
    ),
    "penalty, forward": Op(penalty_forward, bytes_.PENALTY),
    "penalty, forward and backward": Op(penalty_backward, together(bytes_.PENALTY, bytes_.PENALTY_BACKWARD)),
    "penalty, double backward": Op(
        penalty_double, together(bytes_.PENALTY, bytes_.PENALTY_BACKWARD, bytes_.PENALTY_DOUBLE_BACKWARD)
    ),
}


@dataclass(frozen=True)
class OpCase(Case):
    suite = "ops"
    budget = 1.2
    fp32_tolerances = (2e-4, 2e-4)  # nothing is computed in TF32

    def all_implementations(self) -> dict[str, Make]:
        peers = peers_of_ops()
        if self.name != BOTH:  # compiling takes longer than all the rest, and cannot do the double backward
            del peers[COMPILED_OPS]
        return {OURS: ours(), **peers}

    def inputs(self, device: str) -> Inputs:
        drawn = draw(self.shape) if device == "cpu" else drawn_before(self.shape)
        return Inputs(*(t.to(device, self.dtype) for t in drawn))

    def exact(self, inputs: Inputs) -> Inputs:
        return Inputs(*(t.double() for t in inputs))

    def copies(self, inputs: Inputs, device: str) -> list[Inputs]:
        if device == "cpu":
            return []
        number = cold.copies_needed(inputs.real.nbytes, device)
        return [inputs, *(Inputs(*(t.clone() for t in inputs)) for _ in range(number - 1))]

    def is_cold(self, inputs: Inputs, device: str) -> bool:
        return cold.is_cold(inputs.real.nbytes, device)

    def enter(self, implementation: Implementation, inputs: Inputs) -> Entry:
        step = partial(OPS[self.name].step, implementation, inputs)
        return Entry(step, step)

    def baselines(self, inputs: Inputs) -> dict[str, Step]:
        return {COPIES: bytes_.copies(inputs.real, OPS[self.name].moved)}

    def bytes_moved(self) -> int:
        return OPS[self.name].moved.total * prod(self.shape) * self.dtype.itemsize


def cases(device: str) -> list[Case]:
    """Sizes that are for devices only would take a CPU too long. A device's cases stand in the order of their worth."""
    singles = [name for name in OPS if name != BOTH]
    if device == "cpu":
        return [
            *(OpCase(BOTH, size, memory=size == LARGE, quick=size in (MNIST, FACES)) for size in SIZES),
            *(OpCase(BOTH, size, dtype) for dtype in HALVES for size in (MNIST, FACES, LARGE)),
            *(OpCase(name, size) for name in singles for size in (MNIST, FACES, LARGE)),
        ]
    larger = (256, *LARGE[1:])
    chosen = [
        *(OpCase(BOTH, size) for size in (LARGE, MNIST, FACES, larger)),
        *(OpCase(name, LARGE) for name in singles),
        *(OpCase(BOTH, size, torch.bfloat16) for size in (LARGE, FACES)),
        *(OpCase(BOTH, size) for size in SIZES if size not in COMPILED_SIZES),
        *(OpCase(name, size) for size in (MNIST, FACES) for name in singles),
        *(OpCase(BOTH, size, torch.float16) for size in (LARGE, FACES)),
        OpCase(BOTH, MNIST, torch.bfloat16),
    ]
    return [
        replace(case, compiling=case.shape in COMPILED_SIZES, tiny={"shape": tuple(min(at, 5) for at in case.shape)})
        for case in chosen
    ]
