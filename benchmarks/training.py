"""A whole WGAN-GP training step, as in the paper's algorithm 1: five updates of the critic, one of the generator."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import generators
from benchmarks.case import CallCase, Entry, Step
from benchmarks.peers import Peer
from benchmarks.penalty import TWO_OPS, two_ops

CRITIC_UPDATES = 5
WEIGHT = 10
NO_PENALTY = "no penalty"


class Inputs(NamedTuple):
    generator: nn.Module
    critic: nn.Module
    real: Tensor
    latent: Tensor


@dataclass(frozen=True)
class TrainingCase(CallCase):
    group: ClassVar[str] = "training step"
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

    def enter(self, peer: Peer, inputs: Inputs) -> Entry:
        run = Run(inputs, peer.gradient_penalty)
        return Entry(run.critic_gradients, run.step)

    def yardsticks(self, inputs: Inputs) -> dict[str, Step]:
        ops = two_ops(inputs.real, inputs.real.flip(0))

        def as_often() -> list[Tensor]:
            for _ in range(CRITIC_UPDATES):
                out = ops()
            return out

        return {NO_PENALTY: Run(inputs, None).step, TWO_OPS: as_often}


class Run:
    """One training, with modules and optimisers of its own."""

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
