"""Which penalty of a norm is meant: the one record that both backends receive."""

from typing import NamedTuple

import torch
from torch import Tensor


class PenaltyForm(NamedTuple):
    """The numbers in the formulas of `kernels/norm_penalty.py`, validated.

    rows       how many norms there are: the samples, or the groups of them
    squared    phi = n^2 without root or eps; target, eps and one_sided then mean nothing
    kappa      1 / grad_scale, a number or a tensor of one element; None where nothing was scaled
    scale      what the sum over rows (reduce) or each row (otherwise) is multiplied by
    """

    rows: int
    target: float
    one_sided: bool
    squared: bool
    eps: float
    kappa: float | Tensor | None
    scale: float
    reduce: bool


def accumulation_type(*dtypes: torch.dtype) -> torch.dtype:
    """Half-precision sums overflow (12,288 fp16 gradients of 10 do), so they are taken in fp32; fp64 stays fp64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
