"""Critics under DDP and FSDP: what is refused, and the gradient that DDP waits for and a penalty does not give."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .autograd_graph import NotTwiceDifferentiable, reached_leaves
from .profile import CriticProfile


def refuse_static_graph(profile: CriticProfile) -> None:
    """With it, gradients would silently not be reduced. (So they are where a DDP's module is passed, not the DDP, and
    the penalty is alone in a backward; but nothing in the module shows that there is a DDP.)"""
    if any([ddp.static_graph for ddp in profile.replicas()]):
        raise ValueError(
            "critic must be a DistributedDataParallel without static_graph=True, got one with it: it takes the input "
            "gradient for the whole of the first backward, and would never reduce the weights' gradients"
        )


def refuse_sharded(profile: CriticProfile) -> None:
    """FSDP reduces in the first backward, where there is no gradient yet, even if it keeps the weights there."""
    if profile.sharded:
        raise NotTwiceDifferentiable(
            "FSDP, which frees the weights and reduces their gradients in the first backward, that of the input "
            "gradient",
            "method='directional'",
        )


def refuse_inside_graph(distributed: bool) -> None:
    """Of a graph that we compile, or the caller does."""
    if distributed:
        raise ValueError(
            "method='compiled' cannot reach the hooks of DDP and FSDP from inside its graph, got such a critic: use "
            "method='directional', or 'double_backward' under DDP, and leave the call out of torch.compile"
        )


def finds_unused_parameters(profile: CriticProfile) -> bool:
    """DDP itself looks for the parameters that the scores do not depend on, and expects no gradient of them."""
    return any(ddp.find_unused_parameters for ddp in profile.replicas())


def with_all_parameters(penalty: Tensor, scores: Tensor, profile: CriticProfile) -> Tensor:
    """The same penalty, with a gradient of zero for those parameters that DDP waits for and it does not depend on.

    The bias of the last layer is one: the input gradient does not contain it. Its bucket would never be reduced, and
    the ranks' gradients would silently differ.
    """
    replicas = profile.replicas()
    if not replicas:
        return penalty
    each_time = finds_unused_parameters(profile)  # for critics whose parameters in use change
    kind = "" if penalty.grad_fn is None else penalty.grad_fn.name()
    if kind not in profile.unreached or each_time:
        reached = {id(leaf) for leaf in reached_leaves([penalty])}
        used = {id(leaf) for leaf in reached_leaves([scores])} if each_time else set()
        parameters = [p for ddp in replicas for p in ddp.parameters() if not each_time or id(p) in used]
        profile.unreached[kind] = [ref(p) for p in parameters if id(p) not in reached]
    missing = [p for p in (found() for found in profile.unreached[kind]) if p is not None and p.requires_grad]
    return ZeroGradients.apply(penalty, *missing) if missing else penalty


class ZeroGradients(torch.autograd.Function):
    """penalty + 0 * sum(parameters), without reading the parameters: 0 times an infinite one would be NaN."""

    @staticmethod
    def forward(ctx: Any, penalty: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return penalty.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, *[torch.zeros_like(p) for p in ctx.parameters]
