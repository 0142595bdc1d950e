"""The gradient of scores with respect to the points at which they were computed."""

from collections.abc import Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

Tensors = tuple[Tensor, ...]


def input_gradients(
    outputs: Tensors, cotangents: Tensors, inputs: Sequence[Tensor], create_graph: bool, retain_graph: bool
) -> list[Tensor | None]:
    """d sum_k <cotangent_k, output_k> / d input; None for inputs that the outputs do not depend on."""
    attached = [output.requires_grad for output in outputs]
    if not any(attached):
        return [None] * len(inputs)
    if not all(attached):
        outputs, cotangents = tuple(compress(outputs, attached)), tuple(compress(cotangents, attached))
    # What torch.autograd.grad calls after checking its arguments. Ours are valid by construction, and the checks take
    # longer than the penalty itself at small sizes.
    return _engine_run_backward(  # type: ignore[return-value]
        outputs, cotangents, retain_graph, create_graph, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )


def first_row_dependence(scores: Tensor, points: Sequence[Tensor], rows: int, retain_graph: bool) -> tuple[bool, bool]:
    """Whether the scores of the first row depend on its own points, and on those of other rows."""
    first = scores.reshape(rows, -1)[0]
    found = input_gradients((first,), (torch.ones_like(first),), points, False, retain_graph)
    by_row = [gradient.reshape(rows, -1) for gradient in found if gradient is not None]
    return any(bool(g[0].any()) for g in by_row), any(bool(g[1:].any()) for g in by_row)


def accumulate(sums: list[Tensor | None], gradients: Iterable[Tensor | None]) -> None:
    """Add the gradients to the sums; None is zero. Not in place: autograd may have given one tensor to two inputs."""
    for index, gradient in enumerate(gradients):
        total = sums[index]
        if gradient is not None:
            sums[index] = gradient if total is None else total + gradient


def cotangent(output: Tensor, grad_scale: float | Tensor | None, weight: float | Tensor = 1.0) -> Tensor:
    """The cotangent with which the gradient is that of the output's weighted sum times grad_scale.

    Scaling it instead of the output costs no node in the graph.
    """
    ones = torch.ones_like(output)
    if isinstance(weight, Tensor) or weight != 1:
        ones = (ones * weight).to(output.dtype)
    return ones if grad_scale is None else ones * grad_scale
