"""The edges of the two ops: zero rows, norms on the target, alpha at its ends, values that are not finite."""

import pytest
import torch

from fused_gp import gradient_norm_penalty, interpolate, reference
from tests.support.tolerances import assert_near

FORMS = [{}, {"one_sided": True}, {"squared": True}, {"reduction": "none"}]


def orders(function, gradients, upstream=None, **options):
    """Penalty, norms, first and second derivative along ones, the second also as a third order would need it."""
    g = gradients.detach().clone().requires_grad_()
    penalty, norms = function(g, return_norms=True, **options)
    upstream = torch.ones_like(penalty) if upstream is None else upstream
    (first,) = torch.autograd.grad(penalty, g, upstream, create_graph=True)
    (fused,) = torch.autograd.grad(first, g, torch.ones_like(first), retain_graph=True)
    (differentiable,) = torch.autograd.grad(first, g, torch.ones_like(first), create_graph=True)
    return penalty, norms, first, fused, differentiable


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-50, 1e-12, 0.1])
def test_zero_rows_among_others(place, eps, form):
    """With eps = 0 a zero row is flat in every order, and its neighbours are what they are without it."""
    gradients = torch.randn(4, 6, device=place.device) * 2
    gradients[1] = 0
    ours = orders(gradient_norm_penalty, gradients, backend=place.backend, eps=eps, **form)
    # An eps of 1e-50 is zero in fp32.
    truth = orders(reference.gradient_norm_penalty, gradients.double(), eps=0.0 if eps == 1e-50 else eps, **form)
    for actual, expected, order in zip(ours, truth, (0, 0, 1, 2, 2), strict=True):
        if actual.ndim == 0:
            assert_near(actual, expected, torch.float32, order)
        else:  # each on its own: with eps = 1e-12 the zero row has a curvature of 2 t / sqrt(eps)
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


