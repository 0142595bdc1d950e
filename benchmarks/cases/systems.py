"""The penalties of systems that people use (docs/systems.md), each against two hand-written versions.

These are the lines as the system's users write them, and a tidy version of them. A step is the call and its backward
to the weights, at two sizes: 64 points of a plane and a critic of two hidden layers, where time is what Python and
small operations cost; 64 images of 3 x 64 x 64 and a critic of one layer of patches, where time is what memory costs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.cases import critics
from benchmarks.cases.case import Case, Make, Step
from benchmarks.cases.penalties import Inputs, PenaltyCase
from benchmarks.names import OURS, TIDY, USUAL
from benchmarks.peers import Implementation
from fused_gp import dragan_penalty, fused_gradient_penalty, input_gradient_penalty, r1_penalty, r2_penalty

PAC = 8
TINY, LARGE = (64, 2), (64, 3, 64, 64)
SCALER = torch.amp.GradScaler("cpu", init_scale=1024.0)

Shape = tuple[int, ...]
Penalty = Callable[..., Tensor]  # of (critic, real, fake); hand-written, and whether it is the tidy version

# The critics.


def mlp(outputs: int = 1) -> nn.Sequential:
    hidden = [nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(64, outputs))


def patches(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.LeakyReLU(0.2), nn.Conv2d(16, outputs, 1))


def one_score(shape: Shape) -> nn.Module:
    return mlp() if shape == TINY else nn.Sequential(*patches(), nn.Flatten(), nn.Linear(64, 1))


def nine_scores(shape: Shape) -> nn.Module:
    return mlp(outputs=9) if shape == TINY else patches()


def packed_rows(shape: Shape) -> nn.Module:
    return critics.Packed(prod(shape[1:]), PAC, width=64)


class Several(nn.Module):
    """Two outputs, of the samples and of the samples cut short."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.first, self.second = one_score(shape), one_score(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x.clamp(-1, 1))


