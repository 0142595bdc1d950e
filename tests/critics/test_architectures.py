"""Critics of every architecture, and callables around them, compared with plain autograd in fp64."""

import copy
import functools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import fused_gp
from fused_gp import fused_gradient_penalty, reference
from tests.support.critics import (
    Checkpointed,
    Conditional,
    MathAttention,
    MinibatchStd,
    Recurrent,
    WithoutCudnn,
    mlp,
)
from tests.support.family import batches_for, ours_and_reference
from tests.support.places import to_device
from tests.support.samples import doubles, images, quarters, vectors
from tests.support.tolerances import HALF_DTYPES, assert_near_the_largest, assert_same

pytestmark = pytest.mark.usefixtures("one_thread")


def results_of(function, critic, *samples, weights=None, **options):
    """Of a fresh copy of the critic: value, norms, weight gradients, buffers afterwards, next random numbers."""
    if isinstance(critic, nn.Module):
        critic = copy.deepcopy(critic)
        weights = [p for p in critic.parameters() if p.requires_grad]
    torch.manual_seed(3)
    penalty, norms = function(critic, *samples, return_norms=True, **options)
    grads = torch.autograd.grad(penalty, weights, materialize_grads=True)
    assert any(grad.any() for grad in grads), "all gradients are zero"
    buffers = critic.buffers() if isinstance(critic, nn.Module) else ()
    return penalty.detach(), norms, *grads, *buffers, torch.rand(3, device=norms.device)


def assert_same_as_the_reference(place, name, critic, samples, **options):
    """`name` is a function of the family."""
    critic = critic.to(place.device)
    samples = to_device(batches_for(name, *samples), place.device)
    options = to_device(options, place.device)
    ours = results_of(getattr(fused_gp, name), critic, *samples, backend=place.backend, **options)
    assert_same(ours, results_of(getattr(reference, name), critic, *samples, **options))


class WithFunction(nn.Sequential):
    """Layers, and a function of their output."""

    def __init__(self, *layers, then):
        super().__init__(*layers)
        self.then = then

    def forward(self, x):
        return self.then(super().forward(x))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class ImageAndGraph(nn.Module):
    """Samples are images, each with a graph: nodes, and edges as weights between nodes."""

    def __init__(self):
        super().__init__()
        self.image, self.node = nn.Conv2d(2, 3, 3), nn.Linear(3, 4)

    def forward(self, x):
        nodes, edges = x["graph"]
        messages = torch.tanh(edges @ self.node(nodes)).sum((1, 2))
        return self.image(x["image"]).square().mean((1, 2, 3)) + messages


class FirstOnly(nn.Module):
    """A critic of two inputs that ignores the second."""

    def __init__(self):
        super().__init__()
        self.body = mlp(4)

    def forward(self, x):
        used, _ = x
        return self.body(used)


def normalised(norm):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm, nn.Tanh(), nn.Conv2d(4, 1, 2))


def first_frozen():
    critic = mlp(4)
    critic[0].requires_grad_(False)
    return critic


def checkpointed():
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3))
    return nn.Sequential(Checkpointed(body), nn.Linear(5, 1))


ROWS, SMALL_IMAGES = partial(vectors, 4, 4), partial(images, 4, 4)

CRITICS = {
    "conditional": (
        Conditional, lambda: (doubles(4, 6), doubles(4, 6)),
        {"critic_args": (torch.tensor([0, 2, 1, 2]),),
         "critic_kwargs": {"embedding": torch.ones(4, 5, dtype=torch.float64), "strength": 0.5}},
    ),
    "patch map": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 1, 2)), SMALL_IMAGES, {}),
    "packed": (
        lambda: nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(1), mlp(8)),
        lambda: (doubles(6, 4), doubles(6, 4)), {"group_size": 2},
    ),
    "a sum per pair": (
        lambda: WithFunction(mlp(4), then=lambda scores: scores.view(-1, 2).sum(1)),
        lambda: (doubles(6, 4), doubles(6, 4)), {"group_size": 2, "reduction": "sum"},
    ),
    "(B,)": (lambda: WithFunction(mlp(4), then=lambda scores: scores.squeeze(1)), ROWS, {}),
    "(B, 3)": (lambda: mlp(4, out=3), ROWS, {"weight": 10.0}),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 1)), ROWS, {}),
    "spectral norm": (
        lambda: nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.SiLU(), spectral_norm(nn.Linear(6, 1))), ROWS, {},
    ),
    "layer norm": (lambda: normalised(nn.LayerNorm([4, 4, 4])), SMALL_IMAGES, {}),
    "group norm": (lambda: normalised(nn.GroupNorm(2, 4)), SMALL_IMAGES, {}),
    "instance norm": (lambda: normalised(nn.InstanceNorm2d(4, affine=True)), SMALL_IMAGES, {}),
    "minibatch stddev": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), MinibatchStd(), mlp(6)), ROWS, {}),
    "lstm": (lambda: WithoutCudnn(Recurrent()), lambda: (doubles(3, 5, 3), doubles(3, 5, 3)), {}),
    "transformer": (lambda: MathAttention(Encoder()), lambda: (doubles(3, 5, 4), doubles(3, 5, 4)), {}),
    "pytree": (
        ImageAndGraph,
        lambda: tuple({"image": doubles(3, 2, 4, 4), "graph": (doubles(3, 5, 3), doubles(3, 5, 5))} for _ in range(2)),
        {},
    ),
    "an input ignored": (FirstOnly, lambda: ([doubles(4, 4), doubles(4, 7)], [doubles(4, 4), doubles(4, 7)]), {}),
    "first layer frozen": (first_frozen, ROWS, {}),
    "checkpointed": (checkpointed, ROWS, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["fused_gradient_penalty", "r1_penalty", "dragan_penalty"])
