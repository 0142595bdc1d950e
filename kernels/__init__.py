"""Triton device code and its launchers: six functions on (R, N) rows, without autograd.

Importing this package imports Triton. `fused_gp.ops.torch_ops` holds the same six functions in plain torch.
"""

from .interpolation import interpolate, interpolate_adjoint, interpolate_kernel, perturb
from .launch import is_interpreted
from .norm_penalty import penalty_backward, penalty_double_backward, penalty_forward
from .null_device import is_null

INTERPRETED = is_interpreted(interpolate_kernel)


def take_cpu_tensors() -> bool:
    """Whether the kernels run in Triton's interpreter, or on a null device, which does not run them."""
    return INTERPRETED or is_null()


__all__ = [
    "INTERPRETED",
    "interpolate",
    "interpolate_adjoint",
    "penalty_backward",
    "penalty_double_backward",
    "penalty_forward",
    "perturb",
    "take_cpu_tensors",
]
