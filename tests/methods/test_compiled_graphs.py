"""method="compiled": how many graphs are compiled, when they are compiled again, and when they are freed."""

import gc
import weakref

import pytest
import torch

from fused_gp import fused_gradient_penalty, reference
from fused_gp.critics import critic as critic_registry
from tests.support.compiling import COMPILES, WithForward, assert_exact_of
from tests.support.critics import mlp
from tests.support.gradients import gradients
from tests.support.samples import vectors
from tests.support.tolerances import assert_same

pytestmark = [pytest.mark.usefixtures("one_thread", "no_graph_breaks"), *COMPILES]


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "lambda"])
def test_the_first_batch_size_has_a_graph_and_all_others_share_one(compiled_graphs, wrap):
    """The first graph has static sizes. A lambda made anew at each step is no new critic."""
    net = mlp().double()

    def call(size):
        fused_gradient_penalty(wrap(net), *vectors(size), method="compiled").backward()
        return compiled_graphs.symbolic

    assert [call(8)[:] for _ in range(3)] == [[False]] * 3
    assert [call(size)[:] for size in (5, 6, 7, 9)] == [[False, True]] * 4
    assert call(8) == [False, True]
    assert call(1) == [False, True, False]  # torch always compiles a batch of one sample separately
    assert call(6) == [False, True, False]


def test_other_batch_sizes_share_a_graph_without_automatic_dynamic_shapes(compiled_graphs):
    """torch itself makes changed sizes dynamic, unless this setting is off."""
    critic = mlp().double()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for size in (8, 5, 6, 7):
            fused_gradient_penalty(critic, *vectors(size), method="compiled")
    assert compiled_graphs.symbolic == [False, True]


def test_other_weights_and_scales_need_no_other_graph(compiled_graphs):
    critic, real, fake = mlp().double(), *vectors()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for weight in (1, 2.5, 10.0):
        assert_exact_of(critic, real, fake, weight=weight)
    assert compiled_graphs.symbolic == [False]
    for scale in (2.0, 4.0, torch.tensor(8.0)):
        assert_exact_of(critic, real, fake, grad_scale=scale)
    for scale in (16.0, 32.0):
        scaler.update(scale) if scaler._scale is not None else scaler.scale(torch.ones(()))
        ours = fused_gradient_penalty(critic, real, fake, alpha=0.5, grad_scale=scaler, method="compiled")
        torch.testing.assert_close(ours, reference.fused_gradient_penalty(critic, real, fake, alpha=0.5))
    assert compiled_graphs.symbolic == [False, False]


def test_other_numbers_in_tensors_need_no_other_graph(compiled_graphs):
    """Such as a fade-in factor among the arguments."""
    critic = WithForward(lambda net, x, fade: fade * net(x))
    for step in range(12):
        assert_exact_of(critic, *vectors(), critic_args=(torch.tensor(0.5 + 0.1 * step),))
    assert compiled_graphs.symbolic == [False]


def test_each_mode_of_the_critic_has_one_graph(compiled_graphs):
    """Training and evaluation, frozen and trainable: the graph of a frozen layer would lose its gradient."""
    doubled = WithForward(lambda net, x: net(2 * x if doubled.training else x))
    for _ in range(2):
        for training in (True, False):
            for thawed in (False, True):
                doubled.train(training)
                doubled.net[0].requires_grad_(thawed)
                assert_exact_of(doubled, *vectors())
    assert compiled_graphs.symbolic == [False] * 4


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "lambda"])
def test_graphs_are_freed_with_their_critic(compiled_graphs, wrap):
    critic = mlp().double()
    for size in (5, 6):
        fused_gradient_penalty(wrap(critic), *vectors(size), method="compiled").backward()
    references = [weakref.ref(critic)]
    for profile in critic_registry._profiles[critic].values():
        references += [
            weakref.ref(run.__wrapped__) for kept in profile.compiled.values() for run in (kept.fixed, kept.variable)
        ]
        references += map(weakref.ref, profile.compiled.values())
    assert len(references) == 4
    assert all(ref() is not None for ref in references)
    del critic, profile
    gc.collect()
    assert [ref() for ref in references] == [None] * 4


def test_each_of_many_critics_of_one_class_is_compiled(compiled_graphs):
    """torch.compile stops after eight graphs of one function."""
    critics = [mlp().double() for _ in range(10)]
    for _ in range(2):
        for critic in critics:
            assert_exact_of(critic, *vectors())
    assert compiled_graphs.symbolic == [False] * 10


@pytest.mark.parametrize("compiled", ["all", "in place", "part"])
def test_critics_that_are_compiled_already_are_compiled_with_the_penalty(compiled_graphs, compiled):
    """Once more, as a part of it."""
    net = mlp().double()
    critic = WithForward(lambda net, x: net(x), net)
    if compiled == "in place":
        critic.compile(backend="aot_eager")
    elif compiled == "all":
        critic = torch.compile(critic, backend="aot_eager")
    else:
        critic.net = torch.compile(net, backend="aot_eager")
    samples = vectors()
    ours = fused_gradient_penalty(critic, *samples, alpha=0.5, method="compiled")
    expected = reference.fused_gradient_penalty(net, *samples, alpha=0.5)
    assert_same((ours, *gradients(ours, net.parameters())), (expected, *gradients(expected, net.parameters())))
    assert len(compiled_graphs.symbolic) == 1
