"""Every threshold of the launch settings on a device, and tensors of more than 2^31 elements."""

import pytest
import torch

from fused_gp import gradient_norm_penalty, interpolate, reference
from tests.support.kernels.on_device import all_orders, assert_equal_bits
from tests.support.orders import assert_same_to_second_order, gradients_like
from tests.support.places import Place
from tests.support.tolerances import DTYPES, assert_near

pytestmark = pytest.mark.gpu

# Around the tiles of each dtype (8192 bytes), and around the numbers of programs at which rows are split or joined.
WIDTHS = [1, 2, 3, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 6144, 8193]
ROWS = [1, 2, 3, 127, 128, 129, 1023, 1024, 1025, 2047, 2048, 2049]
LARGE = [(1, 2**21 - 1), (1, 2**22 + 1), (2, 10_000_019), (3, 2**23), (65_537, 33), (100_003, 7), (1_000_003, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*ROWS, "large"])
def test_both_ops_at_every_threshold(rows, dtype):
    """Up to second derivatives."""
    shapes = LARGE if rows == "large" else [(rows, width) for width in WIDTHS]
    for shape in shapes:
        assert_same_to_second_order({}, gradients_like(shape, dtype, "cuda"), Place("triton", "cuda"))
        one, two, cotangent = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
        alpha = torch.rand(shape[0], device="cuda").to(torch.promote_types(dtype, torch.float32))
        results = []
        for function, cast in ((interpolate, torch.Tensor.clone), (reference.interpolate, torch.Tensor.double)):
            real, fake = cast(one).requires_grad_(), cast(two).requires_grad_()
            x_hat = function(real, fake, cast(alpha))
            results.append((x_hat, *torch.autograd.grad(x_hat, (real, fake), cast(cotangent))))
        for actual, expected in zip(*results, strict=True):
            assert_near(actual, expected, dtype, 1)


def needs_memory(gigabytes):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free device memory, and there are {free / 1e9:.1f}")


def assert_all_are(part, expected):
    """All elements are one number, to the rounding and the smallest step of fp16."""
    low, high = part.min().item(), part.max().item()
    assert low == high
    assert low == pytest.approx(expected, rel=2**-11, abs=2**-25)


# More than 2^31 elements: in one row, in rows longer than a program's share, in many rows, and in short ones.
SHAPES_PAST_31_BITS = [(1, 2**31 + 8), (3, 2**30), (2**20 + 1, 2**11 + 1), (2**30 + 4, 2)]


@pytest.mark.parametrize("shape", SHAPES_PAST_31_BITS, ids=str)
def test_penalty_of_more_than_2_31_elements(shape):
    """Each gradient is 2^-10, and the last one of its row is 3, so that a row that is not read to its end shows."""
    needs_memory(40)
    g = torch.full(shape, 2.0**-10, dtype=torch.float16, device="cuda")
    g[:, -1] = 3.0
    g.requires_grad_()
    each, norms = gradient_norm_penalty(g, target=2.0, eps=0.0, reduction="none", return_norms=True)
    n = ((shape[1] - 1) * 2.0**-20 + 9.0) ** 0.5
    assert norms.min() == norms.max()
    assert_near(norms[:1], torch.full((1,), n, dtype=torch.float64), torch.float32, 0)

    (first,) = torch.autograd.grad(each.sum(), g, create_graph=True)
    w = 2 * (n - 2) / n
    assert_all_are(first[:, :-1], w * 2.0**-10)
    assert_all_are(first[:, -1], w * 3)

    cotangent = torch.zeros_like(g)
    cotangent[:, -1] = 1.0
    (second,) = torch.autograd.grad(first, g, cotangent)
    bend = 2 * 2 / n**3 * 3  # (w'/n) <g, u>
    assert_all_are(second[:, :-1], bend * 2.0**-10)
    assert_all_are(second[:, -1], w + bend * 3)


@pytest.mark.parametrize("shape", SHAPES_PAST_31_BITS, ids=str)
def test_interpolation_of_more_than_2_31_elements(shape):
    needs_memory(40)
    real = torch.full(shape, 2.0, dtype=torch.float16, device="cuda")
    fake = torch.full(shape, 4.0, dtype=torch.float16, device="cuda")
    real[:, -1] = -2.0
    alpha = torch.full(shape[:1], 0.25, device="cuda")
    x_hat = interpolate(real, fake, alpha)
    assert_all_are(x_hat[:, :-1], 2.5)
    assert_all_are(x_hat[:, -1], -0.5)
    del x_hat
    real.requires_grad_()
    fake.requires_grad_()
    ends = torch.autograd.grad(interpolate(real, fake, alpha), (real, fake), real.detach())
    for end, weight in zip(ends, (0.75, 0.25), strict=True):
        assert_all_are(end[:, :-1], 2 * weight)
        assert_all_are(end[:, -1], -2 * weight)


def test_rows_with_a_stride_of_more_than_2_31():
    """Few elements, whose addresses are far apart."""
    needs_memory(20)
    wide = torch.zeros(3, 2**31 + 8, dtype=torch.float16, device="cuda")
    rows = wide[:, -1000:]
    rows.copy_(torch.randn(3, 1000))
    others = rows.flip(0), torch.randn(3, 1000, device="cuda").half(), torch.rand(3, device="cuda")
    assert_equal_bits(all_orders(rows, *others), all_orders(rows.contiguous(), *others))