@pytest.mark.parametrize("critic", CRITICS)
def test_penalty_of_every_architecture(place, critic, name):
    """The critic gets its arguments, and draws its random numbers, as with plain autograd."""
    build, samples, options = CRITICS[critic]
    assert_same_as_the_reference(place, name, build().double(), samples(), **options)


def test_a_checkpointed_critic_has_the_penalty_of_the_plain_one():
    """The reference runs checkpointed critics too, so this compares with the same critic without checkpointing."""
    critic, samples = checkpointed().double(), ROWS()
    plain = nn.Sequential(critic[0].part, critic[1])
    assert_same(
        results_of(fused_gradient_penalty, critic, *samples), results_of(fused_gradient_penalty, plain, *samples)
    )


class Owner:
    """Not a module, but has one, which it calls in `__call__` or a method."""

    def __init__(self, net):
        self.net = net

    def score(self, x):
        return self.net(x)

    __call__ = score


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "partial": lambda net: functools.partial(net),
    "partial of a function": lambda net: functools.partial(lambda scale, x: scale * net(x), 1.0),
    "lambda": lambda net: lambda x: net(x),
    "bound method": lambda net: net.forward,
    "bound method of an owner": lambda net: Owner(net).score,
    "callable object": Owner,
}


@pytest.mark.parametrize("name", ["fused_gradient_penalty", "r1_penalty", "r2_penalty", "dragan_penalty"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_callable_around_a_critic_has_the_critics_penalty(place, wrapper, name):
    """And the weights get the same gradients."""
    net = mlp(4).double().to(place.device)
    samples = to_device(batches_for(name, *ROWS()), place.device)
    weights = list(net.parameters())
    ours = results_of(getattr(fused_gp, name), WRAPPERS[wrapper](net), *samples, weights=weights, backend=place.backend)
    assert_same(ours, results_of(getattr(reference, name), lambda x: net(x), *samples, weights=weights))


def test_dicts_are_matched_by_key(place):
    """fake's keys may have another order; the critic gets real's."""
    critic = ImageAndGraph().double().to(place.device)
    real, fake = to_device(CRITICS["pytree"][1](), place.device)
    shuffled = {"graph": fake["graph"], "image": fake["image"]}
    ours = results_of(fused_gradient_penalty, critic, real, shuffled, backend=place.backend)
    assert_same(ours, results_of(reference.fused_gradient_penalty, critic, real, fake))


def test_a_frozen_critic_gives_gradients_to_the_samples(place):
    """A generator's step: no gradients for the weights, and for both batches those of autograd."""
    critic = mlp(4).double().to(place.device).requires_grad_(False)
    results = []
    for function, options in ours_and_reference("fused_gradient_penalty", backend=place.backend):
        torch.manual_seed(0)
        real, fake = (t.requires_grad_() for t in to_device(ROWS(), place.device))
        penalty, norms = function(critic, real, fake, alpha=0.3, return_norms=True, **options)
        results.append((penalty.detach(), norms, *torch.autograd.grad(penalty, (real, fake))))
    assert_same(*results)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fused_gradient_penalty", "r1_penalty"])
def test_half_precision_weights(place, dtype, name):
    """The points between these samples are exact in the dtype, so the critic runs on the same numbers; only the
    gradient of the norm is rounded, once. The interpreter truncates to bf16."""
    critic = mlp(4).to(place.device, dtype)
    samples = batches_for(name, *quarters((5, 4), dtype, place.device))
    options = {"alpha": 0.5} if name == "fused_gradient_penalty" else {}
    ours = results_of(getattr(fused_gp, name), critic, *samples, backend=place.backend, **options)
    expected = results_of(getattr(reference, name), critic, *samples, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    torch.testing.assert_close(ours[:2], expected[:2])
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in expected]
    assert_near_the_largest(ours[2:-1], expected[2:-1], 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(ours[-1], expected[-1])
