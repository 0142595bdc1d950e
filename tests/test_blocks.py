"""What the CPU needs on the way to a result is made block by block."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_gp import gradient_norm_penalty, interpolate
from fused_gp.form import accumulation_type
from fused_gp.ops import torch_ops


class Sizes(TorchDispatchMode):
    """Of the tensors that operations make, views left out."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.made += [
            (t.dtype, t.numel())
            for t in tree_leaves(result)
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given
        ]
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nothing_of_the_rows_size_but_the_results(monkeypatch, dtype):
    """x_hat and its two gradients; the penalty's gradient, and the one of that; the two ends of a step."""
    shape, block = (8, 100), 200
    monkeypatch.setattr(torch_ops, "BLOCK", block)
    real, fake, gradients = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3))
    cotangent, alpha = torch.randn(shape, dtype=dtype), torch.rand(8)
    with Sizes() as sizes:
        x_hat = interpolate(real, fake, alpha)
        torch.autograd.grad(x_hat, (real, fake), cotangent)
        (first,) = torch.autograd.grad(gradient_norm_penalty(gradients), gradients, create_graph=True)
        torch.autograd.grad(first, gradients, cotangent)
        torch_ops.perturb(real.detach(), cotangent, alpha[:, None].to(accumulation_type(dtype)))
    large = [made for made in sizes.made if made[1] > block]
    assert large == [(dtype, math.prod(shape))] * 7
