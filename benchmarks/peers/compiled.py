"""The functional version compiled whole by torch.compile.

Autograd inside a compiled region cannot be differentiated again, so it must be the functional version. Alpha is drawn
outside, where a seed gives the same numbers as in the other forms.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import functional
from .implementation import Implementation


def peer() -> Implementation:
    """With a graph of its own, at static shapes."""
    penalty_at = torch.compile(functional.penalty_at, fullgraph=True, dynamic=False)

    def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
        alpha = torch.rand((len(real), *[1] * (real.ndim - 1)), device=real.device).to(real.dtype)
        return penalty_at(critic, real, fake, alpha)

    return Implementation(gradient_penalty)
