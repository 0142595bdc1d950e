"""interpolate compared with the fp64 reference, in every order; alpha in all its forms."""

import pytest
import torch

from fused_gp import gradient_norm_penalty, interpolate, reference
from tests.support.orders import SHAPES, assert_interpolation_to_second_order
from tests.support.tolerances import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpolation_to_second_order(place, shape, dtype):
    assert_interpolation_to_second_order(place, shape, dtype)


@pytest.mark.parametrize(("real_needed", "fake_needed"), [(True, False), (False, True)])
def test_one_batch_alone_may_require_grad(place, real_needed, fake_needed):
    """A fake batch attached to its generator is the usual case; the other batch then gets no gradient."""
    real, fake = (torch.randn(3, 5, dtype=torch.float64, device=place.device) for _ in range(2))
    real.requires_grad_(real_needed)
    fake.requires_grad_(fake_needed)
    alpha = torch.rand(3, dtype=torch.float64, device=place.device)
    cotangent = torch.randn(3, 5, dtype=torch.float64, device=place.device, requires_grad=True)
    attached = real if real_needed else fake
    for function, options in ((interpolate, {"backend": place.backend}), (reference.interpolate, {})):
        x_hat = function(real, fake, alpha, **options)
        (grad,) = torch.autograd.grad(x_hat, attached, cotangent, create_graph=True)
        factor = (1 - alpha if real_needed else alpha)[:, None]
        torch.testing.assert_close(grad, factor * cotangent)
        (back,) = torch.autograd.grad(grad, cotangent, torch.ones_like(grad))
        torch.testing.assert_close(back, factor.expand_as(back))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpolation_is_exact_at_both_ends(place, dtype):
    """The bits of real at alpha = 0 and of fake at alpha = 1."""
    real, fake = (torch.randn(4, 3, 5, device=place.device).to(dtype) for _ in range(2))
    alpha = torch.tensor([0.0, 1.0, 0.0, 1.0], device=place.device)
    x_hat = interpolate(real, fake, alpha, backend=place.backend)
    ends = torch.stack([real[0], fake[1], real[2], fake[3]])
    assert x_hat.equal(ends)
    assert interpolate(real, fake, 0.0, backend=place.backend).equal(real)
    assert interpolate(real, fake, 1, backend=place.backend).equal(fake)


def test_alpha_per_sample_or_one_for_all(place):
    real, fake = (torch.randn(4, 3, 5).to(place.device) for _ in range(2))
    alpha = torch.rand(4).to(place.device)
    expected = interpolate(real, fake, alpha, backend=place.backend)
    for same in (alpha.view(4, 1, 1), alpha.double(), torch.stack([alpha, alpha], 1)[:, 0]):
        torch.testing.assert_close(interpolate(real, fake, same, backend=place.backend), expected)
    one = torch.tensor(0.25, device=place.device, requires_grad=True)
    x_hat = interpolate(real, fake, one, backend=place.backend)
    torch.testing.assert_close(x_hat, torch.lerp(real, fake, 0.25))
    (grad,) = torch.autograd.grad(x_hat.sum(), one)
    torch.testing.assert_close(grad, (fake - real).sum())


def test_pending_negations_are_resolved(place):
    """Gradients of complex critics may be negated lazily, by a flag on the tensor; kernels read memory, which is not
    negated."""
    negated = torch.complex(torch.ones(3, 1), torch.randn(3, 1)).to(place.device).conj().imag
    assert negated.is_neg()
    zeros = torch.zeros(3, 1, device=place.device)
    assert interpolate(negated, zeros, 0.0, backend=place.backend).equal(negated.resolve_neg())
    g = torch.ones(3, 1, device=place.device, requires_grad=True)
    each = gradient_norm_penalty(g * 2, reduction="none", backend=place.backend)
    grads = [
        torch.autograd.grad(each, g, u, retain_graph=True)[0] for u in (negated[:, 0], negated.resolve_neg()[:, 0])
    ]
    assert grads[0].equal(grads[1])


def test_dicts_are_matched_by_their_keys(place):
    a, b = (torch.randn(4, *shape, dtype=torch.float64, device=place.device) for shape in ((), (5,)))
    real, fake = {"a": a, "b": b}, {"b": b + 1, "a": a - 1}
    x_hat = interpolate(real, fake, 0.25, backend=place.backend)
    assert list(x_hat) == ["a", "b"]
    torch.testing.assert_close(x_hat["a"], a - 0.25)
    torch.testing.assert_close(x_hat["b"], b + 0.25)
