"""What the programs on points in a plane share: three distributions, a critic, and its training by penalty or clipping.

The set-up is that of "Improved Training of Wasserstein GANs" (Gulrajani et al., 2017): the generator is fixed, real
samples plus Gaussian noise of unit variance, so that nothing is left to learn but the critic.
"""

import math
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import make_swiss_roll
from torch import Tensor, nn
from tqdm import tqdm

from fused_gp import fused_gradient_penalty

PENALTY_WEIGHT = 10.0

Sampler = Callable[[int], Tensor]  # a number of points to (number, 2)


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
    """The fixed generator."""
    return real + torch.randn_like(real)


def make_critic(hidden_layers: int, width: int) -> nn.Sequential:
    """ReLU, with He's initialisation of the weights and PyTorch's of the biases, which spreads the kinks over the plane."""
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


def train_critic(
    critic: nn.Module, sample: Callable[[], tuple[Tensor, Tensor]], steps: Iterable[int], bound: float | None = None
) -> list[float]:
    """By weight clipping where there is a bound, else by gradient penalty. The critic's losses without the penalty."""
    if bound is None:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(critic.parameters(), 1e-4, (0.5, 0.9))
    else:
        optimizer = torch.optim.RMSprop(critic.parameters(), 5e-5)
        clip_weights(critic, bound)
    losses = []
    for _ in steps:
        real, fake = sample()
        loss = critic(fake).mean() - critic(real).mean()
        losses.append(loss.item())
        if bound is None:
            loss = loss + fused_gradient_penalty(critic, real, fake, weight=PENALTY_WEIGHT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if bound is not None:
            clip_weights(critic, bound)
    return losses


def gradient_norms(critic: nn.Module, points: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(critic(points).sum(), points)
    return gradients.norm(dim=1)


def optimal_coupling(real: Tensor, fake: Tensor) -> tuple[Tensor, float]:
    """Which fake sample each real one is moved to by the exact optimal transport, and the mean distance moved."""
    costs = torch.cdist(real.double(), fake.double()).numpy()
    rows, columns = linear_sum_assignment(costs)
    return torch.from_numpy(columns), float(np.mean(costs[rows, columns]))


