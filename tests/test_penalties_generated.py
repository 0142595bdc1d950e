"""Generated calls: the reference's result, or an error that names the argument; and no argument is changed.

Whether a call must succeed is decided before it, by the rules in tests/support/generated_calls.py.
"""

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import fused_gp
from fused_gp import fused_gradient_penalty, r1_penalty, reference
from tests.support.critics import unused_critic
from tests.support.places import to_device
from tests.support.tolerances import TOLERANCE, assert_near, table_row

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, given, settings

from tests.support.generated_calls import (
    alpha_fits,
    batch_size_of,
    batches_fit,
    calls,
    form_fits,
    groups_fit,
    pairs_fit,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, under the interpreter with infinities
]


def run_on_generated_calls(place, strategy, check):
    """Run `check` on many calls, on fewer where kernels are interpreted."""
    examples = 150 if place.backend == "torch" else 30
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=quiet)
    @given(case=strategy)
    def run(case):
        check(case)

    run()


def state_of_tensors(things):
    """All that a caller can read of the tensors: bits, strides, version, requires_grad, .grad."""
    return [
        (t, t._version, t.requires_grad, t.stride(), t.detach().clone(), t.grad)
        for t in tree_leaves(things)
        if isinstance(t, torch.Tensor)
    ]


def assert_unchanged(before):
    for tensor, version, requires_grad, stride, copy, grad in before:
        assert tensor._version == version
        assert tensor.requires_grad == requires_grad
        assert tensor.stride() == stride
        assert tensor.grad is grad is None
        assert tensor.dtype == copy.dtype
        one, two = (torch.cat([t.detach().resolve_neg().reshape(-1)]).view(torch.uint8) for t in (tensor, copy))
        assert one.equal(two)


ARGUMENT_NAMES = (
    r"\b(real|fake|alpha|target|one_sided|eps|weight|reduction|group_size|grad_scale|gradients|noise_scale)\b"
)


def result_or_refusal(must_succeed, inputs, call):
    """The result of the call, or None where it had to be refused, and was."""
    before = state_of_tensors(inputs)
    if must_succeed:
        result = call()
    else:
        result = None
        with pytest.raises((ValueError, TypeError), match=ARGUMENT_NAMES) as caught:
            call()
        assert type(caught.value) in (ValueError, TypeError)
    assert_unchanged(before)
    return result


class Quadratic:
    """D(x) = sum of w x^2 / 2 + w x over all tensors, computed in fp64, so that its gradient w (x + 1) is rounded
    once."""

    def __init__(self, samples, seed, *, group_size=1, magnitude=False):
        draw = torch.Generator().manual_seed(seed)
        leaves = tree_leaves(samples)
        self.group_size = group_size
        self.weights = []
        for x in leaves:
            weight = torch.randn(x.shape[1:], dtype=torch.float64, generator=draw).to(x.device)
            self.weights.append((weight.abs() if magnitude else weight).requires_grad_())

    def __call__(self, samples):
        scores = 0
        for weight, x in zip(self.weights, tree_leaves(samples), strict=True):
            x = x.double()
            scores = scores + (weight * (x.square() / 2 + x)).flatten(1).sum(1) if x.ndim > 1 else (
                scores + weight * (x.square() / 2 + x)
            )  # fmt: skip
        return scores.view(-1, self.group_size).sum(1)


def cast_samples(samples, cast, requires_grad=True):
    """The samples after `cast`, as leaves with or without requires_grad, in the same layout."""
    return tree_map(lambda t: cast(t).detach().requires_grad_(requires_grad), samples)


def coarsest_row(place, samples):
    rows = [table_row(place, t.dtype) for t in tree_leaves(samples)]
    return max(rows, key=lambda row: TOLERANCE[row][1])


def magnitudes(expected_results, bound):
    """How large the terms of each result are: the result may be a small difference of them."""
    pairs = zip(expected_results, bound, strict=True)
    return [max((t[t.isfinite()].abs().max().item() for t in pair if t.isfinite().any()), default=0) for pair in pairs]


