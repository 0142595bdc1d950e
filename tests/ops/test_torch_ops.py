"""Plain torch computes block by block: the same results, and temporaries that are no larger than a block."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_gp import gradient_norm_penalty, interpolate
from fused_gp.form import accumulation_type
from fused_gp.ops import torch_ops
from tests.support.orders import assert_interpolation_to_second_order, assert_same_to_second_order, gradients_like
from tests.support.places import CPU
from tests.support.tolerances import DTYPES

BLOCKS = [1, 2 * 23, 4 * 23, 5 * 23, 1000]  # rows in a block: one; two; four; more than all


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
    assert_interpolation_to_second_order(CPU, (5, 23), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_perturbation_in_blocks(monkeypatch, block, dtype):
    monkeypatch.setattr(torch_ops, "BLOCK", block)
    points, gradients = torch.randn(2, 5, 23).to(dtype)
    column = torch.randn(5, 1, dtype=accumulation_type(dtype))
    expected = [(points + sign * column * gradients).to(dtype) for sign in (1, -1)]
    torch.testing.assert_close(torch_ops.perturb(points, gradients, column), tuple(expected))


class AllocatedSizes(TorchDispatchMode):
    """Dtypes and sizes of the tensors that operations allocate, without views."""

    def __init__(self):
        super().__init__()
        self.allocated = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.allocated += [
            (t.dtype, t.numel())
            for t in tree_leaves(result)
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs
        ]
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_results_are_larger_than_a_block(monkeypatch, dtype):
    """x_hat and its two gradients; the penalty's gradient, and its gradient; the two perturbed batches."""
    shape, block = (8, 100), 200
    monkeypatch.setattr(torch_ops, "BLOCK", block)
    real, fake, gradients = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3))
    cotangent, alpha = torch.randn(shape, dtype=dtype), torch.rand(8)
    with AllocatedSizes() as sizes:
        x_hat = interpolate(real, fake, alpha)
        torch.autograd.grad(x_hat, (real, fake), cotangent)
        (first,) = torch.autograd.grad(gradient_norm_penalty(gradients), gradients, create_graph=True)
        torch.autograd.grad(first, gradients, cotangent)
        torch_ops.perturb(real.detach(), cotangent, alpha[:, None].to(accumulation_type(dtype)))
    large = [made for made in sizes.allocated if made[1] > block]
    assert large == [(dtype, math.prod(shape))] * 7


def test_many_norms_are_computed_without_sqrt():
    """torch.sqrt of more than 2048 numbers runs in threads, whose synchronisation takes a thousand times as long on
    busy cores."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    names = set()
    gradients = torch.randn(4096, 2, requires_grad=True)
    with Names():
        gradient_norm_penalty((gradients, gradients)).backward()
    assert "hypot" in names
    assert not any("sqrt" in name for name in names)
