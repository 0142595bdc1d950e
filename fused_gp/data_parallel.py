"""DistributedDataParallel waits for a gradient of every parameter, and a penalty alone does not give it one."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import graph
from .findings import Findings


def check(findings: Findings) -> None:
    """What DDP would leave unreduced without a word.

    So would a module of a DDP that is handed in instead of it, whose penalty is alone in a backward; but nothing of the
    module tells that there is a DDP.
    """
    if findings.replicas and any(ddp.static_graph for ddp in _replicas(findings)):
        raise ValueError(
            "critic must be a DistributedDataParallel without static_graph=True, got one with it: it takes the input "
            "gradient for the whole of the first backward, and would never reduce the weights' gradients"
        )


def finds_unused(findings: Findings) -> bool:
    """DDP looks itself for the parameters that the critic's scores do not reach, and wants no gradient of them."""
    return any(ddp.find_unused_parameters for ddp in _replicas(findings))


def reach_all(penalty: Tensor, scores: Tensor, findings: Findings) -> Tensor:
    """The same penalty, with a gradient of zero for those parameters that DDP waits for and it does not depend on.

    The bias of the last layer is one: the input gradient does not contain it. Its bucket would never be reduced, and
    the ranks' gradients would differ without a sign.
    """
    if not findings.replicas:
        return penalty
    anew = finds_unused(findings)  # for critics that take another way each time
    kind = "" if penalty.grad_fn is None else penalty.grad_fn.name()
    if kind not in findings.unreached or anew:
        reached = {id(leaf) for leaf in graph.leaves_reached([penalty])}
        used = {id(leaf) for leaf in graph.leaves_reached([scores])} if anew else set()
        parameters = [p for ddp in _replicas(findings) for p in ddp.parameters() if not anew or id(p) in used]
        findings.unreached[kind] = [ref(p) for p in parameters if id(p) not in reached]
    missing = [p for p in (found() for found in findings.unreached[kind]) if p is not None and p.requires_grad]
    return Reach.apply(penalty, *missing) if missing else penalty


def _replicas(findings: Findings) -> list[DistributedDataParallel]:
    return [ddp for ddp in (found() for found in findings.replicas) if ddp is not None]


class Reach(torch.autograd.Function):
    """penalty + 0 * sum(parameters), without reading the parameters: 0 times their infinity would be NaN."""

    @staticmethod
    def forward(ctx: Any, penalty: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return penalty.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, *[torch.zeros_like(p) for p in ctx.parameters]
