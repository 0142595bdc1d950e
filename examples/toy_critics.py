"""Shared by the programs on 2-D data: three distributions, a critic, and its training by penalty or weight clipping.

The set-up is that of "Improved Training of Wasserstein GANs" (Gulrajani et al., 2017): the generator is fixed (real
samples plus Gaussian noise of unit variance), and only the critic is trained.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import make_swiss_roll
from torch import Tensor, nn

from fused_gp import fused_gradient_penalty

Sampler = Callable[[int], Tensor]  # number of points -> (number, 2)
PairSampler = Callable[[], tuple[Tensor, Tensor]]  # a new batch of real and fake samples at each call


def eight_gaussians(count: int) -> Tensor:
    angles = torch.randint(8, (count, 1)) * (math.pi / 4)
    return math.sqrt(2) * torch.cat((angles.cos(), angles.sin()), 1) + 0.014 * torch.randn(count, 2)


def twenty_five_gaussians(count: int) -> Tensor:
    return (torch.randint(-2, 3, (count, 2)) + 0.025 * torch.randn(count, 2)) / math.sqrt(2)


def swiss_roll(count: int) -> Tensor:
    seed = int(torch.randint(2**31, ()))
    points, _ = make_swiss_roll(count, noise=0.25, random_state=seed)
    return torch.from_numpy(points[:, [0, 2]] / 7.5).float()


DATA: dict[str, Sampler] = {
    "8 Gaussians": eight_gaussians,
    "25 Gaussians": twenty_five_gaussians,
    "Swiss roll": swiss_roll,
}


def add_noise(real: Tensor) -> Tensor:
    """The fixed generator: real samples plus Gaussian noise of unit variance."""
    return real + torch.randn_like(real)


def make_critic(hidden_layers: int, width: int) -> nn.Sequential:
    """ReLU MLP with He initialisation of the weights. Biases keep PyTorch's initialisation, which spreads the kinks."""
    widths = [2, *[width] * hidden_layers, 1]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def clip_weights(critic: nn.Module, bound: float) -> None:
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.clamp_(-bound, bound)


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return critic(fake).mean() - critic(real).mean()


def train_by_clipping(critic: nn.Module, sample_pair: PairSampler, steps: int, bound: float) -> list[float]:
    """Returns the critic loss of each step. RMSprop at 5e-5, as in the WGAN paper."""
    optimizer = torch.optim.RMSprop(critic.parameters(), 5e-5)
    clip_weights(critic, bound)
    losses = []
    for _ in range(steps):
        loss = critic_loss(critic, *sample_pair())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clip_weights(critic, bound)
        losses.append(loss.item())
    return losses


def train_by_penalty(
    critic: nn.Module,
    sample_pair: PairSampler,
    steps: int,
    learning_rate: float,
    penalty_weight: Callable[[float], float],
) -> list[float]:
    """Returns the critic loss of each step, without the penalty.

    `penalty_weight` maps the fraction of steps done to the weight. Adam, with a learning rate that decays to 0, so that
    the critic converges.
    """
    optimizer = torch.optim.Adam(critic.parameters(), learning_rate, (0.5, 0.9))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    losses = []
    for step in range(steps):
        real, fake = sample_pair()
        loss = critic_loss(critic, real, fake)
        losses.append(loss.item())
        loss = loss + fused_gradient_penalty(critic, real, fake, weight=penalty_weight(step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return losses


def gradient_norms(critic: nn.Module, points: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(critic(points).sum(), points)
    return gradients.norm(dim=1)


def optimal_coupling(real: Tensor, fake: Tensor) -> tuple[Tensor, float]:
    """The index of the fake sample coupled with each real one by exact optimal transport, and the mean distance."""
    costs = torch.cdist(real.double(), fake.double()).numpy()
    rows, columns = linear_sum_assignment(costs)
    return torch.from_numpy(columns), float(np.mean(costs[rows, columns]))
