"""What autograd's graph shows of a critic: kinks, what cannot be differentiated twice, the leaves that are reached."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

# Operations whose derivative is discontinuous, by the names of their nodes without "Backward" and a number.
KINKS = (
    "Relu", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Threshold", "Hardtanh", "Hardswish", "Hardsigmoid",
    "Softshrink", "Hardshrink", "Abs", "Clamp", "ClampMin", "ClampMax", "Max", "Min", "Maximum", "Minimum", "Fmax",
    "Fmin", "Amax", "Amin", "Aminmax", "Sort", "Topk", "Kthvalue", "Median", "Nanmedian", "Cummax", "Cummin",
    "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "FractionalMaxPool2D",
    "FractionalMaxPool3D", "Fmod", "Remainder", "Floor", "Ceil", "Round", "Trunc", "Frac", "Sign", "Sgn", "Copysign",
)  # fmt: skip
# Those that have a kink with some options, and the attribute in which their nodes save the option.
ORDERS = {"LinalgVectorNorm": "_saved_ord", "Dist": "_saved_p", "Cdist": "_saved_p", "Pdist": "_saved_p"}
REDUCTIONS = ("ScatterReduce", "IndexReduce", "SegmentReduce")

# The node of a whole compiled graph, and that of reentrant checkpointing.
COMPILED = "CompiledFunctionBackward"
REENTRANT = "CheckpointFunctionBackward"

# The nodes that autograd puts where a backward has no derivative, and one whose own derivative is nothing but an error.
NO_DERIVATIVE = ("torch::autograd::NotImplemented", "torch::autograd::Error", "CudnnRnnBackwardBackward0")

_once_differentiable_code = once_differentiable(lambda ctx, *grads: grads).__code__


class NotTwiceDifferentiable(ValueError):
    """The critic can be differentiated once only."""

    def __init__(self, culprit: str, remedy: str) -> None:
        super().__init__(
            f"method='double_backward' must differentiate the critic twice, and found {culprit}. Use {remedy}."
        )
        self.culprit, self.remedy = culprit, remedy


def nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graph behind these outputs."""
    stack = [output.grad_fn for output in outputs]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions]


def nodes_between(outputs: Iterable[Tensor], points: Sequence[Tensor]) -> list[Any]:
    """The nodes on the way from the points to the outputs: a kink in the embedding of a label is not one in x."""
    children: dict[Any, list[Any]] = {}
    for node in nodes(outputs):
        for parent, _ in node.next_functions:
            children.setdefault(parent, []).append(node)
    between = []
    seen = set()
    with torch._C.DisableTorchFunctionSubclass():  # for a tensor subclass it would be the node of a view
        stack = [get_gradient_edge(x).node for x in points]
    while stack:
        for child in children.get(stack.pop(), ()):
            if child not in seen:
                seen.add(child)
                between.append(child)
                stack.append(child)
    return between


def kink(between: Sequence[Any]) -> str | None:
    """The name of an operation with a kink among these nodes."""
    for node in between:
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if name in KINKS:
            return name
        # SELU and ELU are one operation; smooth where both sides have one slope at zero.
        if name == "Elu" and node._saved_alpha * node._saved_input_scale != 1:
            return "Elu with two slopes at zero (SELU, or alpha other than 1)"
        if name in ORDERS and (order := getattr(node, ORDERS[name])) in (0, 1, math.inf, -math.inf):
            return f"{name} of order {order:g}"
        if name in REDUCTIONS and node._saved_reduce in ("amax", "amin", "max", "min"):
            return f"{name} with {node._saved_reduce}"
    return None


def dtypes(between: Sequence[Any]) -> set[torch.dtype]:
    """The types of the outputs of these nodes."""
    return {output.dtype for node in between for output in node._input_metadata if output is not None}


def refuse_reentrant(between: Iterable[Any]) -> None:
    """Through such a checkpoint no input gradient can be taken, not even once."""
    if any(node.name() == REENTRANT for node in between):
        raise ValueError(
            "critic must not use reentrant checkpointing, through which no input gradient can be taken. Use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def once_differentiable_node(between: Iterable[Any]) -> tuple[str, str] | None:
    """A node of the scores' graph that cannot be differentiated twice, as far as its name tells, and a remedy."""
    for node in between:
        name = node.name()
        if name == REENTRANT:
            return "reentrant checkpointing", "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        if name == COMPILED:
            return (
                "a part that torch.compile compiled",
                "method='compiled', or, where the critic is smooth, method='directional'",
            )
        function = getattr(node, "_forward_cls", None)  # of nodes written in Python
        if function is not None and getattr(function.backward, "__code__", None) is _once_differentiable_code:
            return (
                f"the autograd Function {function.__name__}, whose backward is once_differentiable",
                "method='directional' where the critic is smooth",
            )
    return None


def missing_derivative(gradients: Sequence[Tensor | None], points: Sequence[Tensor]) -> tuple[str, str] | None:
    """The operation without a second derivative, found by a backward through the graph of the input gradients, in
    autograd's own words; and a remedy."""
    attached = [g for g in gradients if g is not None and g.requires_grad]
    if not any(node.name() in NO_DERIVATIVE for node in nodes(attached)):
        return None
    leaves = [*points, *reached_leaves(attached)]
    try:
        torch.autograd.grad(attached, leaves, [torch.ones_like(g) for g in attached], True, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        words = str(error).splitlines()[0].rstrip(".")
        remedy = "method='directional' where the critic is smooth"
        if "cudnn_rnn" in words:
            remedy += ", or torch.backends.cudnn.flags(enabled=False)"
        if "attention" in words:
            remedy += ", or math attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        return f'an operation of which autograd says "{words}"', remedy
    return None  # no gradient passes through it


def reached_leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves that get a gradient in a backward from these outputs."""
    return (node.variable for node in nodes(outputs) if node.name() == "torch::autograd::AccumulateGrad")