def assert_same_as_the_reference(place, name, samples, options, seed, *, reference_function=None, roundings=3, **extra):
    """`name` on these samples (one batch or two), with gradients, compared with fp64.

    The points, the gradients there and the gradients of those are rounded to the dtype, so each result may have the
    error of a few such roundings of its terms. The size of the terms is the reference's result where nothing cancels:
    all positive, the target negative. Another `reference_function` has no gradient for the samples.
    """
    options_on_device = to_device(options, place.device)
    # In a critic's step the samples require no grad.
    differentiable_samples = reference_function is None and seed % 3 > 0

    def run(module, inputs, magnitude=False, **more):
        critic = Quadratic(inputs[0], seed, group_size=options["group_size"], magnitude=magnitude)
        torch.manual_seed(seed)
        merged = options_on_device | extra | more
        function = reference_function if reference_function and module is reference else getattr(module, name)
        penalty, norms = function(critic, *inputs, return_norms=True, **merged)
        leaves = [*critic.weights, *(tree_leaves(inputs) if differentiable_samples else [])]
        return [penalty.detach(), norms, *torch.autograd.grad(penalty.sum(), leaves, materialize_grads=True)]

    inputs = cast_samples(samples, lambda t: t, differentiable_samples)
    ours = result_or_refusal(True, (inputs, options, extra), lambda: run(fused_gp, inputs, backend=place.backend))
    expected_results = run(reference, cast_samples(samples, torch.Tensor.double, differentiable_samples))
    sign = {"target": -options["target"], "one_sided": False} if "target" in options else {}
    bound = run(
        reference, cast_samples(samples, lambda t: t.double().abs(), differentiable_samples), magnitude=True, **sign
    )
    row = coarsest_row(place, samples)
    expected_dtype = torch.float64 if any(t.dtype == torch.float64 for t in tree_leaves(samples)) else torch.float32
    assert ours[0].dtype == ours[1].dtype == expected_dtype
    for actual, expected, scale in zip(ours, expected_results, magnitudes(expected_results, bound), strict=True):
        assert_near(actual, expected, row, 1, roundings * scale)


def test_generated_calls_of_interpolate(place):
    def check(case):
        real, fake, alpha, _, _ = case
        fits = pairs_fit(real, fake) and alpha_fits(alpha, batch_size_of(real))
        on_device = [to_device(thing, place.device) for thing in (real, fake, alpha)]
        result = result_or_refusal(fits, on_device, lambda: fused_gp.interpolate(*on_device, backend=place.backend))
        if not fits:
            return
        expected_results = reference.interpolate(
            *tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) else t, on_device)
        )
        assert tree_flatten(result)[1] == tree_flatten(real)[1]
        for actual, expected, x in zip(*map(tree_leaves, (result, expected_results, real)), strict=True):
            assert actual.dtype == x.dtype
            assert_near(actual, expected, table_row(place, x.dtype), 1)

    run_on_generated_calls(place, calls(random_alpha=False, groups=False), check)


