"""Samples made of several tensors, and groups of samples: one alpha and one norm for what belongs together."""

import inspect
import itertools
from collections import OrderedDict, namedtuple

import pytest
import torch

from fused_gp import (
    dragan_penalty,
    fused_gradient_penalty,
    gradient_norm_penalty,
    input_gradient_penalty,
    interpolate,
    r1_penalty,
    reference,
)
from tests.support.tolerances import assert_near
from tests.support.tolerances import table_row as row

Graph = namedtuple("Graph", ["nodes", "edges"])

# Nested as people have them. Leaves: a narrow one, a matrix, an image.
STRUCTURES = {
    "tuple": lambda a, b, c: (a, b, c),
    "list": lambda a, b, c: [a, b, c],
    "dict": lambda a, b, c: {"image": c, "label": a, "matrix": b},
    "namedtuple": lambda a, b, c: Graph(a, (b, c)),
    "nested": lambda a, b, c: {"graph": (a, [b]), "image": OrderedDict(pixels=c)},
    "one": lambda a, b, c: [c],
}


def leaves(device, dtype=torch.float64, batch=4):
    shapes = ((batch,), (batch, 5), (batch, 3, 2, 4))
    a, b, c = (torch.randn(shape, dtype=torch.float64, device=device).to(dtype) for shape in shapes)
    return a, b, c.to(memory_format=torch.channels_last)


def flat(tree):
    return torch.utils._pytree.tree_leaves(tree)


class Critic(torch.nn.Module):
    """Looks at all tensors it is given, whatever their structure, and mixes them."""

    def __init__(self, samples, features=6):
        super().__init__()
        widths = [t[0].numel() for t in flat(samples)]
        self.first = torch.nn.ModuleList(torch.nn.Linear(width, features) for width in widths)
        self.last = torch.nn.Linear(features, 1)

    def forward(self, samples):
        pairs = zip(self.first, flat(samples), strict=True)
        hidden = sum(layer(t.flatten(1) if t.ndim > 1 else t[:, None]) for layer, t in pairs)
        return self.last(torch.tanh(hidden))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "options",
    [{}, {"one_sided": True, "target": 0.1}, {"target": 0.0, "reduction": "sum"}, {"eps": 0.0, "grad_scale": 16.0}],
    ids=str,
)
def test_one_alpha_and_one_norm_over_all(place, structure, options):
    """Value, norms and weight gradients against the oracle; the critic gets the structure that came."""
    make = STRUCTURES[structure]
    real, fake = (make(*leaves(place.device)) for _ in range(2))
    critic = Critic(real).double().to(place.device)
    seen = []

    def watched(samples):
        seen.append(type(samples))
        return critic(samples)

    results = []
    for function, extra in (
        (fused_gradient_penalty, {"backend": place.backend}),
        (reference.fused_gradient_penalty, {}),
    ):
        torch.manual_seed(3)
        penalty, norms = function(watched, real, fake, return_norms=True, **options, **extra)
        weights = torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True)
        results.append((penalty, norms, *weights, torch.rand(1)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert seen == [type(real)] * 2


def test_dicts_are_matched_by_their_keys(place):
    a, b, _ = leaves(place.device)
    real, fake = {"a": a, "b": b}, {"b": b + 1, "a": a - 1}
    x_hat = interpolate(real, fake, 0.25, backend=place.backend)
    assert list(x_hat) == ["a", "b"]
    torch.testing.assert_close(x_hat["a"], a - 0.25)
    torch.testing.assert_close(x_hat["b"], b + 0.25)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float64)], ids=str)
@pytest.mark.parametrize("form", [{}, {"squared": True}, {"one_sided": True, "reduction": "none"}], ids=str)
def test_joint_norm_of_mixed_types_and_long_rows(place, dtypes, form):
    """Sums in the wider accumulation type, gradients back in each tensor's own; rows split over programs."""
    narrow = (torch.randn(3, 4, device=place.device) * 2).to(dtypes[0])
    long = (torch.randn(3, 9001, device=place.device) / 30).to(dtypes[1])
    results = []
    for function, cast, extra in (
        (gradient_norm_penalty, lambda t: t, {"backend": place.backend}),
        (reference.gradient_norm_penalty, torch.Tensor.double, {}),
    ):
        gradients = [cast(t).detach().requires_grad_() for t in (narrow, long, narrow * 0.5)]
        penalty, norms = function(gradients, return_norms=True, **form, **extra)
        first = torch.autograd.grad(penalty.sum(), gradients, create_graph=True)
        second = torch.autograd.grad(sum(f.double().sum() for f in first), gradients)
        results.append((penalty, norms, first, second))
    (penalty, norms, first, second), (penalty_, norms_, first_, second_) = results
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    assert penalty.dtype == norms.dtype == wide
    # The inputs of a mixed sum are rounded to the narrower type, not the sum.
    assert_near(penalty, penalty_, torch.float32, 0)
    assert_near(norms, norms_, torch.float32, 0)
    for order, actual, expected in ((1, first, first_), (2, second, second_)):
        for one, truth, dtype in zip(actual, expected, (*dtypes, dtypes[0]), strict=True):
            assert one.dtype == dtype
            assert_near(one, truth, row(place, dtype), order)


