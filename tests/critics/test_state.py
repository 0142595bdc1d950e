"""Runs of a critic from the same state: one call changes random state and buffers as one run does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fused_gp import fused_gradient_penalty, reference
from fused_gp.critics.critic import Critic
from tests.support.critics import Apply, Checkpointed, MinibatchStd, spectrally_normalised
from tests.support.family import ours_and_reference
from tests.support.gradients import gradient, gradients, relative_error
from tests.support.samples import vectors
from tests.support.tolerances import assert_same_sums

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "lambda"])
def test_every_rerun_has_the_state_of_the_first_run(wrapped):
    """The masks of dropout and the vectors of spectral norm, behind a lambda too; one call leaves the buffers and the
    random state of one run."""

    def build():
        torch.manual_seed(2)
        return nn.Sequential(spectral_norm(nn.Linear(6, 40)), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 1)).double()

    real, fake = vectors(8)
    results = []
    for function, options in ours_and_reference("fused_gradient_penalty", method="directional"):
        critic = build()
        owners = [critic[0].parametrizations.weight[0]]
        held = [owner._u for owner in owners]
        torch.manual_seed(3)
        penalty = function((lambda x, net=critic: net(x)) if wrapped else critic, real, fake, **options)
        assert [owner._u for owner in owners] == held, "the buffers were replaced"
        results.append((gradient(penalty, critic), torch.rand(3), *critic.buffers()))
    (ours, *ours_states), (expected, *states) = results
    assert relative_error(ours, expected) <= 1e-8
    for actual, expected in zip(ours_states, states, strict=True):
        torch.testing.assert_close(actual, expected)


def test_buffers_under_a_checkpoint_are_refused_unless_in_chunks():
    """The backward of a chunk is inside the call. Elsewhere the checkpoint would run again from other buffers."""
    real, fake = vectors(8)

    def build():
        torch.manual_seed(2)
        return spectrally_normalised().double()

    plain, critic = build(), build()
    expected = gradient(reference.fused_gradient_penalty(plain, real, fake, alpha=0.5), plain)
    checkpointed = Checkpointed(critic)
    options = {"alpha": 0.5, "method": "directional"}
    ours = gradient(fused_gradient_penalty(checkpointed, real, fake, chunk_size=8, **options), critic)
    assert relative_error(ours, expected) <= 1e-8
    for actual, expected in zip(critic.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="and found _SpectralNorm, which has some, under checkpointing"):
        fused_gradient_penalty(checkpointed, real, fake, **options)
    fused_gradient_penalty(checkpointed.eval(), real, fake, **options).backward()
    assert not any(part._forward_pre_hooks for part in checkpointed.modules())


@pytest.mark.parametrize("options", [{"method": "auto"}, {"method": "compiled"}, {"chunk_size": 2}], ids=str)
def test_a_refused_call_draws_no_random_numbers(options):
    """So code that catches the error and calls another method has the random numbers of that method alone."""
    net = nn.Sequential(nn.Dropout(0.5), MinibatchStd(), nn.Linear(7, 1))
    critic = net if "chunk_size" in options else nn.Sequential(Apply(torch.detach), net)
    real, fake = vectors()
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="critic must"):
        fused_gradient_penalty(critic.double(), real, fake, alpha=0.3, **options)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.rand(3).equal(after)


def test_examining_a_critic_changes_no_state():
    """The first call draws no other random numbers, and leaves the same buffers and no gradient."""
    critic = nn.Sequential(spectral_norm(nn.Linear(6, 5)), nn.Dropout(0.5), nn.Linear(5, 1)).double()
    examined = copy.deepcopy(critic)
    real, fake = vectors(7)
    state = [buffer.clone() for buffer in examined.buffers()]
    fused_gradient_penalty(examined, real, fake, chunk_size=2)  # this call examines it
    for buffer, before in zip(examined.buffers(), state, strict=True):
        buffer.copy_(before)
    results = []
    for each in (examined, critic):
        torch.manual_seed(1)
        penalty = fused_gradient_penalty(each, real, fake, chunk_size=2)
        results.append((*gradients(penalty, each.parameters()), *each.buffers(), torch.rand(3)))
        assert all(p.grad is None for p in each.parameters())
    assert_same_sums(results[1], results[0])


def test_a_cuda_graph_capture_refuses_reruns(monkeypatch):
    """Before the generator raises its own error."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="a CUDA graph cannot capture critics that run again"):
        Critic(nn.Identity()).state(torch.device("cuda"))
    Critic(nn.Identity()).state(torch.device("cpu"))
