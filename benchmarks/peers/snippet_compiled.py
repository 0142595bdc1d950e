"""The snippet's two ops under torch.compile. Its whole call cannot be: see compiled."""

import torch

from . import snippet
from .implementation import Implementation


def peer() -> Implementation:
    """With graphs of its own, at static shapes."""
    return Implementation(
        snippet.gradient_penalty,
        torch.compile(snippet.interpolate, fullgraph=True, dynamic=False),
        torch.compile(snippet.norm_penalty, fullgraph=True, dynamic=False),
    )
