"""method="compiled": the penalty of one critic, compiled whole and kept for the next call. Exact."""

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import functional, graph, reference
from .evaluations import Evaluations
from .findings import Findings
from .form import PenaltyForm
from .question import Answer, Question, unrelated


class Kept:
    """One penalty at samples of one shape. The batch size that came first has a graph of its own, at static speed, all
    others share one in which it is a variable."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.fixed = torch.compile(_fresh(_penalise), fullgraph=True, dynamic=False)
        self.variable = torch.compile(_fresh(_penalise), fullgraph=True)


def penalise(question: Question, points: Sequence[Tensor], findings: Findings) -> Answer:
    """Exact, and differentiable once."""
    if findings.sharded or findings.replicas:
        raise ValueError(
            "method='compiled' cannot reach the hooks of DDP and FSDP from inside its graph, got such a critic: use "
            "method='directional', or 'double_backward' under DDP"
        )
    form, batch = question.form, points[0].shape[0]
    # Weight and grad_scale may change from step to step, and stay outside, or come in as a tensor.
    plain = form._replace(rows=1, scale=1.0, kappa=None)
    group = batch // form.rows
    key = (plain, group, question.structure, tuple((x.shape[1:], x.dtype) for x in points))
    kept = findings.compiled.get(key)
    if kept is None:
        _check_dependence(question, points)
        kept = findings.compiled[key] = Kept(batch)
    args, kwargs = question.args, question.kwargs
    if batch == kept.batch:
        run = kept.fixed
    else:
        run = kept.variable
        points, args, kwargs = tree_map_only(Tensor, lambda t: _of_any_batch(t, batch), (list(points), args, kwargs))
    scale = question.grad_scale
    if scale is not None:
        scale = torch.as_tensor(scale, device=points[0].device)
    try:
        penalty, norms = run(question.critic, points, question.structure, args, kwargs, scale, plain, group)
    except torch._dynamo.exc.Unsupported as error:
        raise ValueError(
            "method='compiled' needs a critic that torch.compile can compile whole, got one that it cannot: "
            + str(error).strip().splitlines()[0]
        ) from error
    return Answer(penalty * form.scale, norms)


def _penalise(
    critic: Any,
    points: list[Tensor],
    structure: Any,
    args: Any,
    kwargs: Any,
    grad_scale: Tensor | None,
    form: PenaltyForm,
    group: int,
) -> tuple[Tensor, Tensor]:
    form = form._replace(rows=len(points[0]) // group, kappa=None if grad_scale is None else 1 / grad_scale.float())
    answer = functional.penalise(Question(critic, structure, args, kwargs, grad_scale, form, reference), points)
    return answer.penalty, answer.norms


def _fresh(function: Any) -> FunctionType:
    """The same function with code of its own: torch.compile keeps what it compiled with the code, so that one critic's
    graphs neither count against another's nor outlive their owner."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _of_any_batch(tensor: Tensor, batch: int) -> Tensor:
    """The tensor, or where the batch is in front a view of it, on which the compiler finds that noted."""
    if tensor.ndim == 0 or tensor.shape[0] != batch:
        return tensor
    tensor = tensor.view_as(tensor)
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


def _check_dependence(question: Question, points: Sequence[Tensor]) -> None:
    """A compiled function cannot tell zero from nothing, so look at the critic's own graph once."""
    evaluations = Evaluations(question.critic, points[0].device)
    leaves = [x.detach().requires_grad_() for x in points]
    with torch.enable_grad():
        if not graph.nodes_between(evaluations.again(question).scores(leaves), leaves):
            raise unrelated()
    evaluations.rewind()
