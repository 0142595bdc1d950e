"""For tests in which torch's compiler runs: their marks, a backend that records graphs, and method="compiled"."""

import pytest
import torch
from torch import nn

from fused_gp import fused_gradient_penalty, reference
from tests.support.critics import mlp
from tests.support.gradients import gradients
from tests.support.tolerances import assert_same

# The warnings come from the compiler itself; it hides the first one unless warnings are errors.
COMPILES = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # in fp64 as well
]


class Graphs:
    """A backend of torch.compile that runs graphs eagerly, and records of each whether its sizes have symbols."""

    def __init__(self):
        self.symbolic = []

    def __call__(self, graph, inputs, options=None):
        sizes = [size for x in inputs if isinstance(x, torch.Tensor) for size in x.shape]
        self.symbolic.append(any(isinstance(size, torch.SymInt) for size in [*inputs, *sizes]))
        if options is None:
            return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, inputs)
        from torch._dynamo.backends.common import aot_autograd
        from torch._dynamo.backends.debugging import boxed_nop

        # The same, with a split of forward and backward that is not the usual one.
        split = options["custom_partitioner_fn"]
        aot_eager = aot_autograd(fw_compiler=boxed_nop, partition_fn=split, keep_inference_input_mutations=True)
        return aot_eager(graph, inputs)


class WithForward(nn.Module):
    """A critic whose forward is a function of its network and the samples."""

    def __init__(self, run, net=None):
        super().__init__()
        self.net = mlp().double() if net is None else net
        self.run = run

    def forward(self, *args, **kwargs):
        return self.run(self.net, *args, **kwargs)


def assert_exact_of(critic, real, fake, **options):
    """Value and weight gradients of this critic itself, not of a copy."""
    ours = fused_gradient_penalty(critic, real, fake, alpha=0.5, method="compiled", **options)
    expected = reference.fused_gradient_penalty(critic, real, fake, alpha=0.5, **options)
    weights = [p for p in critic.parameters() if p.requires_grad]
    assert_same((ours, *gradients(ours, weights)), (expected, *gradients(expected, weights)))
