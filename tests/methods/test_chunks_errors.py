"""chunk_size: critics and options that are refused, above all critics that couple the samples of a batch."""

import numpy as np
import pytest
import torch
from torch import nn

from fused_gp import fused_gradient_penalty, reference
from tests.support.critics import Apply, FusedTanh, MinibatchStd, OneScoreTooMany, Transposed, mlp
from tests.support.gradients import gradients
from tests.support.messages import (
    COUPLED_SAMPLES,
    FUSED,
    NO_PART_IN_THE_SCORES,
    NOT_A_MODULE,
    NOT_TWICE_DIFFERENTIABLE,
    exactly,
)
from tests.support.samples import fp32_vectors, vectors
from tests.support.tolerances import assert_same_sums

pytestmark = pytest.mark.usefixtures("one_thread")


def mean(x):
    return x.mean(1)


class WithHiddenParameter(nn.Module):
    """Uses a weight that is not registered as a parameter."""

    def __init__(self):
        super().__init__()
        self.body, self.hidden = nn.Linear(6, 5), [torch.ones(5, 1, requires_grad=True)]

    def forward(self, x):
        return torch.tanh(self.body(x)) @ self.hidden[0]


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.bias.expand(len(x))


ERRORS = {
    "minibatch statistics": (lambda: nn.Sequential(mlp(), MinibatchStd()), {}, COUPLED_SAMPLES),
    "transposed scores": (lambda: nn.Sequential(nn.Linear(6, 2), nn.Tanh(), Transposed()), {}, COUPLED_SAMPLES),
    "an odd number of scores": (
        lambda: OneScoreTooMany(mlp()), {},
        "critic must return as many scores for every sample with chunk_size, got (3,) for 2"
    ),
    "a hidden parameter": (
        WithHiddenParameter, {},
        "critic must reach no parameters but its own with chunk_size, got one that reaches another, of shape (5, 1): "
        "make it a part of the critic, or pass it in critic_args",
    ),
    "a function": (lambda: mean, {}, NOT_A_MODULE),
    "each sample's own": (
        mlp, {"reduction": "none"},
        "reduction must be 'mean' or 'sum' with chunk_size, which needs one number, got 'none'",
    ),
    "an input that is not used": (
        Constant, {}, NO_PART_IN_THE_SCORES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_critics_and_options_that_are_refused(name):
    build, options, message = ERRORS[name]
    torch.manual_seed(0)
    critic = build()
    with pytest.raises(ValueError, match=exactly(message)):
        fused_gradient_penalty(critic, *fp32_vectors(5), chunk_size=2, **options)


def test_coupled_samples_are_found_with_the_first_batch_of_two():
    """A batch of one sample has none to couple."""
    critic = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), MinibatchStd(), mlp())
    fused_gradient_penalty(critic, *fp32_vectors(1), chunk_size=2)
    with pytest.raises(ValueError, match=exactly(COUPLED_SAMPLES)):
        fused_gradient_penalty(critic, *fp32_vectors(5), chunk_size=2)


def test_coupled_samples_are_found_once_the_last_layer_is_not_zero():
    """While it is, no score depends on any sample."""
    critic = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), MinibatchStd(), mlp())
    nn.init.zeros_(critic[3][2].weight)
    fused_gradient_penalty(critic, *fp32_vectors(5), chunk_size=2)
    nn.init.ones_(critic[3][2].weight)
    with pytest.raises(ValueError, match=exactly(COUPLED_SAMPLES)):
        fused_gradient_penalty(critic, *fp32_vectors(5), chunk_size=2)


def test_coupled_samples_are_found_in_training_mode_after_evaluation_mode():
    """Batch normalisation is allowed in evaluation mode alone."""
    critic = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).eval()
    fused_gradient_penalty(critic, *fp32_vectors(5), chunk_size=2).backward()
    critic.train()
    with (
        pytest.warns(UserWarning, match="batch normalisation in training mode"),
        pytest.raises(ValueError, match=exactly(COUPLED_SAMPLES)),
    ):
        fused_gradient_penalty(critic, *fp32_vectors(5), chunk_size=2)


def assert_exact_in_chunks(critic, real, fake, chunk_size=2, args=(), exact_args=()):
    ours = fused_gradient_penalty(critic, real, fake, alpha=0.3, critic_args=args, chunk_size=chunk_size)
    expected = reference.fused_gradient_penalty(critic, real, fake, alpha=0.3, critic_args=exact_args)
    assert_same_sums(gradients(ours, critic.parameters()), gradients(expected, critic.parameters()))


def changed_critics(critic):
    """Changes the critic, and yields whether it couples samples then."""
    critic.train()
    critic[1].eval()
    yield False  # frozen batch normalisation
    critic.train()
    yield True
    critic.eval()
    yield False
    critic[1].train()
    yield True
    critic[1] = nn.Tanh()
    yield False
    critic[1] = nn.Sequential(MinibatchStd(), nn.Linear(6, 5).double())
    yield True


@pytest.mark.filterwarnings("ignore:critic has batch normalisation")
def test_a_changed_critic_is_examined_again():
    critic = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()
    real, fake = vectors(7)
    for coupled in changed_critics(critic):
        if coupled:
            with pytest.raises(ValueError, match=exactly(COUPLED_SAMPLES)):
                fused_gradient_penalty(critic, real, fake, chunk_size=2)
        else:
            assert_exact_in_chunks(critic, real, fake)


def test_another_flag_among_the_arguments_is_examined_again():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.separate, self.coupled = mlp(), nn.Sequential(MinibatchStd(), nn.Linear(7, 1))

        def forward(self, x, compare):
            return self.separate(x) + self.coupled(x) if compare else self.separate(x)

    critic = Flagged().double()
    fused_gradient_penalty(critic, *vectors(7), critic_args=(False,), chunk_size=2)
    with pytest.raises(ValueError, match=exactly(COUPLED_SAMPLES)):
        fused_gradient_penalty(critic, *vectors(7), critic_args=(True,), chunk_size=2)


def test_arrays_along_the_batch_must_be_tensors():
    """Or every chunk would get the entries of the first samples. A single chunk has nothing to cut."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, weights):
            scores = self.net(x)
            return torch.stack([score * float(weight) for score, weight in zip(scores, weights, strict=False)])

    critic, (real, fake), weights = Weighted().double(), vectors(4), np.array([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="in tensors with chunk_size, which cuts them, got a NumPy array of 4"):
        fused_gradient_penalty(critic, real, fake, critic_args=(weights,), chunk_size=2)
    for given, chunk_size in ((weights, 4), (torch.tensor(weights), 2)):
        assert_exact_in_chunks(critic, real, fake, chunk_size, args=(given,), exact_args=(weights,))


def test_a_missing_second_derivative_is_found_in_chunks_too():
    critic = nn.Sequential(mlp(), Apply(FusedTanh.apply)).double()
    with pytest.raises(ValueError, match=exactly(NOT_TWICE_DIFFERENTIABLE.format(*FUSED))):
        fused_gradient_penalty(critic, *vectors(7), chunk_size=2)