def test_several_tensors_are_one_norm_in_every_order(place):
    """Cut into pieces, a gradient has the penalty and the derivatives of the whole, the third order too."""
    whole = torch.randn(4, 12, dtype=torch.float64, device=place.device)
    whole[2] = 0
    results = []
    for pieces in ([12], [1, 4, 7]):
        gradients = [piece.clone().requires_grad_() for piece in whole.split(pieces, 1)]
        penalty = gradient_norm_penalty(gradients, eps=0.0, grad_scale=2.0, backend=place.backend)
        first = torch.autograd.grad(penalty.square(), gradients, create_graph=True)
        second = torch.autograd.grad(sum(f.square().sum() for f in first), gradients, create_graph=True)
        third = torch.autograd.grad(sum(s.square().sum() for s in second), gradients)
        results.append((penalty, *(torch.cat(order, 1) for order in (first, second, third))))
    for one, several in zip(*results, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(several, one, rtol=1e-10, atol=1e-12)


def test_several_tensors_end_in_one_root(monkeypatch):
    """In the kernels, every tensor but the last stores its sums; one launch per tensor and order, and no other."""
    kernels = pytest.importorskip("fused_gp.kernels.norm_penalty", reason="Triton is not installed")
    launches = []
    launch = kernels.launch

    def counting(kernel, programs, *arguments):
        named = dict(zip(inspect.signature(kernel.fn).parameters, itertools.chain(*arguments), strict=True))
        launches.append((kernel.fn.__name__, named.get("LAST")))
        return launch(kernel, programs, *arguments)

    monkeypatch.setattr(kernels, "launch", counting)
    gradients = [torch.randn(3, width, requires_grad=True) for width in (2, 5, 3)]
    penalty = gradient_norm_penalty(gradients, backend="triton")
    assert launches == [("reduce_rows_kernel", last) for last in (False, False, True)]
    launches.clear()
    first = torch.autograd.grad(penalty, gradients, create_graph=True)
    assert launches == [("scale_rows_kernel", None)] * 3
    launches.clear()
    torch.autograd.grad(first, gradients, [torch.ones_like(f) for f in first])
    assert [name for name, _ in launches] == ["reduce_rows_kernel"] * 3 + ["scale_rows_kernel"] * 3


def test_an_input_that_the_critic_ignores(place):
    """counts as gradient zero: the norm is that of the others; ignoring all of them is an error."""
    a, b, c = leaves(place.device)

    def critic(samples):
        return samples[1].square().sum(1)

    penalty, norms = fused_gradient_penalty(
        critic, (a, b, c), (a, b, c), return_norms=True, eps=0.0, backend=place.backend
    )
    torch.testing.assert_close(norms, 2 * b.norm(dim=1))
    torch.testing.assert_close(penalty, ((2 * b.norm(dim=1) - 1) ** 2).mean())
    with pytest.raises(ValueError, match="scores that depend on the samples it is given"):
        fused_gradient_penalty(lambda samples: torch.ones(4, device=a.device), (a, b), (a, b), backend=place.backend)


def test_alpha_and_fake_attached_over_several_tensors(place):
    """Their gradients add up over the tensors, as autograd has it."""
    real, fake = leaves(place.device), [t.requires_grad_() for t in leaves(place.device)]
    alpha = torch.rand(4, dtype=torch.float64, device=place.device, requires_grad=True)
    critic = Critic(real).double().to(place.device)
    results = []
    for function, extra in (
        (fused_gradient_penalty, {"backend": place.backend}),
        (reference.fused_gradient_penalty, {}),
    ):
        penalty = function(critic, real, tuple(fake), alpha=alpha, **extra)
        results.append(torch.autograd.grad(penalty, [alpha, *fake]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_structures_without_gradients(place, mode):
    real, fake = (STRUCTURES["nested"](*leaves(place.device)) for _ in range(2))
    critic = Critic(real).double().to(place.device)
    wanted = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
    with mode():
        penalty = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
    assert not penalty.requires_grad
    torch.testing.assert_close(penalty, wanted.detach())


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
def test_structures_that_differ(real, fake, message):
    real, fake = (torch.utils._pytree.tree_map(lambda _: torch.randn(2, 3), tree) for tree in (real, fake))
    with pytest.raises(ValueError, match="real and fake must have one structure, " + message):
        fused_gradient_penalty(lambda x: x, real, fake)


def test_the_leaf_that_differs_is_named():
    good = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"real\['b'\]\[0\] and fake\['b'\]\[0\] must have one shape, got"):
        interpolate({"a": good, "b": [good]}, {"a": good, "b": [good[:, :2]]}, 0.5)
    with pytest.raises(TypeError, match=r"real\[1\] and fake\[1\] must have one dtype"):
        interpolate((good, good), (good, good.double()), 0.5)


# Groups


def packed_critic(group_size, width):
    """As PacGAN's: the group's samples side by side are one row."""
    layers = [torch.nn.Linear(group_size * width, 8), torch.nn.LeakyReLU(0.2), torch.nn.Dropout(0.5)]
    network = torch.nn.Sequential(*layers, torch.nn.Linear(8, 1))
    return lambda x: network(x.reshape(-1, group_size * width)), network


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 2), (6,)], ids=str)
@pytest.mark.parametrize("options", [{"eps": 0.0, "weight": 10.0}, {"reduction": "none"}], ids=str)
def test_one_alpha_and_one_norm_per_group(place, group_size, shape, options):
    """Draw for draw as torch.rand(B // p, 1, 1), against the lines of a tabular GAN."""
    real, fake = (torch.randn(shape, dtype=torch.float64, device=place.device) for _ in range(2))
    critic, network = packed_critic(group_size, real[0].numel())
    network = network.double().to(place.device)
    weights = list(network.parameters())

    torch.manual_seed(5)
    penalty, norms = fused_gradient_penalty(
        critic, real, fake, group_size=group_size, return_norms=True, backend=place.backend, **options
    )
    grads = torch.autograd.grad(penalty.sum(), weights, materialize_grads=True)
    after = torch.rand(1)

    torch.manual_seed(5)
    alpha = torch.rand(6 // group_size, 1, 1, device=place.device).double()
    alpha = alpha.expand(-1, group_size, real[0].numel()).reshape(shape)
    x_hat = (alpha * fake + (1 - alpha) * real).requires_grad_()
    scores = critic(x_hat)
    (g,) = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True)
    wanted_norms = (g.reshape(6 // group_size, -1).square().sum(1) + options.get("eps", 1e-12)).sqrt()
    wanted = (wanted_norms - 1) ** 2
    wanted = wanted if "reduction" in options else 10 * wanted.mean()
    wanted_grads = torch.autograd.grad(wanted.sum(), weights, materialize_grads=True)

    assert after.equal(torch.rand(1))
    for actual, expected in zip((penalty, norms, *grads), (wanted, wanted_norms, *wanted_grads), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["channels_last", "expanded batch", "sliced batch", "attached"])
def test_groups_in_any_memory_layout(place, layout):
    """A group's samples need not lie side by side."""
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
    for function, extra in (
        (fused_gradient_penalty, {"backend": place.backend}),
        (reference.fused_gradient_penalty, {}),
    ):
        weight = torch.linspace(-1, 1, 24, dtype=torch.float64, device=place.device).requires_grad_()
        penalty, norms = function(
            lambda x, weight=weight: torch.tanh(x.reshape(4, -1) @ weight),
            real, fake, alpha=alpha, group_size=2, return_norms=True, **extra,
        )  # fmt: skip
        attached = (real, fake) if layout == "attached" else ()
        results.append((penalty, norms, *torch.autograd.grad(penalty, (weight, *attached))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_groups_of_several_tensors_in_the_whole_family(place):
    """A group has one norm over its members and over all their tensors."""
    samples = leaves(place.device)
    first = torch.nn.Linear(2 * 30, 6).double().to(place.device)

    def critic(x):
        return torch.tanh(first(torch.cat([t.reshape(2, -1) for t in x], 1))).sum(1)

    def from_outputs(function, **options):
        inputs = [t.clone().requires_grad_() for t in samples]
        return function(critic(inputs), inputs, **options)

    for ours in (r1_penalty, dragan_penalty, input_gradient_penalty):
        results = []
        for function, extra in ((ours, {"backend": place.backend}), (getattr(reference, ours.__name__), {})):
            torch.manual_seed(2)
            options = {"group_size": 2, "return_norms": True, **extra}
            if ours is input_gradient_penalty:
                penalty, norms = from_outputs(function, **options)
            else:
                penalty, norms = function(critic, samples, **options)
            results.append((penalty, norms, *torch.autograd.grad(penalty, first.weight)))
        assert results[0][1].shape == (2,)
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


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
def test_group_size(call, group_size, error, message):
    samples = [torch.randn(6, 2)] * (2 if call is fused_gradient_penalty else 1)
    with pytest.raises(error, match=message):
        call(lambda x: x.sum(1), *samples, group_size=group_size)


def test_alpha_and_scores_per_group():
    samples = torch.randn(6, 2)
    with pytest.raises(ValueError, match=r"alpha must be one number per sample or group, of shape \(3,\)"):
        fused_gradient_penalty(lambda x: x.sum(1), samples, samples, group_size=2, alpha=torch.rand(6))
    with pytest.raises(ValueError, match=r"at least one score per sample or group, got shape \(2,\) for 3 of"):
        fused_gradient_penalty(lambda x: x.sum(1)[:2], samples, samples, group_size=2)
