"""method="compiled": critics that cannot be compiled are refused at each call, and torch is left as it was."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from fused_gp import fused_gradient_penalty
from tests.support.compiling import COMPILES, WithForward, assert_exact_of
from tests.support.critics import FusedTanh, mlp
from tests.support.messages import (
    ANOTHER_METHOD,
    FLASH,
    FUSED,
    NO_PART_IN_THE_SCORES,
    NOT_COMPILED_WHOLE,
    NOT_TWICE_DIFFERENTIABLE_COMPILED,
    SAVED_TENSOR_HOOKS,
)
from tests.support.samples import vectors

pytestmark = [pytest.mark.usefixtures("one_thread", "no_graph_breaks"), *COMPILES]


def attention(net, x):
    x = x[:, None, None].float().repeat(1, 1, 3, 1)
    return net(nn.functional.scaled_dot_product_attention(x, x, x).mean((1, 2)).double())


def branching(net, x):
    return net(x) if x.sum() > 0 else net(-x)


def printing(net, x):
    print("scores")
    return net(x)


ERRORS = {
    "flash attention": (
        attention,
        NOT_TWICE_DIFFERENTIABLE_COMPILED.format(*FLASH),
    ),
    "once_differentiable": (
        lambda net, x: net(FusedTanh.apply(x)),
        NOT_TWICE_DIFFERENTIABLE_COMPILED.format(*FUSED),
    ),
    "reentrant checkpointing": (lambda net, x: checkpoint(net, x, use_reentrant=True), SAVED_TENSOR_HOOKS),
    "checkpointing": (lambda net, x: checkpoint(net, x, use_reentrant=False), SAVED_TENSOR_HOOKS),
    "a print": (
        printing,
        NOT_COMPILED_WHOLE.format(
            "Failed to trace builtin operator Explanation: Dynamo does not know how to trace builtin operator `print` "
            "with argument types ['str'] (has_kwargs False)"
        ),
    ),
    "control flow that depends on data": (
        branching,
        NOT_COMPILED_WHOLE.format(
            "Data-dependent branching Explanation: Detected data-dependent branching (e.g. `if my_tensor.sum() > 0:`). "
            "Dynamo does not support tracing dynamic control flow."
        ),
    ),
    "scores of something else": (
        lambda net, x: net(x.detach()),
        NO_PART_IN_THE_SCORES,
    ),
    "a mean": (
        lambda net, x: net(x).mean(),
        "critic must return at least one score per sample or group, got shape () for 5 of them: a mean over the batch "
        "would shrink every gradient",
    ),
}


@pytest.mark.parametrize("cause", ERRORS)
def test_critics_that_cannot_be_compiled_are_refused(compiled_graphs, cause, capfd):
    """In one line; hooks on saved tensors work afterwards."""
    forward, message = ERRORS[cause]
    critic, samples = WithForward(forward), vectors()
    for _ in range(2):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
            fused_gradient_penalty(critic, *samples, method="compiled")
        assert str(caught.value) == message
    assert "Traceback" not in capfd.readouterr().err
    with save_on_cpu():
        fused_gradient_penalty(mlp().double(), *samples).backward()
    counters["graph_break"].clear()  # the compiler counts what it refused


class MovingMean(nn.Module):
    """Writes the mean of its inputs to a buffer, and returns its input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x


@pytest.mark.parametrize("first", [partial(nn.BatchNorm1d, 6, dtype=torch.float64), MovingMean])
@pytest.mark.filterwarnings("ignore:critic has batch normalisation")
def test_critics_that_change_buffers_are_refused(compiled_graphs, first):
    """torch.func does not allow it inside a derivative. Its own message differs from version to version."""
    critic = nn.Sequential(first(), mlp().double())
    before = copy.deepcopy(critic.state_dict())
    with pytest.raises(ValueError, match="changes no buffer on the way from points to scores, as batch") as caught:
        fused_gradient_penalty(critic, *vectors(), method="compiled")
    assert str(caught.value).endswith(" " + ANOTHER_METHOD)
    torch.testing.assert_close(critic.state_dict(), before, rtol=0, atol=0)
    if first is not MovingMean:
        assert_exact_of(critic.eval(), *vectors())


def test_sparse_gradients_are_refused(compiled_graphs):
    """Which the compiler would refuse in the backward."""

    class Embedded(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.words, self.net = nn.Embedding(3, 6, sparse=sparse, dtype=torch.float64), mlp().double()

        def forward(self, x, words):
            return self.net(x * self.words(words))

    words = torch.tensor([0, 1, 2, 0, 1])
    fused_gradient_penalty(Embedded(False), *vectors(5), critic_args=(words,), method="compiled").backward()
    with pytest.raises(ValueError, match=r"needs dense gradients, got a critic with Embedding\(sparse=True\)"):
        fused_gradient_penalty(Embedded(True), *vectors(5), critic_args=(words,), method="compiled")


def test_dropout_is_refused_at_a_second_batch_size(compiled_graphs):
    """On the CPU torch cannot trace it for a batch of variable size. The message names the batch size, not the critic
    as such."""
    critic = nn.Sequential(nn.Dropout(0.5), mlp().double())
    for _ in range(2):
        fused_gradient_penalty(critic, *vectors(5), method="compiled")
        with pytest.raises(ValueError, match="whole, for other batch sizes than the first, 5, as well, and it"):
            fused_gradient_penalty(critic, *vectors(4), method="compiled")
    counters["graph_break"].clear()  # the compiler counts what it refused


def test_hooks_on_saved_tensors_are_refused(compiled_graphs):
    """Before and after the compilation; hooks work afterwards."""
    critic, samples = mlp().double(), vectors()
    for _ in range(2):
        with pytest.raises(ValueError, match="method='compiled' cannot trace") as caught, save_on_cpu():
            fused_gradient_penalty(critic, *samples, method="compiled")
        assert str(caught.value) == SAVED_TENSOR_HOOKS
        with save_on_cpu():
            fused_gradient_penalty(critic, *samples).backward()
        assert_exact_of(critic, *samples)


def test_a_critic_that_changes_at_every_call_is_refused(compiled_graphs):
    """A number in an attribute is a constant of the graph."""
    critic = WithForward(lambda net, x: critic.fade * net(x))
    limit = torch._dynamo.config.recompile_limit
    for step in range(limit):
        critic.fade = 1.0 / (1 + step)
        fused_gradient_penalty(critic, *vectors(), method="compiled")
    critic.fade = 0.0
    with pytest.raises(ValueError, match="that does not change") as caught:
        fused_gradient_penalty(critic, *vectors(), method="compiled")
    assert str(caught.value) == (
        f"method='compiled' needs a critic that does not change, got one that was compiled {limit} times and has "
        "changed again: numbers that change from call to call belong in tensors, such as buffers"
    )
