"""Gradients of several tensors with one norm per sample."""

import pytest
import torch

from fused_gp import gradient_norm_penalty, reference
from tests.support.tolerances import assert_near, table_row


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float64)], ids=str)
@pytest.mark.parametrize("form", [{}, {"squared": True}, {"one_sided": True, "reduction": "none"}], ids=str)
def test_joint_norm_of_mixed_types_and_long_rows(place, dtypes, form):
    """Sums in the wider accumulation type, gradients in each tensor's own type; rows split over programs."""
    narrow = (torch.randn(3, 4) * 2).to(place.device, dtypes[0])
    long = (torch.randn(3, 9001) / 30).to(place.device, dtypes[1])
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
    wide_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    assert penalty.dtype == norms.dtype == wide_dtype
    # The inputs of a mixed sum are rounded to the narrower type, not the sum.
    assert_near(penalty, penalty_, torch.float32, 0)
    assert_near(norms, norms_, torch.float32, 0)
    for order, gradients, expected in ((1, first, first_), (2, second, second_)):
        for actual, expected_one, dtype in zip(gradients, expected, (*dtypes, dtypes[0]), strict=True):
            assert actual.dtype == dtype
            assert_near(actual, expected_one, table_row(place, dtype), order)


def test_split_gradients_have_the_penalty_of_the_whole_in_every_order(place):
    """Up to the third order."""
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
