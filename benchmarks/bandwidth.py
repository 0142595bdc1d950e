"""The roofs: what copying costs on this machine."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.traffic import Traffic

COPIES = "plain copies"
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes: many times the last cache


def copies(like: Tensor, model: Traffic) -> Callable[[], list[Tensor]]:
    """As many bytes as the model has, by copies of this tensor into fresh ones: each reads it and writes as much."""
    whole, half = divmod(model.moved, 2)
    part = like.flatten()[: like.numel() // 2] if half else None

    def step() -> list[Tensor]:
        out = [like.clone() for _ in range(whole)]
        return out if part is None else [*out, part.clone()]

    return step


def copy_bandwidth(device: str) -> float:
    """GB/s, read and written, of copies into memory that is there already."""
    source = torch.ones(COPIED[device] // 4, device=device)
    target = torch.zeros_like(source)
    times = [timing.seconds(lambda: target.copy_(source), device) for _ in range(15)]
    return 2e-9 * COPIED[device] / statistics.median(times)
