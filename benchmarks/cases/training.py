"""Whole WGAN-GP training steps: five updates of the critic and one of the generator, the paper's algorithm 1."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import critics, generators
from benchmarks.cases.case import CallCase, Case, Entry, Step
from benchmarks.cases.penalties import two_ops
from benchmarks.names import CRITIC_UPDATES, NO_PENALTY, TWO_OPS
from benchmarks.peers import Implementation

WEIGHT = 10


class Inputs(NamedTuple):
    generator: nn.Module
    critic: nn.Module
    real: Tensor
    latent: Tensor


@dataclass(frozen=True)
class TrainingCase(CallCase):
    suite = "training"
    budget = 8.0
    generator: Callable[[], nn.Module] = nn.Identity
    critic: Callable[[], nn.Module] = nn.Identity

    def inputs(self, device: str) -> Inputs:
        torch.manual_seed(0)
        real, latent = torch.randn(self.shape), torch.randn(self.shape[0], generators.LATENTS)
        generator, critic = (make().to(device, self.dtype) for make in (self.generator, self.critic))
        return Inputs(generator, critic, real.to(device, self.dtype), latent.to(device, self.dtype))

    def exact(self, inputs: Inputs) -> Inputs:
        generator, critic = (copy.deepcopy(module).double() for module in (inputs.generator, inputs.critic))
        return Inputs(generator, critic, inputs.real.double(), inputs.latent.double())

    def enter(self, implementation: Implementation, inputs: Inputs) -> Entry:
        training = Training(inputs, implementation.gradient_penalty)
        return Entry(training.critic_gradients, training.step)

    def baselines(self, inputs: Inputs) -> dict[str, Step]:
        ops = two_ops(inputs.real, inputs.real.flip(0))

        def as_often() -> list[Tensor]:
            for _ in range(CRITIC_UPDATES):
                out = ops()
            return out

        return {NO_PENALTY: Training(inputs, None).step, TWO_OPS: as_often}


class Training:
    """With modules and optimisers of its own."""

    def __init__(self, inputs: Inputs, penalty: Callable[..., Tensor] | None) -> None:
        self.generator, self.critic = copy.deepcopy(inputs.generator), copy.deepcopy(inputs.critic)
        self.real, self.latent, self.penalty = inputs.real, inputs.latent, penalty
        self.generator_optimizer, self.critic_optimizer = (
            torch.optim.Adam(module.parameters(), lr=1e-4, betas=(0.0, 0.9)) for module in (self.generator, self.critic)
        )

    def step(self) -> list[Tensor]:
        for _ in range(CRITIC_UPDATES):
            loss = self.critic_loss()
            self.critic_optimizer.zero_grad()
            loss.backward()
            self.critic_optimizer.step()
        generator_loss = -self.critic(self.generator(self.latent)).mean()
        self.generator_optimizer.zero_grad()
        generator_loss.backward()
        self.generator_optimizer.step()
        return [loss, generator_loss]

    def critic_loss(self) -> Tensor:
        with torch.no_grad():
            fake = self.generator(self.latent)
        loss = self.critic(fake).mean() - self.critic(self.real).mean()
        return loss if self.penalty is None else loss + WEIGHT * self.penalty(self.critic, self.real, fake)

    def critic_gradients(self) -> list[Tensor]:
        """Of the first update: Adam would make of a rounding error in a gradient near zero a whole step."""
        loss = self.critic_loss()
        return [loss, *torch.autograd.grad(loss, list(self.critic.parameters()))]


def cases(device: str) -> list[Case]:
    batch = 32 if device == "cpu" else 128
    dcgan, dcgan_generator = partial(critics.dcgan, 32), partial(generators.dcgan, 32)
    return [
        TrainingCase("MLP", (256, 2), generator=generators.points, critic=partial(critics.mlp, 2), quick=True),
        TrainingCase("DCGAN", (batch, 3, 32, 32), generator=dcgan_generator, critic=dcgan),
    ]