class Graph(nn.Module):
    """Samples in two tensors."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bonds, self.atoms = one_score(shape), one_score(shape)

    def forward(self, bonds: Tensor, atoms: Tensor) -> Tensor:
        return torch.tanh(self.bonds(bonds) + self.atoms(atoms))


# The pieces that hand-written penalties are made of: as usual, and tidy.


INTERPOLATE = {False: peers.snippet.interpolate, True: peers.tidy.interpolate}


def alpha_of(real: Tensor) -> Tensor:
    return torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device).to(real.dtype)


def between(real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    return INTERPOLATE[tidy](real, fake, alpha_of(real)).requires_grad_()


def around_real(real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    noise = torch.rand(real.shape, device=real.device).to(real.dtype)
    return between(real, real + 0.5 * real.std() * noise, tidy)


def at_real(real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    return real.detach().requires_grad_()


def at_a_copy(real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    return real.clone().requires_grad_()


def gradient(scores: Tensor, x: Tensor, tidy: bool) -> Tensor:
    ones = torch.ones_like(scores)
    if tidy:
        (gradients,) = torch.autograd.grad(scores, x, ones, create_graph=True)
        return gradients if gradients.ndim == 2 else gradients.flatten(1)
    gradients = torch.autograd.grad(
        outputs=scores, inputs=x, grad_outputs=ones, create_graph=True, retain_graph=True, only_inputs=True
    )[0]
    return gradients.view(gradients.size(0), -1)


def norm(gradients: Tensor, tidy: bool) -> Tensor:
    return torch.linalg.vector_norm(gradients, dim=1) if tidy else gradients.norm(2, dim=1)


def root(gradients: Tensor, eps: float) -> Tensor:
    return (gradients.square().sum(1) + eps).sqrt()


def two_sided(gradients: Tensor, tidy: bool) -> Tensor:
    return 10 * (norm(gradients, tidy) - 1).square().mean()


def two_sided_and_norms(gradients: Tensor, tidy: bool) -> Tensor:
    norms = norm(gradients, tidy)
    norms.detach()  # returned, too
    return 10 * (norms - 1).square().mean()


def mean_square(weight: float, gradients: Tensor, tidy: bool) -> Tensor:
    if tidy:
        return gradients.square().sum() * (weight / len(gradients))
    return (gradients.square().sum(1) * weight).mean()


def lines(points: Callable[[Tensor, Tensor, bool], Tensor], value: Callable[[Tensor, bool], Tensor]) -> Penalty:
    def penalty(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
        x = points(real, fake, tidy)
        return value(gradient(critic(x), x, tidy), tidy)

    return penalty


R1 = lines(at_real, partial(mean_square, 5))


def several_scaled(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = real.clone().requires_grad_()
    outputs = [SCALER.scale(output) for output in critic(x)]
    ones = [torch.full_like(output, weight) for output, weight in zip(outputs, (1.0, 0.5), strict=True)]
    (gradients,) = torch.autograd.grad(outputs, x, ones, create_graph=True)
    return two_sided(gradients.flatten(1) * (1 / SCALER.get_scale()), tidy)


def packed(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    real, fake = (x.view(-1, PAC, *x.shape[1:]) for x in (real, fake))
    x = INTERPOLATE[tidy](real, fake, alpha_of(real)).flatten(0, 1).requires_grad_()
    return two_sided(gradient(critic(x), x, tidy).view(len(real), -1), tidy)


def two_inputs(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    alpha = alpha_of(real)
    bonds, atoms = (INTERPOLATE[tidy](*ends, alpha).requires_grad_() for ends in ((real, fake), (fake, real)))
    scores = critic(bonds, atoms)
    gradients = torch.autograd.grad(scores, (bonds, atoms), torch.ones_like(scores), create_graph=True)
    square = gradients[0].flatten(1).square().sum(1) + gradients[1].flatten(1).square().sum(1)
    return 10 * ((square + 1e-12).sqrt() - 1).square().mean()


def ours_from_outputs(critic: nn.Module, real: Tensor, fake: Tensor, **options: Any) -> Tensor:
    x = real.clone().requires_grad_()
    return input_gradient_penalty(critic(x), x, weight=10, eps=0.0, **options)


class System(NamedTuple):
    ours: Penalty
    lines: Penalty
    critic: Callable[[Shape], nn.Module] = one_score


fused = partial(fused_gradient_penalty, weight=10)
SYSTEMS = {
    "WGAN-GP, eps": System(
        fused, lines(between, lambda gradients, tidy: 10 * (root(gradients, 1e-12) - 1).square().mean())
    ),
    "Improved WGAN": System(partial(fused, eps=0.0), lines(between, two_sided)),
    "TF-GAN": System(
        partial(fused, target=2.0, weight=0.25, eps=1e-10),
        lines(between, lambda gradients, tidy: (root(gradients, 1e-10) / 2 - 1).square().mean()),
    ),
    "WGAN-LP": System(
        partial(fused, one_sided=True, eps=0.0),
        lines(between, lambda gradients, tidy: 10 * (norm(gradients, tidy) - 1).relu().square().mean()),
    ),
    "0-GP": System(partial(fused, target=0.0), lines(between, partial(mean_square, 10))),
    "DRAGAN": System(
        lambda critic, real, fake: dragan_penalty(critic, real, weight=10, eps=0.0), lines(around_real, two_sided)
    ),
    "StyleGAN R1": System(lambda critic, real, fake: r1_penalty(critic, real, weight=10.0), R1),
    "R3GAN": System(
        lambda critic, real, fake: r1_penalty(critic, real, weight=10.0) + r2_penalty(critic, fake, weight=10.0),
        lambda critic, real, fake, tidy: R1(critic, real, fake, tidy) + R1(critic, fake, real, tidy),
    ),
    "stylegan2-pytorch": System(ours_from_outputs, lines(at_a_copy, two_sided)),
    "GigaGAN, GradScaler": System(
        partial(ours_from_outputs, output_weights=(1.0, 0.5), grad_scale=SCALER), several_scaled, Several
    ),
    "CTGAN": System(partial(fused, group_size=PAC, eps=0.0), packed, packed_rows),
    "CycleGAN": System(
        lambda critic, real, fake: fused(critic, real, fake, eps=0.0, return_norms=True)[0],
        lines(between, two_sided_and_norms),
        nine_scores,
    ),
    "graphs, two inputs": System(
        lambda critic, real, fake: fused(lambda graph: critic(*graph), (real, fake), (fake, real)), two_inputs, Graph
    ),
}


@dataclass(frozen=True)
class SystemCase(PenaltyCase):
    suite = "systems"
    budget = 2.0
    bases = (OURS,)
    fp32_tolerances = (1e-4, 3e-3)

    def inputs(self, device: str) -> Inputs:
        """With twice the weights: with the first ones all norms are far below 1, where a one-sided penalty is zero."""
        inputs = super().inputs(device)
        with torch.no_grad():
            for weight in inputs.critic.parameters():
                weight.mul_(2)
        return inputs

    def all_implementations(self) -> dict[str, Make]:
        ours, lines, _ = SYSTEMS[self.name]
        every: dict[str, Penalty] = {OURS: ours, USUAL: partial(lines, tidy=False), TIDY: partial(lines, tidy=True)}
        return {name: partial(Implementation, penalty) for name, penalty in every.items()}

    def reference_implementation(self) -> Implementation:
        return self.all_implementations()[USUAL]()

    def baselines(self, inputs: Inputs) -> dict[str, Step]:
        return {}


def cases(device: str) -> list[Case]:
    return [
        SystemCase(name, shape, critic=partial(system.critic, shape), quick=name in ("Improved WGAN", "StyleGAN R1"))
        for shape in (TINY, LARGE)
        for name, system in SYSTEMS.items()
    ]
