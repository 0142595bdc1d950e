"""The one place that decides how the penalty's gradient reaches the weights: by method, chunks and grad mode."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map_only

from .. import reference
from ..critics.autograd_graph import NotTwiceDifferentiable
from ..critics.batch_norm import warn_of_batch_norm
from ..critics.critic import Critic
from ..form import Method
from . import chunks, compiled, directional, double_backward, traced
from .critic_call import CriticCall, PenaltyPoints, PenaltyResult
from .input_gradients import input_gradients


def compute_penalty(call: CriticCall, points: PenaltyPoints, method: Method) -> PenaltyResult:
    """The penalty, with the graph of its gradient where gradients are enabled."""
    if call.ops is reference:
        return traced.compute_penalty(call, points, method)
    critic = Critic(call.critic)
    if critic.known:
        warn_of_batch_norm(critic.profile)
    if not critic.trusted:
        call = call._replace(critic=critic)  # which watches its run
    if not torch.is_grad_enabled():
        result = _value_only(call, points, critic, method.chunk_size)
    elif method.chunk_size is None:
        result = _with_graph(call, points.build(points.batch, call.ops), critic, method)
    else:
        result = chunks.compute_penalty(call, points, method, critic, _penalty_and_gradients)
    if not critic.trusted:
        warn_of_batch_norm(critic.profile)  # of what the run has shown
    return result


def _with_graph(call: CriticCall, points: list[Tensor], critic: Critic, method: Method) -> PenaltyResult:
    """The penalty as a tensor with a graph."""
    name = _resolved(call, points, critic, method)
    if method.name in ("auto", "directional") and not isinstance(critic.function, Module):
        call = call._replace(critic=critic)  # watched, since it may be another critic now, with other buffers
    match name:
        case "directional":
            return directional.compute_penalty(call, points, critic, method)
        case "compiled":
            return compiled.compute_penalty(call, points, critic)
    return double_backward.compute_penalty(call, points, critic, create_graph=True)


def _penalty_and_gradients(
    call: CriticCall, points: list[Tensor], leaves: list[Tensor], upstream: Any, critic: Critic, method: Method
) -> tuple[PenaltyResult, Sequence[Tensor | None]]:
    """The penalty, and upstream times its gradient with respect to the leaves."""
    if _resolved(call, points, critic, method) == "directional":
        return directional.penalty_and_gradients(call, points, leaves, upstream, critic, method)
    result = _with_graph(call, points, critic, method)
    cotangent = torch.ones_like(result.penalty) * upstream
    return result, input_gradients((result.penalty,), (cotangent,), leaves, False, False)


def _resolved(call: CriticCall, points: list[Tensor], critic: Critic, method: Method) -> str:
    """The method's name. What "auto" stands for with this critic is found by trying, once for each of its modes."""
    if method.name not in ("auto", "compiled"):
        return method.name
    device = points[0].device
    if not critic.known or (method.name == "auto" and critic.profile.mode(device) not in critic.profile.chosen):
        call._replace(critic=critic.look).scores([x.detach().requires_grad_() for x in points])
    if method.name == "compiled":
        return method.name
    mode, chosen = critic.profile.mode(device), critic.profile.chosen
    if mode not in chosen:
        leaves = [x.detach().requires_grad_() for x in points]
        with critic.state(device) as state, state.buffers.restored():
            try:
                double_backward.compute_penalty(call.again(state), leaves, critic, create_graph=True)
                chosen[mode] = "double_backward"
            except NotTwiceDifferentiable as error:
                try:
                    directional.compute_penalty(call.again(state), leaves, critic, method)
                except directional.NotSmooth as not_smooth:
                    raise ValueError(f"{error} But {not_smooth}") from None
                chosen[mode] = "directional"
    return chosen[mode]


def _value_only(call: CriticCall, points: PenaltyPoints, critic: Critic, chunk_size: int | None) -> PenaltyResult:
    """Under no_grad and inference_mode: the same value by every method, without a graph."""
    # The input gradient needs a graph for as long as it is taken.
    with torch.inference_mode(False), torch.enable_grad():
        points = points._replace(batch=[_outside_inference_mode(x).detach() for x in points.batch])
        # Labels made under inference_mode cannot be saved for a backward; their copies can.
        args, kwargs = tree_map_only(Tensor, _outside_inference_mode, (call.args, call.kwargs))
        call = call._replace(args=args, kwargs=kwargs)
        if chunk_size is None:
            built = points.build(points.batch, call.ops)
            result = double_backward.compute_penalty(call, built, critic, create_graph=False)
        else:
            result = chunks.compute_value(call, points, chunk_size, critic)
    return result._replace(penalty=result.penalty.detach())


def _outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or its copy where it was made under inference_mode and cannot be part of a graph."""
    return tensor.clone() if tensor.is_inference() else tensor
