"""The one place that decides in which way the penalty's gradient reaches the weights: method, chunks, grad mode."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import chunks, compiled, data_parallel, directional, double_backward, functional, reference
from .batch_norm import warn_of_batch_norm
from .evaluations import Evaluations
from .findings import Findings, findings_of, is_replicated, is_sharded
from .input_gradient import input_gradients
from .method import Method
from .question import Answer, Question


def penalise(
    question: Question, sources: Sequence[Tensor], points_of: Callable[..., list[Tensor]], method: Method
) -> Answer:
    """The penalty at the points that `points_of(sources, ops)` makes."""
    if question.ops is reference:
        return _traced(question, sources, points_of, method)
    findings = findings_of(question.critic)
    warn_of_batch_norm(findings)
    if not torch.is_grad_enabled():
        return _value(question, sources, points_of, findings, method.chunk_size)
    data_parallel.check(findings)
    if method.chunk_size is None:
        return _attached(question, points_of(sources, question.ops), findings, method)

    def differentiate(
        question: Question, points: list[Tensor], leaves: list[Tensor], upstream: Any
    ) -> tuple[Answer, Sequence[Tensor | None]]:
        if _name(question, points, findings, method) == "directional":
            return directional.differentiate(
                question, points, leaves, upstream, findings, method.step, method.allow_kinks
            )
        answer = _attached(question, points, findings, method)
        cotangent = torch.ones_like(answer.penalty) * upstream
        return answer, input_gradients((answer.penalty,), (cotangent,), leaves, False, False)

    return chunks.penalise(question, sources, points_of, method.chunk_size, findings, differentiate)


def _attached(question: Question, points: list[Tensor], findings: Findings, method: Method) -> Answer:
    """The penalty with the graph of its gradient."""
    match _name(question, points, findings, method):
        case "directional":
            return directional.penalise(question, points, findings, method.step, method.allow_kinks)
        case "compiled":
            return compiled.penalise(question, points, findings)
    return double_backward.penalise(question, points, findings, create_graph=True)


def _name(question: Question, points: list[Tensor], findings: Findings, method: Method) -> str:
    """The method's name; what "auto" means for this critic is found by trying, once."""
    if method.name != "auto":
        return method.name
    mode = findings.mode(points[0].device)
    if mode not in findings.chosen:
        leaves = [x.detach().requires_grad_() for x in points]
        with Evaluations(findings, points[0].device) as evaluations, evaluations.buffers.as_before():
            try:
                double_backward.penalise(evaluations.again(question), leaves, findings, create_graph=True)
                findings.chosen[mode] = "double_backward"
            except double_backward.OnlyOnce as obstacle:
                try:
                    directional.penalise(evaluations.again(question), leaves, findings, method.step, method.allow_kinks)
                except directional.Kinked as kinked:
                    raise ValueError(f"{obstacle} But {kinked}") from None
                findings.chosen[mode] = "directional"
    return findings.chosen[mode]


def _value(
    question: Question,
    sources: Sequence[Tensor],
    points_of: Callable[..., list[Tensor]],
    findings: Findings,
    chunk_size: int | None,
) -> Answer:
    """Under no_grad and inference_mode: the same value by every method, without a graph."""
    # The input gradient inside it still needs one for a while.
    with torch.inference_mode(False), torch.enable_grad():
        sources = [_outside_inference_mode(x).detach() for x in sources]
        # Labels made under inference_mode cannot be saved for a backward; their copies can.
        args, kwargs = tree_map_only(Tensor, _outside_inference_mode, (question.args, question.kwargs))
        question = question._replace(args=args, kwargs=kwargs)
        if chunk_size is None:
            answer = double_backward.penalise(question, points_of(sources, question.ops), findings, create_graph=False)
        else:
            answer = chunks.value(question, sources, points_of, chunk_size, findings)
    return answer._replace(penalty=answer.penalty.detach())


def _outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or its copy where it was made under inference_mode and could take no part in a graph."""
    return tensor.clone() if tensor.is_inference() else tensor


def _traced(
    question: Question, sources: Sequence[Tensor], points_of: Callable[..., list[Tensor]], method: Method
) -> Answer:
    """Inside torch.compile, torch.func and forward-mode autograd, where every exact method is the same."""
    if method.name == "directional" or method.chunk_size is not None:
        given = "method='directional'" if method.name == "directional" else f"chunk_size={method.chunk_size}"
        raise ValueError(
            f"{given} evaluates the critic step by step, and cannot be traced by torch.compile, torch.func or "
            "forward-mode autograd: leave it out, or call the penalty outside the compiled function"
        )
    compiled.refuse_hooks(is_replicated(question.critic) or is_sharded(question.critic))
    return functional.penalise(question, points_of(sources, reference))
