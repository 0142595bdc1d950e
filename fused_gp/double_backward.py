"""method="double_backward": autograd twice, through the graph of the input gradient. Exact."""

from collections.abc import Sequence

from torch import Tensor

from . import data_parallel, graph
from .findings import Findings
from .input_gradient import cotangent, input_gradients
from .norm_penalty import penalise_rows
from .question import Answer, Question, unrelated


class OnlyOnce(ValueError):
    """The critic cannot be differentiated twice."""


def penalise(question: Question, points: Sequence[Tensor], findings: Findings, create_graph: bool) -> Answer:
    """Run the critic once at these points. Where the gradient of the penalty would not exist, say so now."""
    if create_graph and findings.sharded:
        # Kept, by reshard_after_forward=False and set_reshard_after_backward(False), they still get no gradient: FSDP
        # reduces in the first backward, that of the input gradient, where there is none yet.
        raise OnlyOnce(
            _message(
                "FSDP, which frees the weights and reduces their gradients in the first backward, that of the input "
                "gradient",
                "method='directional'",
            )
        )
    for x in points:
        if not x.requires_grad:
            x.requires_grad_()
    scores = question.scores(points)
    unproven = create_graph and not findings.twice
    if unproven and (found := graph.obstacle(graph.nodes_between(scores, points))):
        raise OnlyOnce(_message(*found))
    ones = cotangent(scores, question.grad_scale)
    gradients = [g for g in input_gradients((scores,), (ones,), points, create_graph, create_graph) if g is not None]
    if not gradients:
        raise unrelated()
    if unproven:
        if found := graph.dead_end(gradients, points):
            raise OnlyOnce(_message(*found))
        findings.twice = True
    penalty, norms = penalise_rows(gradients, question.form, question.ops)
    return Answer(data_parallel.reach_all(penalty, scores, findings) if create_graph else penalty, norms)


def _message(culprit: str, remedy: str) -> str:
    return f"method='double_backward' must differentiate the critic twice, and found {culprit}. Use {remedy}."
