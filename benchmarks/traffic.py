"""The byte model: how much each op has to move through memory, in elements per element of the batch (design: kernels).

What a row has once (alpha, norms) is not counted.
"""

from typing import NamedTuple


class Traffic(NamedTuple):
    read: int
    written: int

    @property
    def moved(self) -> int:
        return self.read + self.written


def total(*passes: Traffic) -> Traffic:
    return Traffic(sum(one.read for one in passes), sum(one.written for one in passes))


INTERPOLATE = Traffic(2, 1)  # real, fake -> x_hat
INTERPOLATE_BACKWARD = Traffic(1, 2)  # the cotangent -> the gradients of real and of fake
PENALTY = Traffic(1, 0)  # the gradients -> a number for each row
PENALTY_BACKWARD = Traffic(1, 1)  # the gradients -> theirs
PENALTY_DOUBLE_BACKWARD = Traffic(4, 1)  # the gradients and the cotangent, for the dots and then for the result
