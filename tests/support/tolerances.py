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
    what, actual = f"order {order} by the row {row} of the table", actual.detach()
    values, expected = actual.to(expected.device, torch.float64), expected.detach()
    finite = expected.isfinite()
    moved = values.isfinite() != finite
    assert not moved.any(), f"{what}: finite at other places: {differences(actual, expected, moved)}"
    if not finite.any():
        return
    errors = (values - expected).abs().where(finite, 0.0)
    scale = max(scale, expected[finite].abs().max().item())
    tolerance = TOLERANCE[row][order] * scale
    assert errors.max().item() <= tolerance, (
        f"{what}: error {errors.max().item():.3g}, the largest element being {scale:.3g}: "
        f"{differences(actual, expected, errors > tolerance)}"
    )


def differences(actual, expected, differ, most=8):
    """How many elements differ, and the first of them: enough to find the cause without the device."""
    places = [tuple(index) for index in differ.nonzero()[:most].tolist()]
    head = f"{differ.sum().item()} of {differ.numel()} elements of {actual.dtype} {tuple(actual.shape)}"
    return "\n    ".join([head, *[f"{at}: {actual[at].item()!r}, expected {expected[at].item()!r}" for at in places]])


def assert_same(actual, expected, *, rtol=1e-10, atol=1e-12):
    """Two sequences of fp64 tensors, computed by other operations or in another order."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(one, other, rtol, atol, f"tensor {index}")


def assert_close(actual, expected, rtol, atol, what):
    """torch's own comparison, whose message has no numbers."""

    def with_numbers(text):
        if actual.shape != expected.shape or actual.device != expected.device:
            return f"{what}: {text}"
        far = ~torch.isclose(actual.to(expected.dtype), expected, rtol=rtol, atol=atol)
        return f"{what}: {text}\n{differences(actual, expected, far)}"

    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=with_numbers)


def assert_same_sums(actual, expected):
    """Two sequences of fp64 tensors, computed by the same operations and added in another order."""
    assert_same(actual, expected, rtol=1e-11, atol=1e-13)


def assert_near_the_largest(actual, expected, tolerance):
    """Gradients of several weights, with errors of at most a part of the largest element of them all."""
    largest = max(gradient.abs().max().item() for gradient in expected)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(one, other, 0, tolerance * largest, f"gradient {index}")
