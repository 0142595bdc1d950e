"""How much each op has to move through memory, in elements per element of the batch, and what copying that much costs.

What a row has once (alpha, norms) is not counted.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import timing

COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes: many times the last cache


class BytesMoved(NamedTuple):
    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def together(*passes: BytesMoved) -> BytesMoved:
    return BytesMoved(sum(one.read for one in passes), sum(one.written for one in passes))


INTERPOLATE = BytesMoved(2, 1)  # real, fake -> x_hat
INTERPOLATE_BACKWARD = BytesMoved(1, 2)  # the cotangent -> the gradients of real and of fake
PENALTY = BytesMoved(1, 0)  # the gradients -> a number for each row
PENALTY_BACKWARD = BytesMoved(1, 1)  # the gradients -> theirs
PENALTY_DOUBLE_BACKWARD = BytesMoved(4, 1)  # the gradients and the cotangent, for the dots and then for the result


def copies(like: Tensor, model: BytesMoved) -> Callable[[], list[Tensor]]:
    """As many bytes as the model has, by copies of this tensor into fresh ones: each reads it and writes as much."""
    whole, half = divmod(model.total, 2)
    part = like.flatten()[: like.numel() // 2] if half else None

    def step() -> list[Tensor]:
        out = [like.clone() for _ in range(whole)]
        return out if part is None else [*out, part.clone()]

    return step


def copy_bandwidth(device: str) -> float:
    """GB/s, read and written, of copies into memory that is there already."""
    source = torch.ones(COPIED[device] // 4, device=device)
    target = torch.zeros_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    copy()
    found = [timing.timing(copy, device, 4) for _ in range(15)]
    return 2e-9 * COPIED[device] / statistics.median(each.device or each.total for each in found)
