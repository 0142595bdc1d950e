"""A penalty step of the systems people use (docs/systems.md): the call and its backward to the weights, against
hand-written versions: the lines as their users write them, and a tidy version of them.

At two sizes: 64 points of a plane and a critic of two hidden layers, where time is what Python and small operations
cost; 64 images of 3 x 64 x 64 and a critic of one layer of patches, where time is what memory costs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.cases.case import Case, Make, Step, Suite
from benchmarks.cases.penalties import Inputs, PenaltyCase
from benchmarks.names import OURS, TIDY, USUAL
from benchmarks.peers import Implementation
from fused_gp import dragan_penalty, fused_gradient_penalty, input_gradient_penalty, r1_penalty, r2_penalty

BATCH = 64
PAC = 8
TINY, LARGE = (BATCH, 2), (BATCH, 3, 64, 64)

Shape = tuple[int, ...]
Penalty = Callable[..., Tensor]  # of (critic, real, fake)


@dataclass(frozen=True)
class SystemCase(PenaltyCase):
    suite: ClassVar[str] = "systems"
    bases: ClassVar[tuple[str, ...]] = (OURS,)

    def inputs(self, device: str) -> Inputs:
        """With twice the weights: with the first ones all norms are far below 1, where a one-sided penalty is zero."""
        inputs = super().inputs(device)
        with torch.no_grad():
            for weight in inputs.critic.parameters():
                weight.mul_(2)
        return inputs

    def all_implementations(self) -> dict[str, Make]:
        return {name: partial(Implementation, penalty) for name, penalty in SYSTEMS[self.name].items()}

    def tolerance(self, device: str) -> float:
        return 1e-4 if device == "cpu" else super().tolerance(device)

    def reference_implementation(self) -> Implementation:
        return Implementation(SYSTEMS[self.name][USUAL])

    def baselines(self, inputs: Inputs) -> dict[str, Step]:
        return {}


SYSTEMS: dict[str, dict[str, Penalty]] = {}
CRITICS: dict[str, Callable[[Shape], nn.Module]] = {}


def mlp(width: int, outputs: int = 1) -> nn.Sequential:
    hidden = [nn.Linear(width, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(64, outputs))


def patches(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.LeakyReLU(0.2), nn.Conv2d(16, outputs, 1))


def one_score(shape: Shape) -> nn.Module:
    return mlp(2) if shape == TINY else nn.Sequential(*patches(), nn.Flatten(), nn.Linear(64, 1))


class Packed(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = mlp(PAC * prod(shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.reshape(len(x) // PAC, -1))


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


def points(real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    alpha = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device).to(real.dtype)
    if tidy:
        return torch.lerp(real, fake, alpha).requires_grad_()
    return (alpha * fake + (1 - alpha) * real).requires_grad_(True)


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


def mean_square(gradients: Tensor, weight: float, tidy: bool) -> Tensor:
    if tidy:
        return gradients.square().sum() * (weight / len(gradients))
    return (gradients.square().sum(1) * weight).mean()


def system(name: str, ours: Penalty, critic: Callable[[Shape], nn.Module] = one_score) -> Callable[[Penalty], Penalty]:
    """Decorates the hand-written version, a function of (critic, real, fake, tidy)."""

    def add(lines: Penalty) -> Penalty:
        SYSTEMS[name] = {OURS: ours, USUAL: partial(lines, tidy=False), TIDY: partial(lines, tidy=True)}
        CRITICS[name] = critic
        return lines

    return add


@system("WGAN-GP, eps", lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, weight=10))
def wgan_gp_eps(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    norms = (gradient(critic(x), x, tidy).square().sum(1) + 1e-12).sqrt()
    return 10 * (norms - 1).square().mean()


@system("Improved WGAN", lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, weight=10, eps=0.0))
def improved_wgan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    return 10 * (norm(gradient(critic(x), x, tidy), tidy) - 1).square().mean()


@system(
    "TF-GAN",
    lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, target=2.0, weight=0.25, eps=1e-10),
)
def tf_gan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    norms = (gradient(critic(x), x, tidy).square().sum(1) + 1e-10).sqrt()
    return (norms / 2 - 1).square().mean()


@system(
    "WGAN-LP",
    lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, one_sided=True, weight=10, eps=0.0),
)
def wgan_lp(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    return 10 * (norm(gradient(critic(x), x, tidy), tidy) - 1).relu().square().mean()


@system("0-GP", lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, target=0.0, weight=10))
def zero_gp(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    return mean_square(gradient(critic(x), x, tidy), 10, tidy)


@system("DRAGAN", lambda critic, real, fake: dragan_penalty(critic, real, weight=10, eps=0.0))
def dragan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    noise = torch.rand(real.shape, device=real.device).to(real.dtype)
    x = points(real, real + 0.5 * real.std() * noise, tidy)
    return 10 * (norm(gradient(critic(x), x, tidy), tidy) - 1).square().mean()


@system("StyleGAN R1", lambda critic, real, fake: r1_penalty(critic, real, weight=10.0))
def r1(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = real.detach().requires_grad_()
    return mean_square(gradient(critic(x), x, tidy), 5, tidy)


@system(
    "R3GAN",
    lambda critic, real, fake: r1_penalty(critic, real, weight=10.0) + r2_penalty(critic, fake, weight=10.0),
)
def r3gan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    return r1(critic, real, fake, tidy) + r1(critic, fake, real, tidy)


def from_outputs(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    x = real.clone().requires_grad_()
    return input_gradient_penalty(critic(x), x, weight=10, eps=0.0)


@system("stylegan2-pytorch", from_outputs)
def stylegan2_pytorch(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = real.clone().requires_grad_()
    return 10 * (norm(gradient(critic(x), x, tidy), tidy) - 1).square().mean()


SCALER = torch.amp.GradScaler("cpu", init_scale=1024.0)


def several_scaled(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    x = real.clone().requires_grad_()
    return input_gradient_penalty(critic(x), x, output_weights=(1.0, 0.5), grad_scale=SCALER, weight=10, eps=0.0)


@system("GigaGAN, GradScaler", several_scaled, critic=Several)
def gigagan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = real.clone().requires_grad_()
    outputs = [SCALER.scale(output) for output in critic(x)]
    ones = [torch.full_like(output, weight) for output, weight in zip(outputs, (1.0, 0.5), strict=True)]
    (gradients,) = torch.autograd.grad(outputs, x, ones, create_graph=True)
    gradients = gradients.flatten(1) * (1 / SCALER.get_scale())
    return 10 * (norm(gradients, tidy) - 1).square().mean()


@system(
    "CTGAN",
    lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, group_size=PAC, weight=10, eps=0.0),
    critic=Packed,
)
def ctgan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    real, fake = (x.view(-1, PAC, *x.shape[1:]) for x in (real, fake))
    alpha = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device).to(real.dtype)
    x = torch.lerp(real, fake, alpha) if tidy else alpha * fake + (1 - alpha) * real
    x = x.flatten(0, 1).requires_grad_()
    gradients = gradient(critic(x), x, tidy).view(len(real), -1)
    return 10 * (norm(gradients, tidy) - 1).square().mean()


@system(
    "CycleGAN",
    lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, weight=10, eps=0.0, return_norms=True)[0],
    critic=lambda shape: mlp(2, outputs=9) if shape == TINY else patches(),
)
def cyclegan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    norms = norm(gradient(critic(x), x, tidy), tidy)
    norms.detach()  # returned, too
    return 10 * (norms - 1).square().mean()


@system(
    "graphs, two inputs",
    lambda critic, real, fake: fused_gradient_penalty(
        lambda graph: critic(*graph), (real, fake), (fake, real), weight=10
    ),
    critic=Graph,
)
def graphs(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    alpha = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device).to(real.dtype)
    if tidy:
        bonds, atoms = torch.lerp(real, fake, alpha).requires_grad_(), torch.lerp(fake, real, alpha).requires_grad_()
    else:
        bonds = (alpha * fake + (1 - alpha) * real).requires_grad_()
        atoms = (alpha * real + (1 - alpha) * fake).requires_grad_()
    scores = critic(bonds, atoms)
    gradients = torch.autograd.grad(scores, (bonds, atoms), torch.ones_like(scores), create_graph=True)
    square = gradients[0].flatten(1).square().sum(1) + gradients[1].flatten(1).square().sum(1)
    return 10 * ((square + 1e-12).sqrt() - 1).square().mean()


def cases(device: str) -> list[Case]:
    return [
        SystemCase(name, shape, critic=partial(critic, shape))
        for shape in (TINY, LARGE)
        for name, critic in CRITICS.items()
    ]


def quick(case: Case) -> bool:
    return case.name in ("Improved WGAN", "StyleGAN R1")


WHAT = "the penalties of systems that people use, each against two hand-written versions"
SUITE = Suite(WHAT, cases, quick, budget=2.0, quick_budget=0.5)
