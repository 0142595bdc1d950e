"""Both ops and the call against the fp64 oracle: shapes, dtypes, options, memory formats, three orders."""

import itertools

import pytest
import torch

from fused_gp import fused_gradient_penalty, gradient_norm_penalty, interpolate, reference
from fused_gp.form import accumulation_type
from fused_gp.ops import torch_ops
from fused_gp.ops.rows import storage_order, to_rows
from tests.support.places import PLACES, Place
from tests.support.tolerances import assert_near
from tests.support.tolerances import table_row as row

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# One element, odd, prime, several rows in a tile, rows longer than a tile, rows split over programs.
SHAPES = [(1,), (5,), (1, 1), (3, 1), (4, 7), (37, 17), (2, 3, 5), (2, 3, 4, 5), (2, 2, 3, 2, 3), (3, 2053), (2, 9001)]

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


def gradients_like(shape, dtype, device, grad_scale=1.0):
    """Norms between 0.3 and 4, so that both sides of the target occur and no result is a difference of equals."""
    rows = torch.randn(shape[0], max(1, torch.Size(shape[1:]).numel()), dtype=torch.float64)
    wanted = torch.tensor([0.3, 4.0, 2.0, 0.6], dtype=torch.float64).repeat(shape[0])[: shape[0], None]
    rows = rows / rows.norm(dim=1, keepdim=True) * wanted * grad_scale
    return rows.reshape(shape).to(device, dtype)


def penalty_to_second_order(function, gradients, **options):
    """Value, norms, gradient, and the gradients of a random projection of it, for a random upstream."""
    gradients = gradients.detach().requires_grad_()
    draw = torch.Generator().manual_seed(1)
    penalty, norms = function(gradients, return_norms=True, **options)
    upstream = torch.rand(penalty.shape, generator=draw) + 0.5
    upstream = upstream.to(penalty.device, penalty.dtype).requires_grad_()
    (first,) = torch.autograd.grad(penalty, gradients, upstream, create_graph=True)
    cotangent = torch.randn(gradients.shape, generator=draw).bfloat16().to(first.device, first.dtype)
    second = torch.autograd.grad(first, (gradients, upstream), cotangent)
    # The upstream's gradient, <first, cotangent> / upstream, is a sum over rows in which terms cancel.
    terms = (first.detach().double().norm() * cotangent.double().norm() / upstream.double().norm()).item()
    return [(penalty, 0, 0.0), (norms, 0, 0.0), (first, 1, 0.0), (second[0], 2, 0.0), (second[1], 0, terms)]


def assert_same_to_second_order(options, gradients, place):
    ours = penalty_to_second_order(gradient_norm_penalty, gradients, backend=place.backend, **options)
    truth = penalty_to_second_order(reference.gradient_norm_penalty, gradients.double(), **options)
    for (actual, order, _), (expected, _, scale) in zip(ours, truth, strict=True):
        assert_near(actual, expected, row(place, gradients.dtype), order, scale)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalty_options(place, dtype, form):
    gradients = gradients_like((5, 23), dtype, place.device, form.get("grad_scale", 1.0))
    assert_same_to_second_order(form, gradients, place)