def test_generated_calls_of_fused_gradient_penalty(place):
    def check(case):
        real, fake, alpha, options, seed = case
        real, fake, alpha = (to_device(thing, place.device) for thing in (real, fake, alpha))
        batch, size = batch_size_of(real), options["group_size"]
        fits = pairs_fit(real, fake) and form_fits(options) and groups_fit(size, batch)
        fits = fits and alpha_fits(alpha, batch // size)
        if fits:
            assert_same_as_the_reference(place, "fused_gradient_penalty", (real, fake), options, seed, alpha=alpha)
            return
        result_or_refusal(
            False,
            (real, fake, alpha, options),
            lambda: fused_gradient_penalty(unused_critic, real, fake, alpha=alpha, backend=place.backend, **options),
        )

    run_on_generated_calls(place, calls(), check)


def test_generated_calls_of_r1_penalty(place):
    def check(case):
        real, _, _, options, seed = case
        real = to_device(real, place.device)
        options = {name: options[name] for name in ("weight", "reduction", "group_size", "grad_scale")}
        rest = {"target": 0.0, "eps": 0.0, "one_sided": False}
        fits = (
            batches_fit(real) and form_fits(options | rest) and groups_fit(options["group_size"], batch_size_of(real))
        )
        if fits:
            assert_same_as_the_reference(place, "r1_penalty", (real,), options, seed)
            return
        result_or_refusal(
            False, (real, options), lambda: r1_penalty(unused_critic, real, backend=place.backend, **options)
        )

    run_on_generated_calls(place, calls(), check)


def test_generated_calls_of_dragan_penalty(place):
    def check(case):
        real, _, alpha, options, seed = case
        real, alpha = to_device(real, place.device), to_device(alpha, place.device)
        batch, size = batch_size_of(real), options["group_size"]
        fits = batches_fit(real) and form_fits(options) and groups_fit(size, batch)
        fits = fits and alpha_fits(alpha, batch // size) and all(t.numel() >= 2 for t in tree_leaves(real))
        if not fits:
            result_or_refusal(
                False,
                (real, alpha, options),
                lambda: fused_gp.dragan_penalty(unused_critic, real, alpha=alpha, backend=place.backend, **options),
            )
            return
        more = {"alpha": alpha}
        if any(t.dtype != torch.float64 for t in tree_leaves(real)):
            more |= {"reference_function": reference_with_noise_like(real), "roundings": 8}
        assert_same_as_the_reference(place, "dragan_penalty", (real,), options, seed, **more)

    run_on_generated_calls(place, calls(), check)


def reference_with_noise_like(samples):
    """DRAGAN in fp64, with noise drawn in the dtype of the samples, since noise of another dtype is other noise."""

    def noisy(x, sample):
        return x + 0.5 * x.std().detach() * torch.empty_like(sample).uniform_().double()

    def reference_function(critic, real, **options):
        return reference.fused_gradient_penalty(critic, real, tree_map(noisy, real, samples), **options)

    return reference_function


def test_generated_calls_of_gradient_norm_penalty(place):
    """Infinities and NaN are the reference's in value and norms, and derivatives are finite at the same places."""

    def check(case):
        gradients, _, _, options, _ = case
        gradients = to_device(gradients, place.device)
        options = {name: value for name, value in to_device(options, place.device).items() if name != "group_size"}
        fits = batches_fit(gradients) and form_fits(options)

        def run(module, cast, absolute=False, **more):
            g = cast_samples(gradients, lambda t: cast(t).abs() if absolute else cast(t))
            penalty, norms = module.gradient_norm_penalty(g, return_norms=True, **(options | more))
            return [penalty.detach(), norms, *torch.autograd.grad(penalty.sum(), tree_leaves(g))]

        if not fits:
            call = fused_gp.gradient_norm_penalty
            result_or_refusal(False, (gradients, options), lambda: call(gradients, backend=place.backend, **options))
            return
        ours = result_or_refusal(True, (gradients, options), lambda: run(fused_gp, lambda t: t, backend=place.backend))
        expected_results = run(reference, torch.Tensor.double)
        bound = run(reference, torch.Tensor.double, absolute=True, target=-options["target"], one_sided=False)
        sizes = magnitudes(expected_results, bound)
        rows = [max((table_row(place, t.dtype) for t in tree_leaves(gradients)), key=lambda r: TOLERANCE[r][0])] * 2
        rows += [table_row(place, t.dtype) for t in tree_leaves(gradients)]
        orders = [0, 0] + [1] * len(sizes[2:])
        for actual, expected, row, order, size in zip(ours, expected_results, rows, orders, sizes, strict=True):
            assert_near(actual, expected, row, order, size)
        for actual, expected in zip(ours[:2], expected_results[:2], strict=True):
            assert actual.isnan().equal(expected.isnan())
            assert actual.isinf().equal(expected.isinf())

    run_on_generated_calls(place, calls(random_alpha=False, groups=False), check)
