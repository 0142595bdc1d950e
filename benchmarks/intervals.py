"""Medians with confidence intervals."""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
LEAST = 6  # with fewer samples not even their whole range covers the median that often


class Median(NamedTuple):
    value: float
    low: float
    high: float


def median(samples: Sequence[float]) -> Median:
    """With the interval between two of the samples that holds the true median in 95 % of all draws or more.

    A sample is below the median half of the time, so that of n the k-th smallest lies above it with the probability of
    fewer than k heads in n throws of a coin: no assumption is made about the distribution of times. k is the largest
    for which both ends miss with 5 % together.
    """
    n = len(samples)
    if n < LEAST:
        raise ValueError(f"an interval needs {LEAST} samples, got {n}")
    missed, rank = 2 * 0.5**n, 0
    while missed <= 1 - CONFIDENCE:
        rank += 1
        missed += 2 * comb(n, rank) * 0.5**n
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    return Median(float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[n - rank]))
