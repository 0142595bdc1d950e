"""The penalty inside torch.compile, torch.func and forward-mode autograd: operations that they trace themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..critics.data_parallel import refuse_inside_graph
from ..critics.profile import is_replicated, is_sharded
from ..form import Method
from ..ops.norm_penalty import norm_penalty_rows
from .critic_call import CriticCall, PenaltyPoints, PenaltyResult
from .input_gradients import cotangent


def compute_penalty(call: CriticCall, points: PenaltyPoints, method: Method) -> PenaltyResult:
    """By every exact method the same."""
    if method.name == "directional" or method.chunk_size is not None:
        given = "method='directional'" if method.name == "directional" else f"chunk_size={method.chunk_size}"
        raise ValueError(
            f"{given} evaluates the critic step by step, and cannot be traced by torch.compile, torch.func or "
            "forward-mode autograd: leave it out, or call the penalty outside the compiled function"
        )
    refuse_inside_graph(is_replicated(call.critic) or is_sharded(call.critic))
    return penalty_by_torch_func(call, points.build(points.batch, reference))


def penalty_by_torch_func(call: CriticCall, points: Sequence[Tensor]) -> PenaltyResult:
    """Differentiable to every order in which the critic is."""
    scores, pull_back = torch.func.vjp(lambda *xs: call.scores(xs), *points)  # type: ignore[misc]
    return PenaltyResult(*norm_penalty_rows(pull_back(cotangent(scores, call.grad_scale)), call.form, reference))
