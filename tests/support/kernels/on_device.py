"""For tests on a device: shapes, every kernel through both ops, and CUDA graphs."""

import gc

import torch

from fused_gp import gradient_norm_penalty, interpolate
from tests.support.tolerances import differences

# Reductions in programs for one row, for several rows, and for a part of a row; many programs of each.
DEVICE_SHAPES = [(9, 1500), (64, 300), (3, 9001), (1, 1_000_003), (3000, 700), (300, 20_000)]


def device_inputs(shape):
    """For `all_orders`: two batches, a cotangent, and alpha."""
    return [torch.randn(shape, device="cuda") for _ in range(3)] + [torch.rand(shape[0], device="cuda")]


def all_orders(one, other, cotangent, alpha):
    """Every kernel, through both ops: values, gradients, and gradients of those."""
    g, real, fake = (x.detach().requires_grad_() for x in (one, one, other))
    penalty, norms = gradient_norm_penalty(g, target=30.0, return_norms=True)
    upstream = torch.ones_like(penalty).requires_grad_()
    (first,) = torch.autograd.grad(penalty, g, upstream, create_graph=True)
    seconds = torch.autograd.grad(first, (g, upstream), cotangent)
    x_hat = interpolate(real, fake, alpha)
    ends = torch.autograd.grad(x_hat, (real, fake), cotangent)
    return [x.detach() for x in (penalty, norms, first, *seconds, x_hat, *ends)]


NAMES = ["penalty", "norms", "first derivative", "second derivative", "derivative of the upstream factor", "x_hat",
         "derivative of real", "derivative of fake"]  # fmt: skip


def assert_equal_bits(results, expected):
    """Of `all_orders`, or of the first of its results."""
    for name, actual, expected_tensor in zip(NAMES[: len(results)], results, expected, strict=True):
        if not actual.equal(expected_tensor):  # False for NaN, which unwritten memory holds
            raise AssertionError(f"{name}: {differences(actual, expected_tensor, ~actual.eq(expected_tensor))}")


def captured(function, *inputs):
    """A CUDA graph of this function, warmed up on a stream of its own as torch asks, and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # autograd graphs of the warm-up, whose nodes belong to its stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    return graph, outputs
