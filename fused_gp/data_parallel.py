"""DistributedDataParallel waits for a gradient of every parameter, and a penalty alone does not give it one."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor

from . import graph
from .findings import Findings


def reach_all(penalty: Tensor, findings: Findings) -> Tensor:
    """The same penalty, with a gradient of zero for the parameters of the critic that it does not depend on.

    The bias of the last layer is one: the input gradient does not contain it. Its bucket would never be reduced, and
    the ranks' gradients would differ without a sign.
    """
    if findings.unreached is None:
        reached = {id(leaf) for leaf in graph.leaves_reached([penalty])}
        findings.unreached = [ref(p) for p in findings.parameters() if id(p) not in reached]
    missing = [p for p in (found() for found in findings.unreached) if p is not None and p.requires_grad]
    return Reach.apply(penalty, *missing) if missing else penalty


class Reach(torch.autograd.Function):
    """penalty + 0 * sum(parameters), without reading the parameters: 0 times their infinity would be NaN."""

    @staticmethod
    def forward(ctx: Any, penalty: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return penalty.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, *[torch.zeros_like(p) for p in ctx.parameters]
