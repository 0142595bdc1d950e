"""The penalty as a function that torch.compile and torch.func can trace: the input gradient is taken by torch.func."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..ops.norm_penalty import norm_penalty_rows
from .critic_call import CriticCall, PenaltyResult
from .input_gradients import cotangent


def compute_penalty(call: CriticCall, points: Sequence[Tensor]) -> PenaltyResult:
    """Exact, and differentiable to every order in which the critic is."""
    scores, pull_back = torch.func.vjp(lambda *xs: call.scores(xs), *points)  # type: ignore[misc]
    gradients = pull_back(cotangent(scores, call.grad_scale))
    return PenaltyResult(*norm_penalty_rows(gradients, call.form, reference))
