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

    def __init__(self, culprit: str, remedy: str) -> None:
        super().__init__(
            f"method='double_backward' must differentiate the critic twice, and found {culprit}. Use {remedy}."
        )
        self.culprit = culprit


def penalise(question: Question, points: Sequence[Tensor], findings: Findings, create_graph: bool) -> Answer:
    """Run the critic once at these points. Where the gradient of the penalty would not exist, say so now."""
    if create_graph and findings.sharded:
        # Kept, by reshard_after_forward=False and set_reshard_after_backward(False), they still get no gradient: FSDP
        # reduces in the first backward, that of the input gradient, where there is none yet.
        raise OnlyOnce(
            "FSDP, which frees the weights and reduces their gradients in the first backward, that of the input "
            "gradient",
            "method='directional'",
        )
    for x in points:
        if not x.requires_grad:
            x.requires_grad_()
    scores = question.scores(points)
    ones = cotangent(scores, question.grad_scale)
    if create_graph:
        found = twice_differentiable((scores,), (ones,), points, findings)
    else:
        found = input_gradients((scores,), (ones,), points, False, False)
    gradients = [g for g in found if g is not None]
    if not gradients:
        raise unrelated()
    penalty, norms = penalise_rows(gradients, question.form, question.ops)
    return Answer(data_parallel.reach_all(penalty, scores, findings) if create_graph else penalty, norms)


def twice_differentiable(
    outputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], points: Sequence[Tensor], findings: Findings
) -> list[Tensor | None]:
    """The input gradients with a graph of their own, which is looked at once to see that it leads to the weights."""
    mode = findings.mode(points[0].device)
    unproven = mode not in findings.twice
    if unproven and graph.obstacle(graph.nodes(outputs)):  # which may be one that the points do not go through
        between = graph.nodes_between(outputs, points)
        graph.refuse_reentrant(between)
        if found := graph.obstacle(between):
            raise OnlyOnce(*found)
    gradients = input_gradients(outputs, cotangents, points, True, True)
    if unproven:
        if found := graph.dead_end(gradients, points):
            raise OnlyOnce(*found)
        findings.twice.add(mode)
    return gradients
