"""Gradient penalties for GAN critics: fused kernels with double backward behind one drop-in call.

loss = fake_score.mean() - real_score.mean() + fused_gradient_penalty(critic, real, fake, weight=10)
"""

from . import reference
from .module import GradientPenalty
from .ops.interpolation import interpolate
from .ops.norm_penalty import gradient_norm_penalty
from .penalties import dragan_penalty, fused_gradient_penalty, input_gradient_penalty, r1_penalty, r2_penalty

__version__ = "0.1.0"

__all__ = [
    "GradientPenalty",
    "dragan_penalty",
    "fused_gradient_penalty",
    "gradient_norm_penalty",
    "input_gradient_penalty",
    "interpolate",
    "r1_penalty",
    "r2_penalty",
    "reference",
]
