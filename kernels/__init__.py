"""Triton device code and its launchers: six functions on (R, N) rows, which know no autograd.

Importing this package imports Triton. `fused_gp.torch_ops` holds the same six functions in plain torch.
"""

from .interpolation import interpolate, interpolate_adjoint, interpolate_kernel, perturb
from .launch import is_interpreted
from .norm_penalty import penalty_backward, penalty_double_backward, penalty_forward

INTERPRETED = is_interpreted(interpolate_kernel)

__all__ = [
    "INTERPRETED",
    "interpolate",
    "interpolate_adjoint",
    "penalty_backward",
    "penalty_double_backward",
    "penalty_forward",
    "perturb",
]
