"""The one table of tolerances: dtype and order of derivative, against fp64 truth on the same (rounded) inputs."""

import torch

# Relative to the largest element of the truth. Values and norms (order 0) are accumulated and returned in fp32 for
# the half types too; their gradients (orders 1, 2) are rounded to the input type: 2^-11 for fp16, 2^-8 for bf16.
TOLERANCE = {
    torch.float64: (1e-13, 1e-12, 1e-12),
    torch.float32: (1e-6, 2e-6, 5e-6),
    torch.float16: (1e-6, 2**-11, 2**-11),
    torch.bfloat16: (1e-6, 2**-8, 2**-8),
    # Triton's interpreter cuts bf16 off (its float conversion is called without a rounding mode); a GPU rounds.
    "interpreted bf16": (1e-6, 2**-7, 2**-7),
}


def row(place, dtype):
    """The row of the table for results of this dtype from this place."""
    interpreted = place.backend == "triton" and place.device == "cpu"
    return "interpreted bf16" if interpreted and dtype == torch.bfloat16 else dtype


def assert_near(actual, truth, row, order, scale=0.0):
    """`actual` equals the fp64 `truth` within the table; infinities and NaN must be at the same places.

    `scale` is the size of the terms, where the truth is a sum in which they may cancel.
    """
    assert actual.shape == truth.shape
    assert truth.dtype == torch.float64
    actual = actual.detach().double().cpu()
    truth = truth.detach().cpu()
    torch.testing.assert_close(actual.isfinite(), truth.isfinite(), msg="finite at other places")
    finite = truth.isfinite()
    if not finite.any():
        return
    error = (actual - truth)[finite].abs().max().item()
    scale = max(scale, truth[finite].abs().max().item())
    assert error <= TOLERANCE[row][order] * scale, f"{error:.3g} off, {scale:.3g} being the largest"
