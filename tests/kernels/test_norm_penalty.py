"""Launches of the penalty kernels: programs for several rows or part of a row, and several tensors with one norm."""

import inspect
import itertools

import pytest
import torch

from fused_gp import gradient_norm_penalty
from tests.support.orders import assert_same_to_second_order, gradients_like
from tests.support.places import KERNEL_PLACES

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("shape", [(15, 1100), (700, 40), (1, 5000), (2, 4000)], ids=str)
@pytest.mark.parametrize("place", KERNEL_PLACES)
def test_few_programs_for_many_rows_or_one_long_row(monkeypatch, place, shape):
    """As large batches are reduced, with 7 programs at most instead of 2048: two rows have three programs each."""
    from fused_gp.kernels import norm_penalty, tiles

    monkeypatch.setattr(tiles, "PROGRAMS", 7)
    monkeypatch.setattr(norm_penalty, "reduction_tile", tiles.reduction_tile.__wrapped__)
    gradients = gradients_like(shape, torch.float64, place.device)
    for options in ({}, {"reduction": "none"}):
        assert_same_to_second_order(options, gradients, place)


def test_only_the_last_tensor_takes_the_root(monkeypatch):
    """The launches for the other tensors store their sums; one launch per tensor and order, and no other."""
    kernels = pytest.importorskip("fused_gp.kernels.norm_penalty", reason="Triton is not installed")
    launches = []
    launch = kernels.launch

    def counting(kernel, programs, *arguments):
        named = dict(zip(inspect.signature(kernel.fn).parameters, itertools.chain(*arguments), strict=True))
        launches.append((kernel.fn.__name__, named.get("LAST")))
        return launch(kernel, programs, *arguments)

    monkeypatch.setattr(kernels, "launch", counting)
    gradients = [torch.randn(3, width, requires_grad=True) for width in (2, 5, 3)]
    penalty = gradient_norm_penalty(gradients, backend="triton")
    assert launches == [("reduce_rows_kernel", last) for last in (False, False, True)]
    launches.clear()
    first = torch.autograd.grad(penalty, gradients, create_graph=True)
    assert launches == [("scale_rows_kernel", None)] * 3
    launches.clear()
    torch.autograd.grad(first, gradients, [torch.ones_like(f) for f in first])
    assert [name for name, _ in launches] == ["reduce_rows_kernel"] * 3 + ["scale_rows_kernel"] * 3
