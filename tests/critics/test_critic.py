"""A critic is recognised from call to call, so that it is examined once, and again when it has changed."""

import functools

import pytest
import torch
from torch import nn

from fused_gp import fused_gradient_penalty, r1_penalty
from fused_gp.critics import autograd_graph
from fused_gp.critics.critic import Critic
from tests.support.critics import LoggingOwner, mlp, nested_batch_norm
from tests.support.samples import fp32_vectors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graph_walks(monkeypatch):
    """One entry for each walk over an autograd graph."""
    walks, nodes = [], autograd_graph.nodes
    monkeypatch.setattr(autograd_graph, "nodes", lambda outputs: walks.append(1) or nodes(outputs))
    return walks


def test_an_owner_that_writes_a_log_stays_the_same_critic():
    """A critic is not recognised by what its other methods write."""
    critic = LoggingOwner(mlp(4))
    fused_gradient_penalty(critic, *fp32_vectors(4, 4))  # a callable has a profile once it has run
    profile = Critic(critic).profile
    for _ in range(2):
        fused_gradient_penalty(critic, *fp32_vectors(4, 4))
        assert Critic(critic).profile is profile
    assert len(critic.history) == 3


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "lambda"])
@pytest.mark.parametrize("build", [nested_batch_norm, lambda: mlp(4)], ids=["with", "without"])
def test_modules_are_walked_once_per_critic(monkeypatch, build, wrap):
    """Walking a critic at every call would cost more than a small penalty."""
    critic, walks = wrap(build().eval()), []
    named_modules = nn.Module.named_modules

    def counted(self, *args, **kwargs):
        walks.append(self)
        return named_modules(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    fused_gradient_penalty(critic, *fp32_vectors(4, 4))
    assert walks
    walks.clear()
    for _ in range(3):
        fused_gradient_penalty(critic, *fp32_vectors(4, 4))
        r1_penalty(critic, fp32_vectors(4, 4)[0])
    assert not walks


@pytest.mark.parametrize("method", ["double_backward", "directional", "auto"])
def test_the_graph_is_walked_once_per_critic(graph_walks, method):
    critic = mlp()
    fused_gradient_penalty(critic, *fp32_vectors(), method=method)
    assert graph_walks
    graph_walks.clear()
    for _ in range(3):
        fused_gradient_penalty(critic, *fp32_vectors(), method=method)
        fused_gradient_penalty(lambda x: critic(x), *fp32_vectors(), method="double_backward")
    assert len(graph_walks) <= 2  # once for the lambda, which is another critic
    critic.train(False)  # other operations may run in evaluation mode
    fused_gradient_penalty(critic, *fp32_vectors(), method=method)
    graph_walks.clear()
    fused_gradient_penalty(critic, *fp32_vectors(), method=method)
    assert not graph_walks


class SmoothOrNot(nn.Module):
    """Smooth in evaluation mode, unless its argument says otherwise."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x, activation="silu"):
        x = self.before(x)
        return self.after(torch.relu(x) if self.training or activation == "relu" else nn.functional.silu(x))


def make_not_smooth(critic):
    critic[1] = nn.ReLU()


def test_a_changed_critic_is_examined_again():
    """Another layer, training and evaluation mode, another string among the arguments, another function behind a
    partial."""
    critic = mlp()
    fused_gradient_penalty(critic, *fp32_vectors(), method="directional")
    make_not_smooth(critic)
    with pytest.raises(ValueError, match="found Relu"):
        fused_gradient_penalty(critic, *fp32_vectors(), method="directional")

    critic = SmoothOrNot().eval()
    fused_gradient_penalty(critic, *fp32_vectors(), method="directional")
    with pytest.raises(ValueError, match="found Relu"):
        fused_gradient_penalty(critic, *fp32_vectors(), method="directional", critic_kwargs={"activation": "relu"})
    with pytest.raises(ValueError, match="found Relu"):
        fused_gradient_penalty(critic.train(), *fp32_vectors(), method="directional")

    net = nn.Linear(6, 1)

    def activated(x, activation):
        return activation(net(x))

    fused_gradient_penalty(functools.partial(activated, activation=torch.tanh), *fp32_vectors(), method="directional")
    with pytest.raises(ValueError, match="found Relu"):
        fused_gradient_penalty(
            functools.partial(activated, activation=torch.relu), *fp32_vectors(), method="directional"
        )


def growing_critic(critic, share, data):
    return lambda x: critic(x) * (1 + share) + data[0]


def test_other_numbers_in_a_closure_are_the_same_critic(graph_walks):
    """The alpha of a growing critic, for instance: no new critic, and no new step, at each call."""
    critic, data = mlp(), list(range(1000))
    for step in range(4):
        fused_gradient_penalty(growing_critic(critic, step / 10, data), *fp32_vectors(), method="directional")
        if step == 0:
            graph_walks.clear()
    assert not graph_walks


@pytest.mark.parametrize("first", ["lambda", "module"])
def test_a_module_and_a_lambda_around_it_are_both_examined(first):
    critic = mlp()
    calls = [lambda x: critic(x), critic]
    for each in calls if first == "lambda" else calls[::-1]:
        fused_gradient_penalty(each, *fp32_vectors(), method="directional").backward()
        with torch.no_grad():
            fused_gradient_penalty(each, *fp32_vectors())
