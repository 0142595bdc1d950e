"""Tensors in any memory layout: the same results as their contiguous copies, and no copy of dense tensors."""

import pytest
import torch

from fused_gp import interpolate, reference
from fused_gp.ops.rows import storage_order, to_rows
from tests.support.orders import assert_same_to_second_order
from tests.support.tolerances import assert_near


def layouts(shape, device="cpu"):
    """The same shape in every memory layout that a caller's tensor may have. Made on the device: a copy to another one
    is dense."""

    def randn(*sizes):
        return torch.randn(sizes).to(device)

    base = randn(*[2 * size for size in shape])
    yield "contiguous", randn(*shape)
    yield "sliced", base[tuple(slice(0, size) for size in shape)]
    yield "strided", base[tuple(slice(None, None, 2) for _ in shape)]
    yield "transposed", randn(*shape[::-1]).permute(*reversed(range(len(shape))))
    yield "inner transposed", randn(shape[0], *shape[:0:-1]).permute(0, *reversed(range(1, len(shape))))
    yield "expanded batch", randn(1, *shape[1:]).expand(shape)
    yield "expanded inside", randn(*shape[:-1], 1).expand(shape)
    yield "misaligned", randn(torch.Size(shape).numel() + 1)[1:].view(shape)
    yield "flipped", randn(*shape).flip(-1)
    if len(shape) == 4:
        yield "channels_last", randn(*shape).to(memory_format=torch.channels_last)
    if len(shape) == 5:
        yield "channels_last_3d", randn(*shape).to(memory_format=torch.channels_last_3d)


LAYOUTS = [(shape, name) for shape in [(4, 6), (4, 3, 2, 4), (2, 3, 2, 2, 3)] for name, _ in layouts(shape)]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
def test_memory_layouts_to_second_order(place, shape, layout):
    """Both ops give the results of the contiguous copy; channels_last stays channels_last."""
    tensor = dict(layouts(shape, place.device))[layout]
    # Far from the target: near it, n - t is a difference of nearly equal numbers.
    assert_same_to_second_order({"target": 30.0}, tensor, place)

    fake = torch.randn(shape).to(place.device)
    alpha = torch.rand(shape[0]).to(place.device)
    for one, two in ((tensor, fake), (fake, tensor)):
        x_hat = interpolate(one, two, alpha, backend=place.backend)
        assert_near(x_hat, reference.interpolate(one.double(), two.double(), alpha.double()), torch.float32, 0)
        if layout.startswith("channels_last") and one is tensor:
            assert x_hat.stride() == tensor.stride()


def test_dense_rows_are_not_copied():
    """Contiguous and channels_last tensors, and sliced or expanded batches, keep their memory."""
    images = torch.randn(4, 3, 2, 5)
    for tensor in (images, images.to(memory_format=torch.channels_last), images[::2], images[:1].expand(4, 3, 2, 5)):
        rows = to_rows(tensor, storage_order(tensor), len(tensor))
        assert rows.data_ptr() == tensor.data_ptr()
        assert rows.stride(1) == 1
