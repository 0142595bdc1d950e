"""Values and derivatives of the two ops in every order, compared with the fp64 reference."""

import torch

from fused_gp import gradient_norm_penalty, interpolate, reference
from tests.support.tolerances import assert_near, table_row

# One element, odd, prime, several rows in a tile, rows longer than a tile, rows split over programs.
SHAPES = [(1,), (5,), (1, 1), (3, 1), (4, 7), (37, 17), (2, 3, 5), (2, 3, 4, 5), (2, 2, 3, 2, 3), (3, 2053), (2, 9001)]


def gradients_like(shape, dtype, device, grad_scale=1.0):
    """Norms between 0.3 and 4: on both sides of the target, and no result is a difference of nearly equal numbers."""
    rows = torch.randn(shape[0], max(1, torch.Size(shape[1:]).numel()), dtype=torch.float64)
    norms = torch.tensor([0.3, 4.0, 2.0, 0.6], dtype=torch.float64).repeat(shape[0])[: shape[0], None]
    rows = rows / rows.norm(dim=1, keepdim=True) * norms * grad_scale
    return rows.reshape(shape).to(device, dtype)


def penalty_to_second_order(function, gradients, **options):
    """Value, norms, gradient, and the gradients of a random projection of it, for a random upstream factor."""
    gradients = gradients.detach().requires_grad_()
    draw = torch.Generator().manual_seed(1)
    penalty, norms = function(gradients, return_norms=True, **options)
    upstream = torch.rand(penalty.shape, generator=draw) + 0.5
    upstream = upstream.to(penalty.device, penalty.dtype).requires_grad_()
    (first,) = torch.autograd.grad(penalty, gradients, upstream, create_graph=True)
    cotangent = torch.randn(gradients.shape, generator=draw).bfloat16().to(first.device, first.dtype)
    second = torch.autograd.grad(first, (gradients, upstream), cotangent)
    # The gradient of the upstream factor, <first, cotangent> / upstream, is a sum over rows whose terms cancel.
    terms = (first.detach().double().norm() * cotangent.double().norm() / upstream.double().norm()).item()
    return [(penalty, 0, 0.0), (norms, 0, 0.0), (first, 1, 0.0), (second[0], 2, 0.0), (second[1], 0, terms)]


def assert_same_to_second_order(options, gradients, place):
    ours = penalty_to_second_order(gradient_norm_penalty, gradients, backend=place.backend, **options)
    expected_results = penalty_to_second_order(reference.gradient_norm_penalty, gradients.double(), **options)
    for (actual, order, _), (expected, _, scale) in zip(ours, expected_results, strict=True):
        assert_near(actual, expected, table_row(place, gradients.dtype), order, scale)


def assert_interpolation_to_second_order(place, shape, dtype):
    """Value, the three first derivatives, and the derivatives of those. The numbers are the same on every device."""
    real, fake = (torch.randn(shape).to(place.device, dtype).requires_grad_() for _ in range(2))
    alpha = torch.rand(shape[0]).to(place.device, torch.promote_types(dtype, torch.float32)).requires_grad_()
    cotangent = torch.randn(shape).to(place.device, dtype)
    second_cotangents = [torch.randn(shape).to(place.device, dtype) for _ in range(2)]
    second_cotangents.append(torch.randn(shape[0]).to(place.device, torch.bfloat16))

    def orders(function, cast, **options):
        real_, fake_, alpha_, cotangent_ = (cast(t).detach().requires_grad_() for t in (real, fake, alpha, cotangent))
        x_hat = function(real_, fake_, alpha_, **options)
        inputs = (real_, fake_, alpha_, cotangent_)
        first = torch.autograd.grad(x_hat, inputs[:3], cotangent_, create_graph=True)
        # One by one: autograd adds the gradients of several outputs in the input type, with a rounding each time.
        second = [
            torch.autograd.grad(f, inputs, t.to(f.dtype), retain_graph=True, materialize_grads=True)
            for f, t in zip(first, second_cotangents, strict=True)
        ]
        return x_hat, first, sum(second, ())

    x_hat, first, second = orders(interpolate, lambda t: t, backend=place.backend)
    x_hat_, first_, second_ = orders(reference.interpolate, torch.Tensor.double)
    assert x_hat.dtype == dtype
    assert_near(x_hat, x_hat_, table_row(place, dtype), 1)
    for actual, expected in zip(first, first_, strict=True):
        assert_near(actual, expected, table_row(place, dtype), 1)
    for actual, expected in zip(second, second_, strict=True):
        assert_near(actual, expected, table_row(place, dtype), 2)
