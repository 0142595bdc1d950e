"""The gradient of scores with respect to the points they were given for."""

from collections.abc import Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward


def input_gradients(
    outputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    inputs: Sequence[Tensor],
    create_graph: bool,
    retain_graph: bool,
) -> list[Tensor | None]:
    """d sum_k <cotangent_k, output_k> / d input; None for inputs that the outputs do not depend on."""
    attached = [output.requires_grad for output in outputs]
    if not any(attached):
        return [None] * len(inputs)
    if not all(attached):
        outputs, cotangents = tuple(compress(outputs, attached)), tuple(compress(cotangents, attached))
    # What torch.autograd.grad calls when it has checked its arguments. Ours are right by construction, and checking
    # them takes longer than all that the penalty itself does at small sizes.
    return _engine_run_backward(  # type: ignore[return-value]
        outputs, cotangents, retain_graph, create_graph, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )


def gradient_of_first(scores: Tensor, points: Sequence[Tensor], rows: int, retain_graph: bool) -> tuple[bool, bool]:
    """Whether the scores of the first row depend on its own points, and on those of other rows."""
    first = scores.reshape(rows, -1)[0]
    found = input_gradients((first,), (torch.ones_like(first),), points, False, retain_graph)
    by_row = [gradient.reshape(rows, -1) for gradient in found if gradient is not None]
    return any(bool(g[0].any()) for g in by_row), any(bool(g[1:].any()) for g in by_row)


def add_up(sums: list[Tensor | None], gradients: Iterable[Tensor | None]) -> None:
    """Not in place: autograd may have given one tensor to two inputs."""
    for index, gradient in enumerate(gradients):
        so_far = sums[index]
        if gradient is not None:
            sums[index] = gradient if so_far is None else so_far + gradient


def cotangent(output: Tensor, grad_scale: float | Tensor | None, weight: float | Tensor = 1.0) -> Tensor:
    """That under which the gradient is the one of the output's weighted sum times grad_scale.

    Scaling here instead of multiplying the output costs no node in the graph.
    """
    ones = torch.ones_like(output)
    if isinstance(weight, Tensor) or weight != 1:
        ones = (ones * weight).to(output.dtype)
    return ones if grad_scale is None else ones * grad_scale
