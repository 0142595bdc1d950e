"""The records of what was asked: which penalty of the norm, and by which method its gradient reaches the weights.

And the type in which norms are computed, which all layers need.
"""

from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("double_backward", "compiled", "directional", "auto")


class PenaltyForm(NamedTuple):
    """The numbers in the formulas of `kernels/norm_penalty.py`, validated. Both backends receive it."""

    rows: int  # the number of norms: of the samples, or of the groups of them
    target: float
    one_sided: bool
    squared: bool  # phi = n^2 without root or eps; target, eps and one_sided then mean nothing
    eps: float
    kappa: float | Tensor | None  # 1 / grad_scale, a number or a tensor of one element; None where nothing was scaled
    scale: float  # the factor on the sum over the rows (reduce), or on each row (otherwise)
    reduce: bool


class Method(NamedTuple):
    """The options of `fused_gradient_penalty` that have these names, validated."""

    name: str
    step: float | None
    chunk_size: int | None
    allow_kinks: bool


def accumulation_type(*dtypes: torch.dtype) -> torch.dtype:
    """fp32, since half-precision sums overflow (12,288 fp16 gradients of 10 do); fp64 where one of them is fp64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
