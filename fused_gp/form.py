"""Which penalty of a norm is meant: the one record that both backends receive."""

from typing import NamedTuple

import torch


class PenaltyForm(NamedTuple):
    """The numbers in the formulas of `kernels/norm_penalty.py`, validated.

    squared    phi = n^2 without root or eps; target, eps and one_sided then mean nothing
    kappa      1 / grad_scale
    scale      what the sum over rows (reduce) or each row (otherwise) is multiplied by
    """

    target: float
    one_sided: bool
    squared: bool
    eps: float
    kappa: float
    scale: float
    reduce: bool


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """Half-precision sums overflow (12,288 fp16 gradients of 10 do), so they are taken in fp32; fp64 stays fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
