"""What every benchmark here measures with."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def seconds(step: Callable[[], object], device: str, steps: int = 1) -> float:
    """Of one step, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / steps


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of theirs / ours, taken round by round."""
    low, median, high = statistics.quantiles([b / a for a, b in zip(ours, theirs, strict=True)], n=4)
    return {"ratio": median, "ratio_low": low, "ratio_high": high}


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()
