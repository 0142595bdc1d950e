"""The functional version compiled whole by torch.compile, and the two ops compiled as the snippet has them.

Autograd inside a compiled region cannot be differentiated again, so it must be the functional version. Alpha is drawn
outside, where a seed gives the numbers that it gives everybody.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import functional, snippet
from .peer import Peer


def peer() -> Peer:
    """With graphs of its own, at static shapes."""
    penalty_at = torch.compile(functional.penalty_at, fullgraph=True, dynamic=False)

    def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
        alpha = torch.rand((len(real), *[1] * (real.ndim - 1)), device=real.device).to(real.dtype)
        return penalty_at(critic, real, fake, alpha)

    return Peer(
        gradient_penalty,
        torch.compile(snippet.interpolate, fullgraph=True, dynamic=False),
        torch.compile(snippet.norm_penalty, fullgraph=True, dynamic=False),
    )
