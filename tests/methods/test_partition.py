"""The gradient of a compiled penalty is computed in its forward, and only gradients are saved for the backward."""

import pytest
import torch

from fused_gp import fused_gradient_penalty
from fused_gp.critics import autograd_graph
from fused_gp.methods.partition import GradientInForward
from tests.support.compiling import COMPILES
from tests.support.critics import mlp
from tests.support.samples import vectors

pytestmark = [pytest.mark.usefixtures("one_thread", "no_graph_breaks"), *COMPILES]


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "lambda"])
@pytest.mark.parametrize("batch", [5, 6])
def test_only_one_gradient_per_parameter_is_saved(compiled_graphs, wrap, batch):
    """All other activations of the two derivatives are freed when the call returns, at the first batch size and at
    others."""
    critic = mlp().double()
    for size in (5, batch):
        penalty = fused_gradient_penalty(wrap(critic), *vectors(size), method="compiled")
    graph_nodes = [node for node in autograd_graph.nodes([penalty]) if hasattr(node, "saved_tensors")]
    (compiled,) = (node for node in graph_nodes if "CompiledFunction" in node.name())
    weights = [critic[0].weight, critic[0].bias, critic[2].weight]  # the last bias has no part in the penalty
    assert sorted(t.shape for t in compiled.saved_tensors) == sorted(w.shape for w in weights)
    assert not {t.data_ptr() for t in compiled.saved_tensors} & {w.data_ptr() for w in weights}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_on_another_device_stay_in_the_backward(device):
    """The upstream factor of the penalty cannot multiply them; the compiler partitions such a graph in its usual
    way."""
    nodes = torch.fx.Graph()
    weight, upstream = nodes.placeholder("primals_1"), nodes.placeholder("tangents_1")
    penalty = nodes.call_function(torch.ops.aten.sum.default, (weight,))
    gradient = nodes.call_function(torch.ops.aten.mul.Tensor, (weight, upstream))
    nodes.output([penalty, gradient])
    for node in nodes.nodes:
        node.meta["val"] = torch.ones(3, device=device) if node in (weight, gradient) else torch.ones(())
    _, backward = GradientInForward(False)(torch.fx.GraphModule({}, nodes), [], num_fwd_outputs=1)
    (product,) = backward.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert (product.args[0].name == weight.name) == (device == "meta")
