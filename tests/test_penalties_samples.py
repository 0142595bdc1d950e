"""Samples of several tensors, and groups of samples: one alpha and one norm for what belongs together."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fused_gp import dragan_penalty, fused_gradient_penalty, interpolate, r1_penalty
from tests.support.family import ours_and_reference
from tests.support.gradients import gradients
from tests.support.tolerances import assert_same

NodesAndEdges = namedtuple("NodesAndEdges", ["nodes", "edges"])

# Structures of three tensors: a number per sample, a vector, an image.
STRUCTURES = {
    "tuple": lambda a, b, c: (a, b, c),
    "list": lambda a, b, c: [a, b, c],
    "dict": lambda a, b, c: {"image": c, "label": a, "matrix": b},
    "namedtuple": lambda a, b, c: NodesAndEdges(a, (b, c)),
    "nested": lambda a, b, c: {"graph": (a, [b]), "image": OrderedDict(pixels=c)},
    "one": lambda a, b, c: [c],
}


def three_tensors(device, dtype=torch.float64, batch=4):
    shapes = ((batch,), (batch, 5), (batch, 3, 2, 4))
    a, b, c = (torch.randn(shape, dtype=torch.float64, device=device).to(dtype) for shape in shapes)
    return a, b, c.to(memory_format=torch.channels_last)


class CriticOfAnyStructure(torch.nn.Module):
    """Its scores depend on all tensors of a sample, in any structure."""

    def __init__(self, samples, features=6):
        super().__init__()
        widths = [t[0].numel() for t in tree_leaves(samples)]
        self.first = torch.nn.ModuleList(torch.nn.Linear(width, features) for width in widths)
        self.last = torch.nn.Linear(features, 1)

    def forward(self, samples):
        pairs = zip(self.first, tree_leaves(samples), strict=True)
        hidden = sum(layer(t.flatten(1) if t.ndim > 1 else t[:, None]) for layer, t in pairs)
        return self.last(torch.tanh(hidden))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "options",
    [{}, {"one_sided": True, "target": 0.1}, {"target": 0.0, "reduction": "sum"}, {"eps": 0.0, "grad_scale": 16.0}],
    ids=str,
)
def test_several_tensors_have_one_alpha_and_one_norm(place, structure, options):
    """Value, norms and weight gradients of the reference; the critic gets samples in the structure of real."""
    make = STRUCTURES[structure]
    real, fake = (make(*three_tensors(place.device)) for _ in range(2))
    critic = CriticOfAnyStructure(real).double().to(place.device)
    types = []

    def recording_critic(samples):
        types.append(type(samples))
        return critic(samples)

    results = []
    for function, extra in ours_and_reference("fused_gradient_penalty", backend=place.backend):
        torch.manual_seed(3)
        penalty, norms = function(recording_critic, real, fake, return_norms=True, **options, **extra)
        weights = gradients(penalty, critic.parameters())
        results.append((penalty, norms, *weights, torch.rand(1, device=place.device)))
    assert_same(*results)
    assert types == [type(real)] * 2


def test_an_ignored_input_has_gradient_zero(place):
    """The norm is that of the others; ignoring all of them is an error."""
    a, b, c = three_tensors(place.device)

    def critic(samples):
        return samples[1].square().sum(1)

    penalty, norms = fused_gradient_penalty(
        critic, (a, b, c), (a, b, c), return_norms=True, eps=0.0, backend=place.backend
    )
    torch.testing.assert_close(norms, 2 * b.norm(dim=1))
    torch.testing.assert_close(penalty, ((2 * b.norm(dim=1) - 1) ** 2).mean())
    with pytest.raises(ValueError, match="scores that depend on the samples it is given"):
        fused_gradient_penalty(lambda samples: torch.ones(4, device=a.device), (a, b), (a, b), backend=place.backend)


def test_gradients_of_alpha_add_up_over_several_tensors(place):
    """And those of fake are autograd's."""
    real, fake = three_tensors(place.device), [t.requires_grad_() for t in three_tensors(place.device)]
    alpha = torch.rand(4, dtype=torch.float64, device=place.device, requires_grad=True)
    critic = CriticOfAnyStructure(real).double().to(place.device)
    results = []
    for function, extra in ours_and_reference("fused_gradient_penalty", backend=place.backend):
        penalty = function(critic, real, tuple(fake), alpha=alpha, **extra)
        results.append(torch.autograd.grad(penalty, [alpha, *fake]))
    assert_same(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_value_of_structures_without_gradients(place, mode):
    real, fake = (STRUCTURES["nested"](*three_tensors(place.device)) for _ in range(2))
    critic = CriticOfAnyStructure(real).double().to(place.device)
    expected = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
    with mode():
        penalty = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
    assert not penalty.requires_grad
    torch.testing.assert_close(penalty, expected.detach())


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        ((1, 2), [1, 2], r"got \('Tensor', 'Tensor'\) and \['Tensor', 'Tensor'\]"),
        ((1, 2), (1,), r"got \('Tensor', 'Tensor'\) and \('Tensor',\)"),
        ((1, 2), 1, r"got \('Tensor', 'Tensor'\) and Tensor"),
        (1, (1, 2), r"got Tensor and \('Tensor', 'Tensor'\)"),
        ({"a": 1}, {"b": 1}, r"got {'a': 'Tensor'} and {'b': 'Tensor'}"),
        ((1, 2), (1, [1]), r"got \('Tensor', 'Tensor'\) and \('Tensor', \['Tensor'\]\)"),
    ],
    ids=str,
)
def test_different_structures_are_refused(real, fake, message):
    real, fake = (tree_map(lambda _: torch.randn(2, 3), tree) for tree in (real, fake))
    with pytest.raises(ValueError, match="real and fake must have one structure, " + message):
        fused_gradient_penalty(lambda x: x, real, fake)


