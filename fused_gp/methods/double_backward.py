"""method="double_backward": autograd twice, through the graph of the input gradient. Exact."""

from collections.abc import Sequence

from torch import Tensor

from ..critics import autograd_graph, data_parallel
from ..critics.critic import Critic
from ..critics.profile import CriticProfile
from ..ops.norm_penalty import norm_penalty_rows
from .critic_call import CriticCall, PenaltyResult, independent_scores_error
from .input_gradients import Tensors, cotangent, input_gradients


def compute_penalty(call: CriticCall, points: Sequence[Tensor], critic: Critic, create_graph: bool) -> PenaltyResult:
    """Run the critic once at these points. An error is raised here where the penalty's gradient would not exist."""
    for x in points:
        if not x.requires_grad:
            x.requires_grad_()
    scores = call.scores(points)
    profile = critic.profile
    ones = cotangent(scores, call.grad_scale)
    if create_graph:
        data_parallel.refuse_static_graph(profile)
        data_parallel.refuse_sharded(profile)
        found = twice_differentiable_gradients((scores,), (ones,), points, profile)
    else:
        found = input_gradients((scores,), (ones,), points, False, False)
    gradients = [g for g in found if g is not None]
    if not gradients:
        raise independent_scores_error()
    penalty, norms = norm_penalty_rows(gradients, call.form, call.ops)
    if create_graph:
        penalty = data_parallel.with_all_parameters(penalty, scores, profile)
    return PenaltyResult(penalty, norms)


def twice_differentiable_gradients(
    outputs: Tensors, cotangents: Tensors, points: Sequence[Tensor], profile: CriticProfile
) -> list[Tensor | None]:
    """The input gradients with their graph, which is checked once for each mode of the critic."""
    mode = profile.mode(points[0].device)
    if mode in profile.twice_differentiable:
        return input_gradients(outputs, cotangents, points, True, True)
    gradients = checked_input_gradients(outputs, cotangents, points)
    profile.twice_differentiable[mode] = True
    return gradients


def checked_input_gradients(outputs: Tensors, cotangents: Tensors, points: Sequence[Tensor]) -> list[Tensor | None]:
    """The input gradients with their graph, if it reaches the weights."""
    if autograd_graph.once_differentiable_node(autograd_graph.nodes(outputs)):  # the points may not reach it
        between = autograd_graph.nodes_between(outputs, points)
        autograd_graph.refuse_reentrant(between)
        if found := autograd_graph.once_differentiable_node(between):
            raise autograd_graph.NotTwiceDifferentiable(*found)
    gradients = input_gradients(outputs, cotangents, points, True, True)
    if found := autograd_graph.missing_derivative(gradients, points):
        raise autograd_graph.NotTwiceDifferentiable(*found)
    return gradients
