"""The call of a critic, the penalty that came of it, and the errors that all methods share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments, reference
from ..critics.state import CriticState
from ..form import PenaltyForm


class CriticCall(NamedTuple):
    """Everything but the points, validated. `structure` is that of the critic's first argument."""

    critic: Callable[..., Any]
    structure: arguments.Structure
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    grad_scale: float | Tensor | None
    form: PenaltyForm
    ops: Any

    def scores(self, points: Sequence[Tensor]) -> Tensor:
        """Run the critic once."""
        versions = [] if self.ops is reference else [x._version for x in points]
        scores = self.critic(arguments.rebuild(list(points), self.structure), *self.args, **self.kwargs)
        arguments.scores(scores, self.form.rows)
        for at, version in enumerate(versions):  # none in torch.func, which tracks changes itself
            if points[at]._version != version:  # the gradient would be taken at the changed values
                raise ValueError(
                    "critic must leave its input as it is, got one that changes it in place: use inplace=False"
                )
        return scores

    def again(self, state: CriticState) -> "CriticCall":
        """The same call of the critic as it was in this state."""
        return self._replace(critic=state.rerun(self.critic))


class PenaltyPoints(NamedTuple):
    """The points at which the penalty is taken: the batch tensors (samples, alpha) that they are built from, and how.

    `build(batch, ops)` gives one tensor for each tensor of a sample.
    """

    batch: Sequence[Tensor]
    build: Callable[[Sequence[Tensor], Any], list[Tensor]]


class PenaltyResult(NamedTuple):
    """The penalty, the norms, and the method's estimate of its gradient's relative error: 0 where it is exact."""

    penalty: Tensor
    norms: Tensor
    error: Tensor | float = 0.0

    def returned(self, norms: bool, error: bool) -> Any:
        """What the caller asked for: the penalty, or a tuple that starts with it."""
        if not (norms or error):
            return self.penalty
        values = (self.penalty, *((self.norms,) if norms else ()))
        return (*values, torch.as_tensor(self.error, device=self.norms.device)) if error else values


def independent_scores_error() -> ValueError:
    return ValueError(
        "critic must return scores that depend on the samples it is given, got scores that do not: "
        "is there a detach() or no_grad() inside it?"
    )


def refuse_higher_order(what: str) -> None:
    """In a backward that returns the right gradient, whose own derivative would be wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} gives the penalty's first derivative alone, and this backward is one with create_graph=True: use "
            "method='double_backward', without chunk_size"
        )
