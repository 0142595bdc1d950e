"""Every threshold of the launch settings on a device, and tensors of more than 2^31 elements."""

import pytest
import torch

from fused_gp import gradient_norm_penalty, interpolate, reference
from tests.support.kernels.on_device import all_orders, assert_equal_bits
from tests.support.orders import assert_same_to_second_order, gradients_like
from tests.support.places import Place
from tests.support.tolerances import DTYPES, assert_near

pytestmark = pytest.mark.gpu


def shapes_at_thresholds(tile):
    """One shape on each side of every threshold of kernels/tiles.py, for tiles of this many elements.

    Not the product of all heights and widths: what a threshold changes in one dimension, such as how many tiles a row
    has, does not depend on the side that the other dimension is on, unless listed here; and each shape takes six
    kernels, most of which have to be compiled.
    """
    return [
        # Rows of one to three elements; of half a tile, beyond which no two share one; of one tile; of several.
        *[(3, width) for width in (1, 2, 3, tile // 2, tile // 2 + 1, tile - 1, tile, tile + 1, 3 * tile // 2)],
        (3, 2 * tile + 1),
        # As many rows as a tile has room for, and one more: one program, and two that count their arrivals.
        (1, 3), (2, 3), (tile // 4, 3), (tile // 4 + 1, 3),
        # 2048 programs: with more tiles than that, one program takes several; rows of one tile, and two in a tile.
        (2047, tile - 1), (2048, tile - 1), (2049, tile - 1), (4096, tile // 2), (4097, tile // 2),
        # While there are fewer rows, several programs share one: two, one, and two of a row's three tiles.
        (1, tile + 1), (1023, tile + 1), (1024, tile + 1), (1025, tile + 1), (682, 3 * tile - 1), (683, 3 * tile - 1),
        # 2048 programs for one row, each with one tile, and with more; 1024 and 682 programs for each row.
        (1, 2048 * tile - 1), (1, 2048 * tile + 1), (2, 1025 * tile + 19), (3, 1024 * tile),
        # More than 2048 tiles of many short rows, and very many rows.
        (2048 * tile // 64 + 1, 33), (1_000_003, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{shape}-{dtype}")
        for dtype in DTYPES
        for shape in shapes_at_thresholds(8192 // dtype.itemsize)
    ],
)
def test_both_ops_at_every_threshold(shape, dtype):
    """Up to second derivatives. The numbers are drawn on the CPU: they can be drawn again where there is no device."""
    # Not the mean, whose gradients are subnormal in fp16 for a hundred thousand rows, with fewer digits.
    assert_same_to_second_order({"reduction": "sum"}, gradients_like(shape, dtype, "cuda"), Place("triton", "cuda"))
    one, two, cotangent = (torch.randn(shape).to("cuda", dtype) for _ in range(3))
    alpha = torch.rand(shape[0]).to("cuda", torch.promote_types(dtype, torch.float32))
    results = []
    for function, cast in ((interpolate, torch.Tensor.clone), (reference.interpolate, torch.Tensor.double)):
        real, fake = cast(one).requires_grad_(), cast(two).requires_grad_()
        x_hat = function(real, fake, cast(alpha))
        results.append((x_hat, *torch.autograd.grad(x_hat, (real, fake), cast(cotangent))))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, dtype, 1)


def needs_memory(halves, floats=0):
    """For this many fp16 and fp32 elements at once, and half a GB for the rest."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    needed = 2 * halves + 4 * floats + 2**29
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.1f} GB of free device memory, and there are {free / 1e9:.1f}")


def assert_all_are(what, part, expected):
    """All elements are one number, to the rounding and the smallest step of fp16."""
    low, high = part.min().item(), part.max().item()
    tolerance = max(2**-11 * abs(expected), 2**-25)
    if not (low == high and abs(low - expected) <= tolerance):
        raise AssertionError(
            f"{what}, {tuple(part.shape)} by {part.stride()}: from {low!r} to {high!r}, expected {expected!r} "
            f"everywhere; {first_far(part, expected, tolerance)}"
        )


def first_far(part, expected, tolerance):
    """In words. Piece by piece: torch finds elements among fewer than 2^31 only."""
    long = int(part.shape[1] > part.shape[0])
    step = max(1, 2**28 // part.shape[1 - long])
    for begin in range(0, part.shape[long], step):
        piece = part.narrow(long, begin, min(step, part.shape[long] - begin))
        far = ~((piece - expected).abs() <= tolerance)
        if far.any():
            at = far.nonzero()[0].tolist()
            return f"{far.sum()} are not among the {far.numel()} from {begin} on, the first {piece[tuple(at)]} at {at}"
    return "each alone is near it"


# More than 2^31 elements: in one row, in rows longer than a program's share, in many rows, and in short ones.
SHAPES_PAST_31_BITS = [(1, 2**31 + 8), (3, 2**30), (2**20 + 1, 2**11 + 1), (2**30 + 4, 2)]


@pytest.mark.alone
@pytest.mark.parametrize("shape", SHAPES_PAST_31_BITS, ids=str)
def test_penalty_of_more_than_2_31_elements(shape):
    """Each gradient is 2^-10, and the last one of its row is 3, so that a row that is not read to its end shows."""
    # At one peak gradients, both derivatives, cotangent, and of each row norm, penalty and inner product; at the other,
    # where the rows are long, a copy that `min` makes in place of these: 22, 33, 22 and 31 GB.
    elements = shape[0] * shape[1]
    needs_memory(4 * elements + max(6 * shape[0], (shape[1] - 1) * shape[0]))
    g = torch.full(shape, 2.0**-10, dtype=torch.float16, device="cuda")
    g[:, -1] = 3.0
    g.requires_grad_()
    each, norms = gradient_norm_penalty(g, target=2.0, eps=0.0, reduction="none", return_norms=True)
    n = ((shape[1] - 1) * 2.0**-20 + 9.0) ** 0.5
    assert norms.min() == norms.max(), f"norms from {norms.min()} to {norms.max()}, expected {n}"
    assert_near(norms[:1], torch.full((1,), n, dtype=torch.float64), torch.float32, 0)

    (first,) = torch.autograd.grad(each.sum(), g, create_graph=True)
    w = 2 * (n - 2) / n
    assert_all_are("first derivative", first.detach()[:, :-1], w * 2.0**-10)
    assert_all_are("its last column", first.detach()[:, -1:], w * 3)

    cotangent = torch.zeros_like(g)
    cotangent[:, -1] = 1.0
    (second,) = torch.autograd.grad(first, g, cotangent)
    bend = 2 * 2 / n**3 * 3  # (w'/n) <g, u>
    assert_all_are("second derivative", second[:, :-1], bend * 2.0**-10)
    assert_all_are("its last column", second[:, -1:], w + bend * 3)


@pytest.mark.alone
@pytest.mark.parametrize("shape", SHAPES_PAST_31_BITS, ids=str)
def test_interpolation_of_more_than_2_31_elements(shape):
    # At the peak both batches, both gradients, x_hat or the copy that `min` makes, and alpha: 22, 33, 22 and 26 GB.
    needs_memory(5 * shape[0] * shape[1], shape[0])
    real = torch.full(shape, 2.0, dtype=torch.float16, device="cuda")
    fake = torch.full(shape, 4.0, dtype=torch.float16, device="cuda")
    real[:, -1] = -2.0
    alpha = torch.full(shape[:1], 0.25, device="cuda")
    x_hat = interpolate(real, fake, alpha)
    assert_all_are("x_hat", x_hat[:, :-1], 2.5)
    assert_all_are("its last column", x_hat[:, -1:], -0.5)
    del x_hat
    real.requires_grad_()
    fake.requires_grad_()
    ends = torch.autograd.grad(interpolate(real, fake, alpha), (real, fake), real.detach())
    for name, end, weight in zip(("real", "fake"), ends, (0.75, 0.25), strict=True):
        assert_all_are(f"gradient of {name}", end[:, :-1], 2 * weight)
        assert_all_are("its last column", end[:, -1:], -2 * weight)


@pytest.mark.alone
def test_rows_with_a_stride_of_more_than_2_31():
    """Few elements, whose addresses are far apart."""
    needs_memory(3 * (2**31 + 8))
    wide = torch.zeros(3, 2**31 + 8, dtype=torch.float16, device="cuda")
    rows = wide[:, -1000:]
    rows.copy_(torch.randn(3, 1000))
    others = rows.flip(0), torch.randn(3, 1000, device="cuda").half(), torch.rand(3, device="cuda")
    assert_equal_bits(all_orders(rows, *others), all_orders(rows.contiguous(), *others))