def test_plain_norm_is_nan_where_ours_is_not():
    """What eps = 0 is for: the double backward of Tensor.norm at a zero row is NaN."""
    g = torch.zeros(2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(((g.norm(2, 1) - 1) ** 2).mean(), g, create_graph=True)
    (second,) = torch.autograd.grad(first, g, torch.ones_like(first))
    assert second.isnan().any()
    assert orders(gradient_norm_penalty, g, eps=0.0)[3].eq(0).all()


def test_tiny_norms_without_eps(place):
    """2 t / n^3 overflows fp32 at n = 1e-14; the second derivative, about t / n, does not."""
    gradients = torch.full((2, 4), 1e-14, device=place.device)
    gradients[:, 0] *= 2
    options = {"eps": 0.0, "reduction": "none"}
    ours = orders(gradient_norm_penalty, gradients, backend=place.backend, **options)
    truth = orders(reference.gradient_norm_penalty, gradients.double(), **options)
    for actual, expected, order in zip(ours, truth, (0, 0, 1, 2, 2), strict=True):
        assert_near(actual, expected, torch.float32, order)


@pytest.mark.parametrize(("weight", "batch"), [(1.0, 1), (10.0, 7)])
@pytest.mark.parametrize("one_sided", [False, True])
def test_norm_exactly_on_target(place, one_sided, weight, batch):
    """n = t: value and slope zero; curved when two-sided, flat when one-sided (n > t is not met)."""
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


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_stay_in_their_row(place, bad, form):
    """They show in the norm of their own row, are never masked, and do not touch the others' gradients."""
    gradients = torch.randn(3, 2100, device=place.device)
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
def test_norm_that_overflows(place):
    """An infinite penalty has no finite gradient, so that a loop which looks for infinities sees it in the weights."""
    gradients = torch.tensor([[1e20, 1.0], [2.0, 1.0]], device=place.device)
    penalty, norms, first, *_ = orders(gradient_norm_penalty, gradients, backend=place.backend)
    assert penalty.isposinf()
    assert norms[0].isposinf()
    assert first[0].isnan().all()
    assert first[1].isfinite().all()


def test_lazily_negated_tensors(place):
    """Complex critics hand out gradients that torch negates only when it reads them; kernels read memory."""
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


def test_half_precision_sums_do_not_overflow(place):
    """12,288 fp16 gradients of 10 sum to 1.2 million squares, 19 times what fp16 can hold."""
    gradients = torch.full((2, 12288), 10.0, dtype=torch.float16, device=place.device)
    penalty, norms = gradient_norm_penalty(gradients, backend=place.backend, return_norms=True)
    expected = 10 * 12288**0.5
    torch.testing.assert_close(norms.cpu(), torch.full((2,), expected))
    assert penalty.item() == pytest.approx((expected - 1) ** 2, rel=1e-6)


def test_long_rows_keep_their_accuracy():
    """Plain sums of squares in few lanes lose four digits over ten million elements."""
    gradients = torch.randn(2, 10_000_019)
    _, norms = gradient_norm_penalty(gradients, return_norms=True)
    assert_near(norms, gradients.double().norm(dim=1), torch.float32, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_alpha_at_its_ends(place, dtype):
    """Exactly real at 0 and exactly fake at 1."""
    real, fake = (torch.randn(4, 3, 5, device=place.device).to(dtype) for _ in range(2))
    alpha = torch.tensor([0.0, 1.0, 0.0, 1.0], device=place.device)
    x_hat = interpolate(real, fake, alpha, backend=place.backend)
    ends = torch.stack([real[0], fake[1], real[2], fake[3]])
    assert x_hat.equal(ends)
    assert interpolate(real, fake, 0.0, backend=place.backend).equal(real)
    assert interpolate(real, fake, 1, backend=place.backend).equal(fake)


def test_alpha_shapes(place):
    real, fake = (torch.randn(4, 3, 5, device=place.device) for _ in range(2))
    alpha = torch.rand(4, device=place.device)
    wanted = interpolate(real, fake, alpha, backend=place.backend)
    for same in (alpha.view(4, 1, 1), alpha.double(), torch.stack([alpha, alpha], 1)[:, 0]):
        torch.testing.assert_close(interpolate(real, fake, same, backend=place.backend), wanted)
    one = torch.tensor(0.25, device=place.device, requires_grad=True)
    x_hat = interpolate(real, fake, one, backend=place.backend)
    torch.testing.assert_close(x_hat, torch.lerp(real, fake, 0.25))
    (grad,) = torch.autograd.grad(x_hat.sum(), one)
    torch.testing.assert_close(grad, (fake - real).sum())


def test_results_are_detached_norms_and_full_precision(place):
    for dtype, wanted in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        g = torch.randn(2, 3, device=place.device).to(dtype).requires_grad_()
        penalty, norms = gradient_norm_penalty(g, backend=place.backend, return_norms=True)
        assert penalty.dtype == norms.dtype == wanted
        assert penalty.requires_grad
        assert not norms.requires_grad


def test_many_rows(place):
    """More rows than a tile of them, in number and in partial sums."""
    gradients = torch.randn(4099, 3, device=place.device) * 3
    ours = orders(gradient_norm_penalty, gradients, backend=place.backend)
    truth = orders(reference.gradient_norm_penalty, gradients.double())
    assert_near(ours[0], truth[0], torch.float32, 0)
    assert_near(ours[1], truth[1], torch.float32, 0)


@pytest.mark.parametrize("shape", [(3, 9001), (37, 17), (1200, 3)], ids=str)
def test_bitwise_repeatable(place, shape):
    """Six calls, the same bits: value, norms and both derivatives."""
    gradients = torch.randn(shape, device=place.device)
    first = orders(gradient_norm_penalty, gradients, backend=place.backend)
    for _ in range(5):
        for one, two in zip(first, orders(gradient_norm_penalty, gradients, backend=place.backend), strict=True):
            assert one.equal(two)
