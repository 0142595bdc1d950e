"""method="compiled": exact for every form of the penalty and every critic that compiles whole.

Most of these tests put AOTAutograd, which takes the derivatives, in front of eager kernels instead of Inductor's: what
is compiled is the same, and it takes a tenth of the time.
"""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._pytree import tree_leaves, tree_map

import fused_gp
from fused_gp import fused_gradient_penalty, r1_penalty, reference
from tests.support.compiling import COMPILES, WithForward
from tests.support.critics import mlp
from tests.support.gradients import gradients
from tests.support.samples import doubles, vectors
from tests.support.tolerances import assert_same

pytestmark = [pytest.mark.usefixtures("one_thread", "no_graph_breaks"), *COMPILES]


class UsesBufferBeforeWriting(nn.Module):
    """The derivative needs the value of a buffer before it was written."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 3).double(), nn.Linear(3, 1).double()
        self.register_buffer("mean", torch.rand(3).double())

    def forward(self, x):
        before = self.mean.clone()
        with torch.no_grad():
            torch.mul(self.mean, 0.5, out=self.mean)
        return self.head(torch.tanh(self.body(x) * before))


class Tied(nn.Module):
    """One weight in two places, and two weights whose gradients are one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(6, width).double() for width in (6, 6, 1))
        self.second.weight = self.first.weight
        self.a, self.b = (nn.Parameter(torch.rand(6).double()) for _ in range(2))

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x))) + self.a + self.b))


def conditional(net, x, labels, *, strength):
    return net(x) + strength * (x * labels).sum(1, keepdim=True).tanh()


def two_inputs(net, x):
    first, second = x
    return net(first) * second.square().mean((1, 2))[:, None]


def pairs_of_tensors():
    return [(doubles(5, 6), doubles(5, 2, 3)) for _ in range(2)]


def results_of(function, critic, samples, **options):
    """Of a copy of the critic: value, norms, the gradients of weights and samples, the buffers afterwards."""
    critic = copy.deepcopy(critic)
    samples = tree_map(lambda x: x.clone().requires_grad_(), samples)
    torch.manual_seed(3)
    penalty, norms = function(critic, *samples, return_norms=True, **options)
    inputs = [*critic.parameters(), *tree_leaves(samples)]
    grads = torch.autograd.grad(penalty.sum(), inputs, materialize_grads=True)
    assert any(grad.any() for grad in grads), "all gradients are zero"
    return penalty.detach(), norms, *grads, *critic.buffers()


def assert_exact(name, critic, samples, extra=None, **options):
    ours = results_of(getattr(fused_gp, name), critic, samples, method="compiled", **(extra or {}), **options)
    expected = results_of(getattr(reference, name), critic, samples, **options)
    assert_same(ours, expected)


def fp64_mlp(width=6):
    return mlp(width).double()


FUSED, NET = "fused_gradient_penalty", (fp64_mlp, vectors)

