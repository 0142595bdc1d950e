"""The one table of tolerances, by dtype and order of derivative, against fp64 on the same (rounded) inputs."""

import torch

# Relative to the largest element of the reference. Values and norms (order 0) are accumulated and returned in fp32 for
# the half types too; their gradients (orders 1, 2) are rounded to the input type: 2^-11 for fp16, 2^-8 for bf16.
TOLERANCE = {
    torch.float64: (1e-13, 1e-12, 1e-12),
    torch.float32: (1e-6, 2e-6, 5e-6),
    torch.float16: (1e-6, 2**-11, 2**-11),
    torch.bfloat16: (1e-6, 2**-8, 2**-8),
    # Triton's interpreter truncates to bf16 (its float conversion is called without a rounding mode); a GPU rounds.
    "interpreted bf16": (1e-6, 2**-7, 2**-7),
}

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HALF_DTYPES = [torch.float16, torch.bfloat16]


def table_row(place, dtype):
    """The row of the table for results of this dtype from this place."""
    interpreted = place.backend == "triton" and place.device == "cpu"
    return "interpreted bf16" if interpreted and dtype == torch.bfloat16 else dtype


def assert_near(actual, expected, row, order, scale=0.0):
    """`actual` equals the fp64 `expected` within the table; infinities and NaN must be at the same places.

    `scale` is the size of the terms, where `expected` is a sum in which they may cancel.
    """
    assert actual.shape == expected.shape
    assert expected.dtype == torch.float64
    actual = actual.detach().double().cpu()
    expected = expected.detach().cpu()
    torch.testing.assert_close(actual.isfinite(), expected.isfinite(), msg="finite at other places")
    finite = expected.isfinite()
    if not finite.any():
        return
    error = (actual - expected)[finite].abs().max().item()
    scale = max(scale, expected[finite].abs().max().item())
    assert error <= TOLERANCE[row][order] * scale, f"error {error:.3g}, the largest element being {scale:.3g}"


def assert_same(actual, expected, *, rtol=1e-10, atol=1e-12):
    """Two sequences of fp64 tensors, computed by other operations or in another order."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def assert_same_sums(actual, expected):
    """Two sequences of fp64 tensors, computed by the same operations and added in another order."""
    assert_same(actual, expected, rtol=1e-11, atol=1e-13)


def assert_near_the_largest(actual, expected, tolerance):
    """Gradients of several weights, with errors of at most a part of the largest element of them all."""
    largest = max(gradient.abs().max().item() for gradient in expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * largest)
