"""The split of a compiled penalty into forward and backward: the whole gradient is computed in the forward.

Where the penalty is a scalar, its gradient is known up to the upstream factor. In the compiler's own split, the forward
saves for the backward what two derivatives need; in one graph, that memory is freed on the way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch.partitioners import _extract_fwd_bwd_modules, min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class GradientInForward(CustomPartitionerFn):
    """Splits AOTAutograd's joint graph of outputs and gradients into forward and backward.

    The compiler's own split is used where there is not one upstream factor (reduction="none"), where small gradients
    need it on their way (in fp16, unless the penalty is `scaled` already), or where it lies on another device than some
    of the gradients.
    """

    def __init__(self, scaled: bool) -> None:
        self.scaled = scaled

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        graph, count = gm.graph, kwargs["num_fwd_outputs"]
        tangents = [node for node in graph.find_nodes(op="placeholder") if not node.name.startswith("primals")]
        factors = [getattr(node.meta["val"], "ndim", None) == 0 for node in tangents]
        half = any(getattr(node.meta.get("val"), "dtype", None) == torch.float16 for node in graph.nodes)
        (output,) = graph.find_nodes(op="output")
        multiplied = [node for node in (*tangents, *tree_leaves(output.args)[count:]) if isinstance(node, Node)]
        if factors != [True] or (half and not self.scaled) or len({node.meta["val"].device for node in multiplied}) > 1:
            return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

        # Gradients for an upstream factor of 1, which the backward multiplies.
        (upstream,) = tangents
        with graph.inserting_after(upstream):
            like = upstream.meta["val"]
            one = graph.call_function(aten.full.default, ([], 1.0), {"dtype": like.dtype, "device": like.device})
        one.meta = dict(upstream.meta)
        upstream.replace_all_uses_with(one)
        outputs = tree_leaves(output.args)
        gradients = [node for node in dict.fromkeys(outputs[count:]) if isinstance(node, Node)]
        with graph.inserting_before(output):
            products = {node: graph.call_function(aten.mul.Tensor, (node, upstream)) for node in gradients}
        for gradient, product in products.items():
            product.meta = dict(gradient.meta)  # of one memory, which torch then does not donate: retain_graph=True
        output.args = ([*outputs[:count], *[products.get(node) for node in outputs[count:]]],)
        return _extract_fwd_bwd_modules(gm, gradients, [], num_fwd_outputs=count)

    def uuid(self) -> Any:
        """What the key of the compiler's cache has of it."""
        return get_hash_for_files((__file__,)), self.scaled
