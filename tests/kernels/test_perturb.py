"""The kernel of the two perturbed batches that the directional method needs."""

import pytest
import torch

from fused_gp.methods.directional import SPACING
from fused_gp.ops import torch_ops
from tests.support.places import KERNEL_PLACES
from tests.support.tolerances import DTYPES

pytest.importorskip("triton", reason="Triton is not installed")

from fused_gp import kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (5, 33), (2, 5000), (300, 3)], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("place", KERNEL_PLACES)
def test_perturb_is_x_plus_and_minus_c_g(place, shape, dtype, strided):
    """In one launch, compared with fp64, to one rounding; the interpreter truncates to bf16 instead."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    points, gradients = (torch.randn(shape[0], shape[1] * 2).to(place.device, dtype) for _ in range(2))
    points, gradients = (x[:, : shape[1]] if strided else x[:, : shape[1]].contiguous() for x in (points, gradients))
    column = torch.randn(shape[0], 1).to(place.device, wide)
    ours = kernels.perturb(points, gradients, column)
    x, g, c = points.double(), gradients.double(), column.double()
    for actual, expected in zip(ours, (x + c * g, x - c * g), strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        size = (x.abs() + (c * g).abs()).max().item()
        spacing = SPACING[dtype] * (2 if dtype == torch.bfloat16 else 1)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=spacing * size)
    for actual, expected in zip(torch_ops.perturb(points, gradients, column), (x + c * g, x - c * g), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=SPACING[dtype] * size)