def test_the_different_tensor_is_named():
    good = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"real\['b'\]\[0\] and fake\['b'\]\[0\] must have one shape, got"):
        interpolate({"a": good, "b": [good]}, {"a": good, "b": [good[:, :2]]}, 0.5)
    with pytest.raises(TypeError, match=r"real\[1\] and fake\[1\] must have one dtype"):
        interpolate((good, good), (good, good.double()), 0.5)


def packed_critic(group_size, width):
    """As in PacGAN: the samples of a group, side by side, are one row."""
    # So many that no group loses all of them to dropout, whatever a device draws: its gradient would be zero.
    hidden = 40
    layers = [torch.nn.Linear(group_size * width, hidden), torch.nn.LeakyReLU(0.2), torch.nn.Dropout(0.5)]
    network = torch.nn.Sequential(*layers, torch.nn.Linear(hidden, 1))
    return lambda x: network(x.reshape(-1, group_size * width)), network


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 2), (6,)], ids=str)
@pytest.mark.parametrize("options", [{"eps": 0.0, "weight": 10.0}, {"reduction": "none"}], ids=str)
def test_a_group_has_one_alpha_and_one_norm(place, group_size, shape, options):
    """Under one seed as torch.rand(B // p, 1, 1) draws, compared with the code of a tabular GAN."""
    real, fake = (torch.randn(shape, dtype=torch.float64, device=place.device) for _ in range(2))
    critic, network = packed_critic(group_size, real[0].numel())
    network = network.double().to(place.device)
    weights = list(network.parameters())

    torch.manual_seed(5)
    penalty, norms = fused_gradient_penalty(
        critic, real, fake, group_size=group_size, return_norms=True, backend=place.backend, **options
    )
    grads = torch.autograd.grad(penalty.sum(), weights, materialize_grads=True)
    after = torch.rand(1, device=place.device)

    torch.manual_seed(5)
    alpha = torch.rand(6 // group_size, 1, 1, device=place.device).double()
    alpha = alpha.expand(-1, group_size, real[0].numel()).reshape(shape)
    x_hat = (alpha * fake + (1 - alpha) * real).requires_grad_()
    scores = critic(x_hat)
    (g,) = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True)
    expected_norms = (g.reshape(6 // group_size, -1).square().sum(1) + options.get("eps", 1e-12)).sqrt()
    expected = (expected_norms - 1) ** 2
    expected = expected if "reduction" in options else 10 * expected.mean()
    expected_grads = torch.autograd.grad(expected.sum(), weights, materialize_grads=True)

    assert after.equal(torch.rand(1, device=place.device))
    assert_same((penalty, norms, *grads), (expected, expected_norms, *expected_grads))


@pytest.mark.parametrize("layout", ["channels_last", "expanded batch", "sliced batch", "attached"])
def test_groups_in_any_memory_layout(place, layout):
    """The samples of a group need not be adjacent in memory."""
    base = torch.randn(8, 3, 2, 2, dtype=torch.float64, device=place.device)
    real = {
        "channels_last": lambda: base.to(memory_format=torch.channels_last),
        "expanded batch": lambda: base[:1].expand(8, 3, 2, 2),
        "sliced batch": lambda: torch.cat([base, base])[::2],
        "attached": lambda: base.clone().requires_grad_(),
    }[layout]()
    fake = torch.randn_like(real, requires_grad=layout == "attached")
    alpha = torch.rand(4, 1, 1, 1, dtype=torch.float64, device=place.device)
    results = []
    for function, extra in ours_and_reference("fused_gradient_penalty", backend=place.backend):
        weight = torch.linspace(-1, 1, 24, dtype=torch.float64, device=place.device).requires_grad_()
        penalty, norms = function(
            lambda x, weight=weight: torch.tanh(x.reshape(4, -1) @ weight),
            real, fake, alpha=alpha, group_size=2, return_norms=True, **extra,
        )  # fmt: skip
        attached = (real, fake) if layout == "attached" else ()
        results.append((penalty, norms, *torch.autograd.grad(penalty, (weight, *attached))))
    assert_same(*results)


def test_groups_of_several_tensors_in_the_whole_family(place):
    """A group has one norm over its samples and over all their tensors."""
    samples = three_tensors(place.device)
    first = torch.nn.Linear(2 * 30, 6).double().to(place.device)

    def critic(x):
        return torch.tanh(first(torch.cat([t.reshape(2, -1) for t in x], 1))).sum(1)

    def from_outputs(function, **options):
        inputs = [t.clone().requires_grad_() for t in samples]
        return function(critic(inputs), inputs, **options)

    for name in ("r1_penalty", "dragan_penalty", "input_gradient_penalty"):
        results = []
        for function, extra in ours_and_reference(name, backend=place.backend):
            torch.manual_seed(2)
            options = {"group_size": 2, "return_norms": True, **extra}
            if name == "input_gradient_penalty":
                penalty, norms = from_outputs(function, **options)
            else:
                penalty, norms = function(critic, samples, **options)
            results.append((penalty, norms, *torch.autograd.grad(penalty, first.weight)))
        assert results[0][1].shape == (2,)
        assert_same(*results)


@pytest.mark.parametrize("call", [fused_gradient_penalty, r1_penalty, dragan_penalty])
@pytest.mark.parametrize(
    ("group_size", "error", "message"),
    [
        (4, ValueError, "group_size must divide the batch, got 4 for 6 samples"),
        (12, ValueError, "group_size must divide the batch, got 12 for 6 samples"),
        (0, ValueError, "group_size must be at least 1, got 0"),
        (-2, ValueError, "group_size must be at least 1, got -2"),
        (2.0, TypeError, "group_size must be an int, got float"),
        (True, TypeError, "group_size must be an int, got bool"),
        (None, TypeError, "group_size must be an int, got NoneType"),
    ],
)
def test_wrong_group_sizes_are_refused(call, group_size, error, message):
    samples = [torch.randn(6, 2)] * (2 if call is fused_gradient_penalty else 1)
    with pytest.raises(error, match=message):
        call(lambda x: x.sum(1), *samples, group_size=group_size)


def test_alpha_and_scores_are_per_group():
    samples = torch.randn(6, 2)
    with pytest.raises(ValueError, match=r"alpha must be one number per sample or group, of shape \(3,\)"):
        fused_gradient_penalty(lambda x: x.sum(1), samples, samples, group_size=2, alpha=torch.rand(6))
    with pytest.raises(ValueError, match=r"at least one score per sample or group, got shape \(2,\) for 3 of"):
        fused_gradient_penalty(lambda x: x.sum(1)[:2], samples, samples, group_size=2)
