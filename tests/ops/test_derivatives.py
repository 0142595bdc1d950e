"""Both ops against finite differences in fp64, and the third order, which plain torch computes, not the kernels."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fused_gp import gradient_norm_penalty, interpolate
from tests.support.family import ours_and_reference

FORMS = [
    {"reduction": "none"},
    {"one_sided": True, "target": 1.3},
    {"squared": True, "grad_scale": 3.0},
    {"eps": 0.2, "weight": 2.0, "reduction": "sum", "grad_scale": 0.5},
]


def fp64_leaf(*shape, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)], ids=str)
def test_penalty_by_finite_differences(place, shape, form):
    gradients = fp64_leaf(*shape, device=place.device)

    def function(g):
        return gradient_norm_penalty(g, backend=place.backend, **form)

    assert gradcheck(function, gradients)
    assert gradgradcheck(function, gradients)


def test_interpolation_by_finite_differences(place):
    inputs = (fp64_leaf(3, 2, 2, device=place.device), fp64_leaf(3, 2, 2, device=place.device))
    alpha = torch.rand(3, dtype=torch.float64, device=place.device, requires_grad=True)

    def function(real, fake, alpha):
        return interpolate(real, fake, alpha, backend=place.backend)

    assert gradcheck(function, (*inputs, alpha))
    assert gradgradcheck(function, (*inputs, alpha))
    # Without alpha's gradient, whose graph would hide that another gradient has none.
    assert gradgradcheck(lambda real, fake: function(real, fake, alpha.detach()), inputs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_third_order_of_the_penalty(place, form):
    """The gradient of a function of the second derivatives, where a wrong fallback would raise no error."""
    start = torch.randn(3, 5, dtype=torch.float64, device=place.device)
    direction = torch.randn(3, 5, dtype=torch.float64, device=place.device)
    results = []
    for function, options in ours_and_reference("gradient_norm_penalty", backend=place.backend):
        g = start.clone().requires_grad_()
        penalty = function(g, **form, **options)
        (first,) = torch.autograd.grad(penalty.square().sum(), g, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), g, create_graph=True)
        third = torch.autograd.grad(second.square().sum(), g)
        results.append((second, *third))
    for actual, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected)


def test_third_order_at_a_zero_row_is_zero():
    """With eps = 0, and beside rows whose third derivative is not zero."""
    g = fp64_leaf(3, 5)
    with torch.no_grad():
        g[1] = 0
    penalty = gradient_norm_penalty(g, eps=0.0)
    (first,) = torch.autograd.grad(penalty, g, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), g, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), g)
    assert third.isfinite().all()
    assert (third[1] == 0).all()
    assert (third[0] != 0).all()
