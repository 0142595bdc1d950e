"""Well-known mistakes give other numbers; the package gives the reference's."""

import pytest
import torch
from torch import nn

from fused_gp import fused_gradient_penalty, reference
from tests.support.systems import IMAGES, assert_same_outcome, outcome_of, real_and_fake, strong_critic


def weak_critic():
    """Gradients of norm 0.03, as early in training."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Tanh(), nn.Linear(4, 1))
    critic[1].weight.data.mul_(0.1)
    return critic


def input_gradient(critic, real, fake, alpha, **options):
    x_hat = (alpha * fake + (1 - alpha) * real).requires_grad_()
    return torch.autograd.grad(critic(x_hat).sum(), x_hat, **(options or {"create_graph": True}))[0]


def alpha_per_sample(real):
    return torch.rand(len(real), 1, 1, 1, device=real.device)


def one_alpha(real):
    return torch.rand(1, 1, device=real.device)


def alpha_per_element(real):
    return torch.rand(real.shape, device=real.device)


def normal_alpha(real):
    return torch.randn(len(real), 1, 1, 1, device=real.device)


MISTAKES = []


def mistake(name, margin, critic=strong_critic, shapes=IMAGES):
    """A row: the mistaken formula, and the least relative error of its value."""

    def add(mistaken):
        MISTAKES.append(pytest.param(mistaken, margin, critic, shapes, id=name))
        return mistaken

    return add


@mistake("norm over dim 1 of an unflattened gradient", margin=0.1)
def norm_over_channels(critic, real, fake):
    """(B, H, W) norms over the channels of each pixel, instead of (B,) norms."""
    gradients = input_gradient(critic, real, fake, alpha_per_sample(real))
    return ((gradients.norm(2, dim=1) - 1) ** 2).mean()


@mistake("norm of the whole batch", margin=0.1)
def norm_of_the_batch(critic, real, fake):
    """One norm over all samples, sqrt(B) times too large, in which a small norm of one sample offsets a large one of
    another."""
    gradients = input_gradient(critic, real, fake, alpha_per_sample(real))
    return (gradients.norm(2) - 1) ** 2


@mistake("one alpha for the batch", margin=0.01)
def alpha_of_the_batch(critic, real, fake):
    """All points at the same distance from real."""
    gradients = input_gradient(critic, real, fake, one_alpha(real))
    return ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


@mistake("alpha for each element", margin=0.01)
def alpha_of_the_element(critic, real, fake):
    """The points are in the box between real and fake, near its middle, not on the line."""
    gradients = input_gradient(critic, real, fake, alpha_per_element(real))
    return ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


@mistake("normal alpha", margin=0.01)
def alpha_from_a_normal(critic, real, fake):
    """Two thirds of the points lie beyond real or fake."""
    gradients = input_gradient(critic, real, fake, normal_alpha(real))
    return ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


@mistake("epsilon added to each element", margin=0.01, critic=weak_critic, shapes=(3, 3, 32, 32))
def epsilon_in_the_sum(critic, real, fake):
    """It is added N times under the root: 1e-6 on 3 x 32 x 32 elements adds a norm of 0.055."""
    gradients = input_gradient(critic, real, fake, alpha_per_sample(real))
    norms = torch.sqrt((gradients.flatten(1) ** 2 + 1e-6).sum(1))
    return ((norms - 1) ** 2).mean()


def reference_penalty(critic, real, fake):
    return reference.fused_gradient_penalty(critic, real, fake, eps=0)


def package_penalty(critic, real, fake, **on):
    return fused_gradient_penalty(critic, real, fake, eps=0, **on)


@pytest.mark.parametrize(("mistaken", "margin", "make_critic", "shapes"), MISTAKES)
def test_the_mistake_changes_the_value(place, mistaken, margin, make_critic, shapes):
    """By more than the margin, at one of a few seeds: by chance, alpha gives nearly the right value at one in twenty.
    The package has the value and gradients of the reference."""
    critic = make_critic().eval().to(place.device, torch.float64)
    real, fake = real_and_fake(shapes, torch.float64, place.device)
    expected = outcome_of(reference_penalty, critic, real, fake)
    actual = outcome_of(package_penalty, critic, real, fake, backend=place.backend)
    assert_same_outcome(actual, expected)
    changes = []
    for seed in range(5):
        functions = (mistaken, reference_penalty)
        wrong, right = (outcome_of(each, critic, real, fake, seed=seed).values[0].item() for each in functions)
        changes.append(abs(wrong / right - 1))
    assert max(changes) > margin


def same_within_a_sample(alpha):
    return bool((alpha.amin((1, 2, 3)) == alpha.amax((1, 2, 3))).all())


def another_in_each_sample(alpha):
    return len(alpha.mean((1, 2, 3)).unique()) == len(alpha)


def within_0_and_1(alpha):
    return bool(((alpha >= 0) & (alpha < 1)).all())


@pytest.mark.parametrize(
    ("mistaken", "broken"),
    [
        pytest.param(one_alpha, another_in_each_sample, id="one alpha for the batch"),
        pytest.param(alpha_per_element, same_within_a_sample, id="alpha for each element"),
        pytest.param(normal_alpha, within_0_and_1, id="normal alpha"),
    ],
)
def test_alpha_is_uniform_and_one_per_sample(place, mistaken, broken):
    """Between zeros and ones the points are alpha itself, so this holds for every critic."""
    points = []

    def critic(x):
        points.append(x.detach())
        return x.square().sum((1, 2, 3))

    real, fake = torch.zeros(40, 1, 2, 2, device=place.device), torch.ones(40, 1, 2, 2, device=place.device)
    fused_gradient_penalty(critic, real, fake, backend=place.backend)
    input_gradient(critic, real, fake, mistaken(real))
    ours, mistaken_points = points
    assert same_within_a_sample(ours)
    assert another_in_each_sample(ours)
    assert within_0_and_1(ours)
    assert not broken(mistaken_points)


def test_without_create_graph_the_penalty_trains_nothing(place):
    """Its value is right, but it has no graph; the package's penalty reaches the weights."""
    critic = strong_critic().eval().double().to(place.device)
    real, fake = real_and_fake(IMAGES, torch.float64, place.device)
    torch.manual_seed(7)
    gradients = input_gradient(critic, real, fake, alpha_per_sample(real), create_graph=False)
    wrong = ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
    expected = outcome_of(reference_penalty, critic, real, fake)
    actual = outcome_of(package_penalty, critic, real, fake, backend=place.backend)
    torch.testing.assert_close(wrong, actual.values[0].detach(), rtol=1e-10, atol=0)
    assert not wrong.requires_grad
    assert_same_outcome(actual, expected)


def test_without_epsilon_a_zero_gradient_gives_nan(place):
    """sqrt has no derivative at 0: with one sample of gradient zero, every weight gradient is NaN. The package gives
    zero there, with eps = 0 too."""
    critic = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double().to(place.device)
    real, fake = real_and_fake((5, 4), torch.float64, place.device)
    with torch.no_grad():
        critic[0].weight.mul_(8)
        critic[0].bias.fill_(-1)
        real[2] = fake[2] = 0  # no unit is active here
    torch.manual_seed(7)
    gradients = input_gradient(critic, real, fake, torch.rand(5, 1, device=place.device))
    wrong = ((gradients.square().sum(1).sqrt() - 1) ** 2).mean()
    assert torch.autograd.grad(wrong, critic[0].weight)[0].isnan().any()
    expected = outcome_of(reference_penalty, critic, real, fake)
    actual = outcome_of(package_penalty, critic, real, fake, backend=place.backend)
    assert_same_outcome(actual, expected)
    assert all(gradient.isfinite().all() for gradient in actual.gradients)
