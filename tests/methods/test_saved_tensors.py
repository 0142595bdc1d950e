"""Activation checkpointing, and hooks on the tensors that autograd saves, with every method."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks

from fused_gp import fused_gradient_penalty, reference
from tests.support.compiling import COMPILES
from tests.support.critics import Checkpointed, mlp
from tests.support.gradients import value_and_gradients
from tests.support.samples import vectors
from tests.support.tolerances import assert_same

pytestmark = [pytest.mark.usefixtures("one_thread"), *COMPILES]


def checkpointed(use_reentrant=False):
    body = nn.Sequential(nn.Linear(6, 7), nn.SiLU())
    return nn.Sequential(Checkpointed(body, use_reentrant), nn.Linear(7, 1)).double()


# The tolerance of each method in fp64, relative and absolute.
TOLERANCES = {"double_backward": 1e-10, "auto": 1e-10, "directional": 1e-7}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("method", TOLERANCES)
def test_a_checkpointed_critic_has_the_gradient_of_the_plain_one(method, chunk_size):
    critic, samples = checkpointed(), vectors()
    plain = nn.Sequential(critic[0].part, critic[1])
    ours = fused_gradient_penalty(critic, *samples, alpha=0.5, method=method, chunk_size=chunk_size)
    expected = reference.fused_gradient_penalty(plain, *samples, alpha=0.5)
    results = (value_and_gradients(penalty, *critic.parameters()) for penalty in (ours, expected))
    assert_same(*results, rtol=TOLERANCES[method], atol=TOLERANCES[method])


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("method", TOLERANCES)
def test_reentrant_checkpointing_is_refused(method, chunk_size):
    """torch allows no input gradient through it, not even a first one."""
    remedy = r"reentrant checkpointing, .* Use torch.utils.checkpoint.checkpoint\(..., use_reentrant=False\).$"
    with pytest.raises(ValueError, match=remedy):
        fused_gradient_penalty(checkpointed(use_reentrant=True), *vectors(), method=method, chunk_size=chunk_size)


def test_checkpointing_under_the_users_compile_is_an_error_of_torch(graphs):
    """After this error torch would leave hooks disabled, unless a context restores them. torch 2.11 compiles it,
    with the gradient of the plain critic."""
    critic, penalty_function = checkpointed(), torch.compile(fused_gradient_penalty, backend=graphs)
    if torch.__version__.startswith("2.11."):
        samples, plain = vectors(), nn.Sequential(critic[0].part, critic[1])
        penalties = (
            penalty_function(critic, *samples, alpha=0.5),
            reference.fused_gradient_penalty(plain, *samples, alpha=0.5),
        )
        assert_same(*[value_and_gradients(penalty, *critic.parameters()) for penalty in penalties])
        assert len(graphs.symbolic) == 1
        return
    with disable_saved_tensors_hooks("by this test"), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        penalty_function(critic, *vectors())
    assert "don't yet support saved tensor hooks" in str(caught.value)


@pytest.mark.parametrize("over", ["the call", "the backward too"])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("method", TOLERANCES)
def test_hooks_on_saved_tensors_run_and_change_no_gradient(method, chunk_size, over):
    """Saved tensors are packed and unpacked."""
    critic, samples, packed = mlp().double(), vectors(), []

    def pack(tensor):
        packed.append(tensor.detach().clone())
        return packed[-1]

    expected = value_and_gradients(reference.fused_gradient_penalty(critic, *samples, alpha=0.5), *critic.parameters())
    for hooks in (save_on_cpu(), saved_tensors_hooks(pack, lambda tensor: tensor)):
        with hooks:
            penalty = fused_gradient_penalty(critic, *samples, alpha=0.5, method=method, chunk_size=chunk_size)
            if over == "the backward too":
                ours = value_and_gradients(penalty, *critic.parameters())
        if over == "the call":
            ours = value_and_gradients(penalty, *critic.parameters())
        assert_same(ours, expected, rtol=TOLERANCES[method], atol=TOLERANCES[method])
    assert packed
