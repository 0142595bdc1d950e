"""Properties of both ops that hold for every input, on inputs that hypothesis generates."""

import pytest
import torch

from fused_gp import gradient_norm_penalty, interpolate

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Interpreted kernels are slow, so few examples; the fixture `place` is constant, so it need not be made anew for each.
few_examples = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def batches(draw):
    """(B, ...) fp64 gradients; a row may be zero."""
    shape = [draw(st.integers(1, 6)), *draw(st.lists(st.integers(1, 5), max_size=3))]
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    zero = draw(st.integers(-1, shape[0] - 1))
    if zero >= 0:
        tensor[zero] = 0
    return tensor * draw(st.sampled_from([1e-3, 1.0, 40.0]))


forms = st.fixed_dictionaries(
    {
        "one_sided": st.booleans(),
        "squared": st.booleans(),
        "target": st.sampled_from([0.0, 0.5, 1.0, 7.0]),
        "eps": st.sampled_from([0.0, 1e-12, 0.1]),
    }
)


def penalty_and_gradient(place, gradients, **options):
    g = gradients.to(place.device).detach().requires_grad_()
    penalty = gradient_norm_penalty(g, backend=place.backend, **options)
    (grad,) = torch.autograd.grad(penalty.sum(), g)
    return penalty.detach(), grad


@few_examples
@given(gradients=batches(), form=forms, seed=st.integers(0, 99))
def test_permuting_samples_permutes_results(place, gradients, form, seed):
    """And changes no value: rows do not depend on one another."""
    order = torch.randperm(len(gradients), generator=torch.Generator().manual_seed(seed))
    each, grad = penalty_and_gradient(place, gradients, reduction="none", **form)
    each_permuted, grad_permuted = penalty_and_gradient(place, gradients[order], reduction="none", **form)
    assert each_permuted.equal(each[order])
    assert grad_permuted.equal(grad[order])


@few_examples
@given(gradients=batches(), form=forms, factor=st.sampled_from([0.125, 0.5, 2.0, 64.0]))
def test_scaling_gradients_target_and_eps_scales_the_penalty(place, gradients, form, factor):
    """Gradients, target and sqrt(eps) times c give c^2 times the penalty and c times its gradient, exactly for a power
    of two; grad_scale=c takes the factor out again."""
    value, grad = penalty_and_gradient(place, gradients, **form)
    scaled_form = form | {"target": form["target"] * factor, "eps": form["eps"] * factor**2}
    value_scaled, grad_scaled = penalty_and_gradient(place, gradients * factor, **scaled_form)
    torch.testing.assert_close(value_scaled, value * factor**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_scaled, grad * factor, rtol=1e-12, atol=1e-300)
    value_back, grad_back = penalty_and_gradient(place, gradients * factor, grad_scale=factor, **form)
    torch.testing.assert_close(value_back, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_back * factor, grad, rtol=1e-12, atol=1e-300)


@few_examples
@given(gradients=batches(), form=forms, cut=st.integers(0, 6))
def test_the_sum_over_a_batch_is_the_sum_over_its_parts(place, gradients, form, cut):
    """And the mean is the sum divided by B."""
    cut = min(cut, len(gradients))
    parts = [part for part in (gradients[:cut], gradients[cut:]) if len(part)]
    whole, grad = penalty_and_gradient(place, gradients, reduction="sum", **form)
    pieces = [penalty_and_gradient(place, part, reduction="sum", **form) for part in parts]
    torch.testing.assert_close(sum(value for value, _ in pieces), whole, rtol=1e-12, atol=1e-300)
    assert torch.cat([grad for _, grad in pieces]).equal(grad)
    mean, _ = penalty_and_gradient(place, gradients, **form)
    torch.testing.assert_close(mean * len(gradients), whole, rtol=1e-12, atol=1e-300)


@few_examples
@given(gradients=batches(), form=forms, weight=st.sampled_from([0.0, 0.5, 10.0, -2.0]))
def test_weight_scales_value_and_gradient(place, gradients, form, weight):
    value, grad = penalty_and_gradient(place, gradients, **form)
    value_weighted, grad_weighted = penalty_and_gradient(place, gradients, weight=weight, **form)
    torch.testing.assert_close(value_weighted, value * weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_weighted, grad * weight, rtol=1e-12, atol=1e-300)


@few_examples
@given(real=batches(), seed=st.integers(0, 99))
def test_interpolation_lies_between_and_is_symmetric(place, real, seed):
    """Every element lies between its ends, and swapping them is 1 - alpha."""
    draw = torch.Generator().manual_seed(seed)
    fake = torch.randn(real.shape, dtype=torch.float64, generator=draw).to(place.device)
    alpha = torch.rand(len(real), dtype=torch.float64, generator=draw).to(place.device)
    real = real.to(place.device)
    x_hat = interpolate(real, fake, alpha, backend=place.backend)
    slack = 1e-14 * (real.abs() + fake.abs())
    assert (x_hat >= torch.minimum(real, fake) - slack).all()
    assert (x_hat <= torch.maximum(real, fake) + slack).all()
    torch.testing.assert_close(interpolate(fake, real, 1 - alpha, backend=place.backend), x_hat)