CASES = {
    "weight": (FUSED, *NET, {"weight": 10.0}),
    "alpha": (FUSED, *NET, {"alpha": torch.rand(5).double()}),
    "sum": (FUSED, *NET, {"reduction": "sum"}),
    "none": (FUSED, *NET, {"reduction": "none", "eps": 0.0}),
    "one-sided": (FUSED, *NET, {"one_sided": True, "target": 0.1}),
    "zero-centred": (FUSED, *NET, {"target": 0.0}),
    "scaled": (FUSED, *NET, {"grad_scale": 8.0}),
    "scaled by no power of two": (FUSED, *NET, {"grad_scale": 1000.0}),
    "scaled by a tensor": (FUSED, *NET, {"grad_scale": torch.tensor(8.0)}),
    "packed": (
        FUSED, lambda: nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(1), fp64_mlp(8)), lambda: vectors(6, 4),
        {"group_size": 2},
    ),
    "conditional": (
        FUSED, lambda: WithForward(conditional), vectors,
        {"critic_args": (torch.ones(5, 6).double(),), "critic_kwargs": {"strength": 0.5}},
    ),
    "two inputs": (FUSED, lambda: WithForward(two_inputs), pairs_of_tensors, {}),
    "patches": (
        FUSED, lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 2)).double(),
        lambda: (doubles(3, 2, 4, 4), doubles(3, 2, 4, 4)), {},
    ),
    "spectral norm": (FUSED, lambda: spectral_norm(nn.Linear(6, 6).double()), vectors, {}),
    "spectral norm, none": (FUSED, lambda: spectral_norm(nn.Linear(6, 6).double()), vectors, {"reduction": "none"}),
    "a buffer as it was": (FUSED, UsesBufferBeforeWriting, vectors, {}),
    "tied weights": (FUSED, Tied, vectors, {}),
    "R1": ("r1_penalty", fp64_mlp, lambda: vectors()[:1], {"weight": 10.0}),
    "R2": ("r2_penalty", fp64_mlp, lambda: vectors()[:1], {}),
    "DRAGAN": ("dragan_penalty", fp64_mlp, lambda: vectors()[:1], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_exact(compiled_graphs, case):
    """Value, norms, the gradients of weights and of both batches, and the buffers of spectral norm are those of plain
    autograd, from one graph without symbols."""
    name, build, samples, options = CASES[case]
    assert_exact(name, build(), samples(), **options)
    assert compiled_graphs.symbolic == [False]


def test_compiled_in_chunks_is_exact(compiled_graphs):
    """The last chunk, of one sample, is a batch of another size."""
    assert_exact(FUSED, mlp().double(), vectors(5), {"chunk_size": 2}, alpha=torch.rand(5).double())
    assert compiled_graphs.symbolic == [False, False]  # torch makes a graph of its own for a batch of one


def test_compiled_by_inductor_is_exact():
    """As users run it, at a first batch size and at others: two compilations."""
    critic = mlp().double()
    for size in (5, 6, 7, 9, 5):
        ours, expected = (
            function(critic, *samples, return_norms=True, **options)
            for samples, alpha in [(vectors(size), torch.rand(size).double())]
            for function, options in (
                (fused_gradient_penalty, {"method": "compiled", "alpha": alpha}),
                (reference.fused_gradient_penalty, {"alpha": alpha}),
            )
        )
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
        grads = [gradients(penalty, critic.parameters()) for penalty, _ in (ours, expected)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 2


def test_dropout_compiled_by_inductor():
    """Inductor draws in another order than eager mode, so the masks differ; their distribution is the same, and the
    backward uses the forward's mask: of a penalty that is quadratic in w, the derivative along w is twice the
    penalty."""
    critic = WithForward(lambda net, x: net(x), nn.Sequential(nn.Dropout(0.75), nn.Linear(4000, 1, bias=False)))
    w = critic.net[1].weight
    nn.init.ones_(w)
    penalty, norms = r1_penalty(critic, torch.randn(6, 4000), weight=2.0, method="compiled", return_norms=True)
    # Each of 4000 elements is kept with probability 1/4, and then multiplied by 4: 16 (1000 +- 27.4).
    kept = norms.square() / 16
    assert (kept - 1000).abs().max() < 5 * 27.4
    assert len(kept.unique()) > 1
    (slope,) = torch.autograd.grad(penalty, w, retain_graph=True)
    (other,) = torch.autograd.grad(3 * penalty, w)  # the backward before this one left what it needs
    torch.testing.assert_close(other, 3 * slope)
    torch.testing.assert_close((slope * w).sum(), 2 * penalty.detach())


@pytest.mark.parametrize("case", ["spectral norm", "spectral norm, none"])
def test_compiled_is_exact_with_a_memory_budget(compiled_graphs, case):
    """With this setting of the process torch would read the vectors of spectral norm again after their update."""
    with torch._functorch.config.patch(activation_memory_budget=0.7):
        test_compiled_is_exact(compiled_graphs, case)


def test_the_gradient_is_that_of_the_weights_in_the_call(compiled_graphs):
    """Whatever changes before the backward."""
    critic, samples = mlp().double(), vectors()
    expected = fused_gradient_penalty(critic, *samples, alpha=0.5)
    expected = gradients(expected, critic.parameters())
    penalty = fused_gradient_penalty(critic, *samples, alpha=0.5, method="compiled")
    with torch.no_grad():
        for p in critic.parameters():
            p += 1
    actual = gradients(penalty, critic.parameters())
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_arguments_get_gradients(compiled_graphs):
    critic, samples = WithForward(conditional), vectors()
    labels, strength = torch.rand(5, 6).double().requires_grad_(), torch.tensor(0.5).double().requires_grad_()
    options = {"alpha": 0.5, "critic_args": (labels,), "critic_kwargs": {"strength": strength}}
    ours = fused_gradient_penalty(critic, *samples, method="compiled", **options)
    expected = reference.fused_gradient_penalty(critic, *samples, **options)
    grads = [torch.autograd.grad(3 * p, [labels, strength, *critic.parameters()], materialize_grads=True)
             for p in (ours, expected)]  # fmt: skip
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    assert grads[0][0].any()
    assert grads[0][1].any()


def test_samples_of_any_batch_size_get_gradients(compiled_graphs):
    critic = mlp().double()
    for size in (5, 6, 7):
        real, fake = vectors(size)
        real.requires_grad_()
        ours, expected = (
            torch.autograd.grad(function(critic, real, fake, alpha=0.5, **options), real)
            for function, options in (
                (fused_gradient_penalty, {"method": "compiled"}), (reference.fused_gradient_penalty, {}),
            )
        )  # fmt: skip
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert compiled_graphs.symbolic == [False, True]


@pytest.mark.parametrize(("scaled", "chunk_size"), [(True, None), (True, 2), (False, None)])
def test_the_loss_scale_keeps_small_fp16_gradients(compiled_graphs, scaled, chunk_size):
    """It multiplies them inside the backward, with grad_scale or without, as in eager mode. Without the scale they
    would be a few steps of fp16's smallest number, 2^-24."""
    critic, (real, fake) = mlp().double().half(), [x.half() for x in vectors(6)]
    with torch.no_grad():
        critic[2].weight *= 2**-9
    options = {"alpha": 0.5, "target": 0.0, "grad_scale": 2.0**12 if scaled else None}
    others = options | {"grad_scale": None if scaled else 2.0}  # compiled as another graph
    fused_gradient_penalty(critic, real, fake, method="compiled", **others)
    ours, eager = (
        gradients(2.0**12 * fused_gradient_penalty(critic, real, fake, **options, **extra), [critic[0].weight])[0]
        for extra in ({"method": "compiled", "chunk_size": chunk_size}, {})
    )
    assert 0 < eager.abs().max() < 2**12 * 2**-19
    torch.testing.assert_close(ours, eager, rtol=2**-7, atol=2**-7 * eager.abs().mean().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(compiled_graphs, reduction):
    """The gradient has no graph, so a second derivative would be silently wrong."""
    critic = mlp().double()
    penalty = fused_gradient_penalty(critic, *vectors(), method="compiled", reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="method='compiled' gives the penalty's first derivative alone"):
        torch.autograd.grad(penalty, critic[0].weight, create_graph=True)


def test_autocast_is_that_of_the_call(compiled_graphs):
    """The critic computes in bf16 inside the context, in fp32 outside, as in eager mode."""
    critic, (real, fake) = mlp().double().float(), [x.float() for x in vectors()]
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ours, eager = (
                fused_gradient_penalty(critic, real, fake, alpha=0.5, method=method)
                for method in ("compiled", "double_backward")
            )
        assert ours.dtype == torch.float32
        grads = [gradients(p, critic.parameters()) for p in (ours, eager)]
        # One rounding to bf16 more or less on the way is 2^-8.
        tolerance = {"rtol": 2**-6, "atol": 2**-8} if enabled else {}
        torch.testing.assert_close((ours, *grads[0]), (eager, *grads[1]), **tolerance)
    assert compiled_graphs.symbolic == [False, False]


def test_the_value_without_gradients(compiled_graphs):
    """Is computed eagerly; nothing is compiled."""
    critic, samples = mlp().double(), vectors()
    with torch.no_grad():
        ours = fused_gradient_penalty(critic, *samples, alpha=0.5, method="compiled")
    assert not ours.requires_grad
    torch.testing.assert_close(ours, reference.fused_gradient_penalty(critic, *samples, alpha=0.5).detach())
    assert compiled_graphs.symbolic == []
