"""Samples and critics for the formulas of other systems, and what a penalty function gives under one seed."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

IMAGES = (5, 3, 8, 8)


def conv_critic():
    """Gradient norms around 1, on both sides of it, which depend on the points and on the dropout mask."""
    critic = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(128, 1))
    critic[-1].weight.data.mul_(5.5)
    return critic


def strong_critic():
    """Gradient norms around 2."""
    critic = conv_critic()
    critic[-1].weight.data.mul_(2)
    return critic


def real_and_fake(shapes, dtype, device):
    """Two batches with different distributions, so that alpha and the order of the batches matter."""

    def draw(shape):
        return torch.randn(shape, dtype=dtype).to(device)

    if isinstance(shapes[0], int):
        return draw(shapes), 2 * draw(shapes) + 1
    return tuple(map(draw, shapes)), tuple(2 * draw(shape) + 1 for shape in shapes)


class Outcome(NamedTuple):
    values: list  # the penalty, and whatever else was returned
    gradients: list  # of the weights
    state: torch.Tensor  # of the random number generators, afterwards


def outcome_of(penalty_function, critic, real, fake, *, seed=7, **on):
    """Of a function of critic, real and fake, under one seed."""
    device = next(critic.parameters()).device.type
    torch.manual_seed(seed)
    np.random.seed(seed)
    returned = penalty_function(critic, real, fake, **on)
    values = list(returned) if isinstance(returned, tuple) else [returned]
    gradients = torch.autograd.grad(values[0], list(critic.parameters()), materialize_grads=True)
    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    numpy_state = torch.from_numpy(np.random.get_state()[1].astype("int64"))
    return Outcome(values, list(gradients), torch.cat([state, numpy_state]))


def assert_same_outcome(actual, expected, dtype=torch.float64):
    """The same values and weight gradients; not all of the gradients are near zero."""
    tolerance = {"rtol": 1e-10, "atol": 0} if dtype == torch.float64 else {}
    torch.testing.assert_close(actual.values, expected.values, **tolerance)
    torch.testing.assert_close(actual.gradients, expected.gradients, **tolerance)
    assert max(gradient.abs().max() for gradient in expected.gradients) > 1e-3
