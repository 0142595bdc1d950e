"""The one warning: batch normalisation in training mode, where the samples of a batch see one another."""

import sys
import warnings

from torch.nn.modules.batchnorm import _BatchNorm

from .findings import Findings


def warn_of_batch_norm(findings: Findings) -> None:
    """Once per critic."""
    if not findings.batch_norms:
        return
    training = [(name, norm()) for name, norm in findings.batch_norms]
    names = [name or type(norm).__name__ for name, norm in training if _sees_the_batch(norm)]
    if not names:  # in evaluation mode, from which it may come back
        return
    findings.batch_norms = []
    warnings.warn(
        f"critic has batch normalisation in training mode ({', '.join(names)}): its samples see one another, so their "
        "gradient norms are not those of single samples. Use LayerNorm, GroupNorm or none, as the WGAN-GP paper does.",
        stacklevel=_frames_to_the_caller(),
    )


def _sees_the_batch(module: _BatchNorm | None) -> bool:
    return module is not None and (module.training or not module.track_running_stats)


def _frames_to_the_caller() -> int:
    """How far up the first frame lies that is neither ours nor torch's, so that the warning points there."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fused_gp", "torch"):
        level, frame = level + 1, frame.f_back
    return level
