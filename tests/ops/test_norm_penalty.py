"""gradient_norm_penalty compared with the fp64 reference: options, shapes, dtypes, and the edges of its formula."""

import itertools

import pytest
import torch

from fused_gp import gradient_norm_penalty, reference
from tests.support.orders import SHAPES, assert_same_to_second_order, gradients_like
from tests.support.places import CPU
from tests.support.tolerances import DTYPES, assert_near

FORMS = [
    {},
    {"one_sided": True},
    {"squared": True},
    {"target": 0.0},
    {"target": 0.0, "one_sided": True},
    {"target": 2.5, "eps": 0.3},
    {"eps": 0.0},
    {"grad_scale": 8.0},
    {"squared": True, "grad_scale": 8.0, "weight": 3.0},
    {"weight": 10.0, "reduction": "sum"},
    {"weight": 10.0, "reduction": "none", "one_sided": True},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_to_second_order(place, dtype, form):
    gradients = gradients_like((5, 23), dtype, place.device, form.get("grad_scale", 1.0))
    assert_same_to_second_order(form, gradients, place)


@pytest.mark.parametrize("form", [{}, {"one_sided": True, "reduction": "none"}, {"squared": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_to_second_order(place, shape, dtype, form):
    gradients = gradients_like(shape, dtype, place.device)
    assert_same_to_second_order(form, gradients, place)


def test_pairs_of_options_to_second_order():
    """No option gets lost beside another: any two together, in plain torch."""
    gradients = gradients_like((4, 9), torch.float64, "cpu")
    for one, two in itertools.combinations(FORMS, 2):
        assert_same_to_second_order(one | two, gradients, CPU)


# For the edges.
EDGE_FORMS = [{}, {"one_sided": True}, {"squared": True}, {"reduction": "none"}]


def orders(function, gradients, upstream=None, **options):
    """Penalty, norms, first and second derivative along ones; the second one also with a graph, as a third order needs
    it."""
    g = gradients.detach().clone().requires_grad_()
    penalty, norms = function(g, return_norms=True, **options)
    upstream = torch.ones_like(penalty) if upstream is None else upstream
    (first,) = torch.autograd.grad(penalty, g, upstream, create_graph=True)
    (fused,) = torch.autograd.grad(first, g, torch.ones_like(first), retain_graph=True)
    (differentiable,) = torch.autograd.grad(first, g, torch.ones_like(first), create_graph=True)
    return penalty, norms, first, fused, differentiable


@pytest.mark.parametrize("form", EDGE_FORMS, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-50, 1e-12, 0.1])
def test_a_zero_row_is_finite_and_changes_no_other(place, eps, form):
    """With eps = 0 its derivatives of every order are zero."""
    gradients = torch.randn(4, 6).to(place.device) * 2
    gradients[1] = 0
    ours = orders(gradient_norm_penalty, gradients, backend=place.backend, eps=eps, **form)
    # An eps of 1e-50 is zero in fp32.
    expected_results = orders(
        reference.gradient_norm_penalty, gradients.double(), eps=0.0 if eps == 1e-50 else eps, **form
    )
    for actual, expected, order in zip(ours, expected_results, (0, 0, 1, 2, 2), strict=True):
        if actual.ndim == 0:
            assert_near(actual, expected, torch.float32, order)
        else:  # the zero row apart: with eps = 1e-12 its second derivative is 2 t / sqrt(eps)
            others = torch.tensor([0, 2, 3])
            assert_near(actual[others], expected[others], torch.float32, order)
            assert_near(actual[1], expected[1], torch.float32, order)
    for result in ours:
        assert result.isfinite().all()
    _, norms, first, *seconds = ours
    if "squared" not in form:
        assert norms[1].item() == pytest.approx(eps**0.5, abs=1e-15, rel=1e-6)
    assert (first[1] == 0).all()
    if eps in (0.0, 1e-50) and "squared" not in form:
        assert all((second[1] == 0).all() for second in seconds)


def test_double_backward_at_a_zero_row_is_zero_where_tensor_norm_gives_nan():
    """The purpose of eps = 0."""
    g = torch.zeros(2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(((g.norm(2, 1) - 1) ** 2).mean(), g, create_graph=True)
    (second,) = torch.autograd.grad(first, g, torch.ones_like(first))
    assert second.isnan().any()
    assert orders(gradient_norm_penalty, g, eps=0.0)[3].eq(0).all()


def test_tiny_norms_without_eps_do_not_overflow(place):
    """At n = 1e-14, 2 t / n^3 overflows fp32; the second derivative, about t / n, does not."""
    gradients = torch.full((2, 4), 1e-14, device=place.device)
    gradients[:, 0] *= 2
    options = {"eps": 0.0, "reduction": "none"}
    ours = orders(gradient_norm_penalty, gradients, backend=place.backend, **options)
    expected_results = orders(reference.gradient_norm_penalty, gradients.double(), **options)
    for actual, expected, order in zip(ours, expected_results, (0, 0, 1, 2, 2), strict=True):
        assert_near(actual, expected, torch.float32, order)


@pytest.mark.parametrize(("weight", "batch"), [(1.0, 1), (10.0, 7)])
@pytest.mark.parametrize("one_sided", [False, True])
def test_a_norm_on_the_target_has_value_and_gradient_zero(place, one_sided, weight, batch):
    """The second derivative is not zero when two-sided, and zero when one-sided (n > t does not hold)."""
    gradients = torch.tensor([[3.0, 4.0]], device=place.device).expand(batch, 2)
    options = {"target": 5.0, "eps": 0.0, "one_sided": one_sided, "weight": weight}
    penalty, norms, first, *seconds = orders(gradient_norm_penalty, gradients, backend=place.backend, **options)
    assert (norms == 5.0).all()
    assert penalty.item() == 0
    assert (first == 0).all()
    # w = 0 leaves (w'/n) <g, u> g = 2 t / n^3 * 7 * g
    expected = torch.zeros(batch, 2) if one_sided else weight / batch * 2 * 5 / 125 * 7 * gradients.cpu()
    for second in seconds:
        torch.testing.assert_close(second.cpu(), expected)


@pytest.mark.parametrize("form", EDGE_FORMS, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_stay_in_their_row(place, bad, form):
    """They show in the norm of their own row, are never masked, and do not change gradients of other rows."""
    gradients = torch.randn(3, 2100).to(place.device)
    clean = orders(gradient_norm_penalty, gradients, backend=place.backend, **form)
    gradients[1, 2050] = bad
    penalty, norms, first, second, _ = orders(gradient_norm_penalty, gradients, backend=place.backend, **form)
    assert norms[1].isnan() if bad != bad else norms[1].isposinf()
    assert not (penalty if penalty.ndim == 0 else penalty[1]).isfinite()
    assert not first[1].isfinite().all()
    for row in (0, 2):
        assert norms[row] == clean[1][row]
        assert first[row].equal(clean[2][row])
        assert second[row].equal(clean[3][row])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_a_norm_that_overflows_gives_no_finite_gradient(place):
    """So a training loop that checks for infinities finds them in the weights' gradients."""
    gradients = torch.tensor([[1e20, 1.0], [2.0, 1.0]], device=place.device)
    penalty, norms, first, *_ = orders(gradient_norm_penalty, gradients, backend=place.backend)
    assert penalty.isposinf()
    assert norms[0].isposinf()
    assert first[0].isnan().all()
    assert first[1].isfinite().all()


def test_half_precision_sums_do_not_overflow(place):
    """12,288 fp16 gradients of 10 sum to 1.2 million squares, 19 times what fp16 can hold."""
    gradients = torch.full((2, 12288), 10.0, dtype=torch.float16, device=place.device)
    penalty, norms = gradient_norm_penalty(gradients, backend=place.backend, return_norms=True)
    expected = 10 * 12288**0.5
    torch.testing.assert_close(norms.cpu(), torch.full((2,), expected))
    assert penalty.item() == pytest.approx((expected - 1) ** 2, rel=1e-6)


def test_long_rows_keep_their_accuracy():
    """Plain sums of squares in a few lanes lose four digits over ten million elements."""
    gradients = torch.randn(2, 10_000_019)
    _, norms = gradient_norm_penalty(gradients, return_norms=True)
    assert_near(norms, gradients.double().norm(dim=1), torch.float32, 0)


def test_half_types_give_fp32_results_and_norms_are_detached(place):
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        g = torch.randn(2, 3, device=place.device).to(dtype).requires_grad_()
        penalty, norms = gradient_norm_penalty(g, backend=place.backend, return_norms=True)
        assert penalty.dtype == norms.dtype == expected
        assert penalty.requires_grad
        assert not norms.requires_grad


def test_more_rows_than_fit_one_tile(place):
    """In number and in partial sums."""
    gradients = torch.randn(4099, 3).to(place.device) * 3
    ours = orders(gradient_norm_penalty, gradients, backend=place.backend)
    expected_results = orders(reference.gradient_norm_penalty, gradients.double())
    assert_near(ours[0], expected_results[0], torch.float32, 0)
    assert_near(ours[1], expected_results[1], torch.float32, 0)


@pytest.mark.parametrize("shape", [(3, 9001), (37, 17), (1200, 3)], ids=str)
def test_repeated_calls_give_the_same_bits(place, shape):
    """Six calls: value, norms and both derivatives."""
    gradients = torch.randn(shape).to(place.device)
    first = orders(gradient_norm_penalty, gradients, backend=place.backend)
    for _ in range(5):
        for one, two in zip(first, orders(gradient_norm_penalty, gradients, backend=place.backend), strict=True):
            assert one.equal(two)
