"""The one warning: batch normalisation in training mode, where the score of a sample depends on the whole batch."""

import sys
import warnings

from .profile import CriticProfile


def warn_of_batch_norm(profile: CriticProfile) -> None:
    """Once per critic."""
    if not profile.batch_norms:
        return
    layers = [(name, layer) for name, reference in profile.batch_norms if (layer := reference()) is not None]
    used = [(name, layer) for name, layer in layers if layer.training or not layer.track_running_stats]
    if not used:  # in evaluation mode, which may change
        return
    names = [name or type(layer).__name__ for name, layer in used]
    profile.batch_norms.clear()
    warnings.warn(
        f"critic has batch normalisation in training mode ({', '.join(names)}): a score depends on the whole batch, so "
        "gradient norms are not those of single samples. Use LayerNorm, GroupNorm or none, as the WGAN-GP paper does.",
        stacklevel=_frames_to_the_caller(),
    )


def _frames_to_the_caller() -> int:
    """How far up the first frame lies that is neither ours nor torch's: the warning points there."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fused_gp", "torch"):
        level, frame = level + 1, frame.f_back
    return level
