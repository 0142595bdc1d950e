"""From a critic and the points it is asked about to the penalty on its input gradient there."""

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_map_only

from . import arguments
from .form import PenaltyForm
from .norm_penalty import penalise_rows


def penalise_critic(
    critic: Callable[..., Any],
    points: list[Tensor],
    structure: arguments.Structure,
    critic_args: Sequence[Any],
    critic_kwargs: Mapping[str, Any] | None,
    grad_scale: float | Tensor | None,
    form: PenaltyForm,
    ops: Any,
) -> tuple[Tensor, Tensor]:
    """Run the critic once at these points: penalty and norms. Under no_grad and inference_mode, values alone."""
    if torch.is_grad_enabled():
        return _penalise(critic, points, structure, critic_args, critic_kwargs, grad_scale, form, ops, True)
    # The penalty is a value then, but the input gradient inside it still needs a graph for a while.
    with torch.inference_mode(False), torch.enable_grad():
        points = [outside_inference_mode(x).detach() for x in points]
        # Labels made under inference_mode cannot be saved for a backward; their copies can.
        critic_args, critic_kwargs = tree_map_only(Tensor, outside_inference_mode, (critic_args, critic_kwargs))
        penalty, norms = _penalise(critic, points, structure, critic_args, critic_kwargs, grad_scale, form, ops, False)
    return penalty.detach(), norms


def _penalise(
    critic: Callable[..., Any],
    points: list[Tensor],
    structure: arguments.Structure,
    critic_args: Sequence[Any],
    critic_kwargs: Mapping[str, Any] | None,
    grad_scale: float | Tensor | None,
    form: PenaltyForm,
    ops: Any,
    create_graph: bool,
) -> tuple[Tensor, Tensor]:
    versions = []
    for x in points:
        if not x.requires_grad:
            x.requires_grad_()
        versions.append(x._version)
    scores = critic(arguments.rebuilt(points, structure), *critic_args, **(critic_kwargs or {}))
    arguments.scores(scores, form.rows)
    for x, version in zip(points, versions, strict=True):
        if x._version != version:  # the gradient would be that with respect to what the critic made of it
            raise ValueError(
                "critic must leave its input as it is, got one that changes it in place: inplace=True first?"
            )
    gradients = input_gradients((scores,), (cotangent(scores, grad_scale),), points, create_graph, create_graph)
    if not gradients:
        raise ValueError(
            "critic must return scores that depend on the samples it is given, got scores that do not: "
            "is there a detach() or no_grad() inside it?"
        )
    return penalise_rows(gradients, form, ops)


def input_gradients(
    outputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    inputs: Sequence[Tensor],
    create_graph: bool,
    retain_graph: bool,
) -> list[Tensor]:
    """d sum_k <cotangent_k, output_k> / d input, of those inputs that the outputs depend on: the others' is zero."""
    attached = [output.requires_grad for output in outputs]
    if not any(attached):
        return []
    if not all(attached):
        outputs, cotangents = tuple(compress(outputs, attached)), tuple(compress(cotangents, attached))
    # What torch.autograd.grad calls when it has checked its arguments. Ours are right by construction, and checking
    # them takes longer than all that the penalty itself does at small sizes.
    gradients = _engine_run_backward(
        outputs, cotangents, retain_graph, create_graph, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )
    return [gradient for gradient in gradients if gradient is not None]


def cotangent(output: Tensor, grad_scale: float | Tensor | None, weight: float | Tensor = 1.0) -> Tensor:
    """That under which the gradient is the one of the output's weighted sum times grad_scale.

    Scaling here instead of multiplying the output costs no node in the graph.
    """
    ones = torch.ones_like(output)
    if isinstance(weight, Tensor) or weight != 1:
        ones = (ones * weight).to(output.dtype)
    return ones if grad_scale is None else ones * grad_scale


def outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or its copy where it was made under inference_mode and could take no part in a graph."""
    return tensor.clone() if tensor.is_inference() else tensor
