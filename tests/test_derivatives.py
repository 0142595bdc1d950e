"""Finite differences in fp64, and the third order, which leaves the fused kernels for differentiable torch."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fused_gp import fused_gradient_penalty, gradient_norm_penalty, interpolate, reference

FORMS = [
    {"reduction": "none"},
    {"one_sided": True, "target": 1.3},
    {"squared": True, "grad_scale": 3.0},
    {"eps": 0.2, "weight": 2.0, "reduction": "sum", "grad_scale": 0.5},
]


def doubles(*shape, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)], ids=str)
def test_penalty(place, shape, form):
    gradients = doubles(*shape, device=place.device)

    def function(g):
        return gradient_norm_penalty(g, backend=place.backend, **form)

    assert gradcheck(function, gradients)
    assert gradgradcheck(function, gradients)


def test_interpolate(place):
    inputs = (doubles(3, 2, 2, device=place.device), doubles(3, 2, 2, device=place.device))
    alpha = torch.rand(3, dtype=torch.float64, device=place.device, requires_grad=True)

    def function(real, fake, alpha):
        return interpolate(real, fake, alpha, backend=place.backend)

    assert gradcheck(function, (*inputs, alpha))
    assert gradgradcheck(function, (*inputs, alpha))
    # Alone: beside alpha's, a gradient without a graph of its own would go unnoticed.
    assert gradgradcheck(lambda real, fake: function(real, fake, alpha.detach()), inputs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_penalty_third_order(place, form):
    """The gradient of a function of the second derivatives, where a wrong fallback would be silent."""
    start = torch.randn(3, 5, dtype=torch.float64, device=place.device)
    direction = torch.randn(3, 5, dtype=torch.float64, device=place.device)
    results = []
    options = {"backend": place.backend}
    for function, extra in ((gradient_norm_penalty, options), (reference.gradient_norm_penalty, {})):
        g = start.clone().requires_grad_()
        penalty = function(g, **form, **extra)
        (first,) = torch.autograd.grad(penalty.square().sum(), g, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), g, create_graph=True)
        third = torch.autograd.grad(second.square().sum(), g)
        results.append((second, *third))
    for actual, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected)


def test_penalty_third_order_zero_row():
    """A zero row with eps = 0 stays at zero in the third order too, beside rows that are not."""
    g = doubles(3, 5)
    with torch.no_grad():
        g[1] = 0
    penalty = gradient_norm_penalty(g, eps=0.0)
    (first,) = torch.autograd.grad(penalty, g, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), g, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), g)
    assert third.isfinite().all()
    assert (third[1] == 0).all()
    assert (third[0] != 0).all()


def test_call_weight_gradients_by_finite_differences(place):
    """The whole way: d penalty / d weights of a small critic, and through an attached fake batch."""
    real = doubles(3, 4, device=place.device).detach()
    weight, fake = doubles(4, 5, device=place.device), doubles(3, 4, device=place.device)
    last = doubles(5, device=place.device)

    def function(weight, last, fake):
        def critic(x):
            return torch.nn.functional.silu(x @ weight) @ last

        return fused_gradient_penalty(critic, real, fake, alpha=0.3, backend=place.backend)

    assert gradcheck(function, (weight, last, fake))