@pytest.mark.parametrize("form", [{}, {"one_sided": True, "reduction": "none"}, {"squared": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_penalty_shapes(place, shape, dtype, form):
    gradients = gradients_like(shape, dtype, place.device)
    assert_same_to_second_order(form, gradients, place)


def layouts(shape):
    """The same shape lying in memory in every way a caller's tensor may."""
    base = torch.randn([2 * size for size in shape])
    yield "contiguous", torch.randn(shape)
    yield "sliced", base[tuple(slice(0, size) for size in shape)]
    yield "strided", base[tuple(slice(None, None, 2) for _ in shape)]
    yield "transposed", torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    yield "inner transposed", torch.randn(shape[0], *shape[:0:-1]).permute(0, *reversed(range(1, len(shape))))
    yield "expanded batch", torch.randn(1, *shape[1:]).expand(shape)
    yield "expanded inside", torch.randn(*shape[:-1], 1).expand(shape)
    yield "misaligned", torch.randn(torch.Size(shape).numel() + 1)[1:].view(shape)
    yield "flipped", torch.randn(shape).flip(-1)
    if len(shape) == 4:
        yield "channels_last", torch.randn(shape).to(memory_format=torch.channels_last)
    if len(shape) == 5:
        yield "channels_last_3d", torch.randn(shape).to(memory_format=torch.channels_last_3d)


LAYOUTS = [(shape, name) for shape in [(4, 6), (4, 3, 2, 4), (2, 3, 2, 2, 3)] for name, _ in layouts(shape)]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
def test_memory_layouts(place, shape, layout):
    """Every layout gives what its contiguous copy gives, in all orders, and dense ones are not copied."""
    tensor = dict(layouts(shape))[layout].to(place.device)
    # Far from the target: near it, n - t is a difference of equals.
    assert_same_to_second_order({"target": 30.0}, tensor, place)

    fake = torch.randn(shape, device=place.device)
    alpha = torch.rand(shape[0], device=place.device)
    for one, two in ((tensor, fake), (fake, tensor)):
        x_hat = interpolate(one, two, alpha, backend=place.backend)
        assert_near(x_hat, reference.interpolate(one.double(), two.double(), alpha.double()), torch.float32, 0)
        if layout.startswith("channels_last") and one is tensor:
            assert x_hat.stride() == tensor.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpolate(place, shape, dtype):
    """Value, the three first derivatives, and the derivatives of those."""
    real, fake = (torch.randn(shape, device=place.device).to(dtype).requires_grad_() for _ in range(2))
    alpha = torch.rand(shape[0], device=place.device).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    cotangent = torch.randn(shape, device=place.device).to(dtype)
    again = [torch.randn(shape, device=place.device).to(dtype) for _ in range(2)]
    again.append(torch.randn(shape[0], device=place.device).bfloat16())

    def orders(function, cast, **options):
        real_, fake_, alpha_, cotangent_ = (cast(t).detach().requires_grad_() for t in (real, fake, alpha, cotangent))
        x_hat = function(real_, fake_, alpha_, **options)
        inputs = (real_, fake_, alpha_, cotangent_)
        first = torch.autograd.grad(x_hat, inputs[:3], cotangent_, create_graph=True)
        # One by one: autograd adds up what several outputs send back in the input type, rounding each time.
        second = [
            torch.autograd.grad(f, inputs, t.to(f.dtype), retain_graph=True, materialize_grads=True)
            for f, t in zip(first, again, strict=True)
        ]
        return x_hat, first, sum(second, ())

    x_hat, first, second = orders(interpolate, lambda t: t, backend=place.backend)
    x_hat_, first_, second_ = orders(reference.interpolate, torch.Tensor.double)
    assert x_hat.dtype == dtype
    assert_near(x_hat, x_hat_, row(place, dtype), 1)
    for actual, expected in zip(first, first_, strict=True):
        assert_near(actual, expected, row(place, dtype), 1)
    for actual, expected in zip(second, second_, strict=True):
        assert_near(actual, expected, row(place, dtype), 2)


@pytest.mark.parametrize(("real_needed", "fake_needed"), [(True, False), (False, True)])
def test_interpolate_one_side_attached(place, real_needed, fake_needed):
    """A fake batch attached to its generator is the usual case; the other side then gets no gradient."""
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


def test_reference_is_exact_in_fp64():
    """The judge itself, against the formula written out, with a number and with a tensor for alpha."""
    real, fake = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    expected = 0.3 * fake + 0.7 * real
    for alpha in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)):
        torch.testing.assert_close(reference.interpolate(real, fake, alpha), expected, rtol=1e-15, atol=1e-15)


def test_dense_rows_are_not_copied():
    """Contiguous and channels_last tensors, and sliced or expanded batches, are read where they lie."""
    images = torch.randn(4, 3, 2, 5)
    for tensor in (images, images.to(memory_format=torch.channels_last), images[::2], images[:1].expand(4, 3, 2, 5)):
        rows = to_rows(tensor, storage_order(tensor), len(tensor))
        assert rows.data_ptr() == tensor.data_ptr()
        assert rows.stride(1) == 1


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_reductions_run_in_few_programs_and_each_has_work(itemsize):
    """The last one sums a partial of each in one tile; a program without a tile of its own would run for nothing."""
    from fused_gp.kernels.tiles import PROGRAMS, reduction_tile

    for rows, width in (
        (1, 1), (1, 10**8), (4, 65536), (64, 12288), (64, 196608), (1023, 5000), (2047, 10**5), (2048, 10**5),
        (10**5, 1), (10**5, 784), (10**5, 3072), (2**31 + 7, 3),
    ):  # fmt: skip
        tiling = reduction_tile(rows, width, itemsize)
        covered = tiling.rows * tiling.blocks
        assert tiling.splits == 1 or covered == 1
        assert tiling.programs == -(-rows // covered) * tiling.splits <= PROGRAMS
        assert tiling.tiles == -(-width // tiling.cols)
        # Few enough, and no fewer.
        assert 2 * tiling.programs >= min(PROGRAMS, -(-rows // tiling.rows) * tiling.tiles)
        assert (tiling.splits - 1) * tiling.cols < width


@pytest.mark.parametrize("shape", [(15, 1100), (700, 40), (1, 5000), (2, 4000)], ids=str)
@pytest.mark.parametrize("where", [place for place in PLACES if place.id != "torch"])
def test_programs_that_share_a_row_or_walk_several(monkeypatch, where, shape):
    """As large batches are reduced, with 7 programs at most instead of 2048: two rows have three programs each."""
    from fused_gp.kernels import norm_penalty, tiles

    monkeypatch.setattr(tiles, "PROGRAMS", 7)
    monkeypatch.setattr(norm_penalty, "reduction_tile", tiles.reduction_tile.__wrapped__)
    gradients = gradients_like(shape, torch.float64, where.device)
    for options in ({}, {"reduction": "none"}):
        assert_same_to_second_order(options, gradients, where)


CRITICS = {
    "mlp": lambda: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.LeakyReLU(0.2), torch.nn.Linear(16, 1)
    ),
    "conv, patches": lambda: torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 1, 3)
    ),
    "layer norm, (B,)": lambda: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(),
        torch.nn.Linear(8, 1), torch.nn.Flatten(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"one_sided": True, "target": 0.2}, {"reduction": "sum", "weight": 10.0}])
@pytest.mark.parametrize("critic", CRITICS)
def test_call(place, critic, options):
    """Value, norms and weight gradients of the drop-in call, draw for draw."""
    critic = CRITICS[critic]().double().to(place.device)
    real, fake = (torch.randn(4, 3, 4, 4, dtype=torch.float64, device=place.device) for _ in range(2))
    results = []
    for function, extra in (
        (fused_gradient_penalty, {"backend": place.backend}),
        (reference.fused_gradient_penalty, {}),
    ):
        torch.manual_seed(3)
        penalty, norms = function(critic, real, fake, return_norms=True, **options, **extra)
        weights = torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True)
        results.append((penalty, norms, *weights, torch.rand(1)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_all_pairs_of_options():
    """No option is lost on the way to the op: any two together, in plain torch."""
    gradients = gradients_like((4, 9), torch.float64, "cpu")
    for one, two in itertools.combinations(FORMS, 2):
        assert_same_to_second_order(one | two, gradients, Place("torch", "cpu"))


CPU = Place("torch", "cpu")
BLOCKS = [1, 2 * 23, 4 * 23, 5 * 23, 1000]  # single rows; two, two, one; four, one; all at once


@pytest.mark.parametrize("form", [{}, {"one_sided": True, "reduction": "none"}, {"squared": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_penalty_in_blocks(monkeypatch, block, dtype, form):
    monkeypatch.setattr(torch_ops, "BLOCK", block)
    assert_same_to_second_order(form, gradients_like((5, 23), dtype, "cpu"), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_interpolation_in_blocks(monkeypatch, block, dtype):
    monkeypatch.setattr(torch_ops, "BLOCK", block)
    test_interpolate(CPU, (5, 23), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_steps_in_blocks(monkeypatch, block, dtype):
    monkeypatch.setattr(torch_ops, "BLOCK", block)
    points, gradients = torch.randn(2, 5, 23).to(dtype)
    column = torch.randn(5, 1, dtype=accumulation_type(dtype))
    wanted = [(points + sign * column * gradients).to(dtype) for sign in (1, -1)]
    torch.testing.assert_close(torch_ops.perturb(points, gradients, column), tuple(wanted))
