"""What a penalty asks: which critic, called how, and which penalty of its input gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, reference
from .form import PenaltyForm


class Question(NamedTuple):
    """Everything but the points, checked. `structure` is that of the critic's first argument."""

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
        scores = self.critic(arguments.rebuilt(list(points), self.structure), *self.args, **self.kwargs)
        arguments.scores(scores, self.form.rows)
        for x, version in zip(points, versions, strict=False):  # none in torch.func, which keeps track itself
            if x._version != version:  # the gradient would be that with respect to what the critic made of it
                raise ValueError(
                    "critic must leave its input as it is, got one that changes it in place: inplace=True first?"
                )
        return scores


class Answer(NamedTuple):
    """The penalty, the norms, and how far its gradient is off, as a method's own estimate: 0 where it is exact."""

    penalty: Tensor
    norms: Tensor
    error: Tensor | float = 0.0

    def returned(self, norms: bool, error: bool) -> Any:
        """What the caller asked for: the penalty, or a tuple that starts with it."""
        if not (norms or error):
            return self.penalty
        kept = (self.penalty, *((self.norms,) if norms else ()))
        return (*kept, torch.as_tensor(self.error, device=self.norms.device)) if error else kept


def unrelated() -> ValueError:
    return ValueError(
        "critic must return scores that depend on the samples it is given, got scores that do not: "
        "is there a detach() or no_grad() inside it?"
    )
