"""The byte model: how much each op has to move through memory, in elements per element of the batch (design: kernels).

What a row has once (alpha, norms) is not counted.
"""

from typing import NamedTuple


class Traffic(NamedTuple):
    read: int
    written: int

    def __add__(self, other: tuple[int, ...]) -> "Traffic":
        return Traffic(self.read + other[0], self.written + other[1])

    @property
    def moved(self) -> int:
        return self.read + self.written


INTERPOLATE = Traffic(2, 1)  # real, fake -> x_hat
INTERPOLATE_BACKWARD = Traffic(1, 2)  # the cotangent -> the gradients of real and of fake
PENALTY = Traffic(1, 0)  # the gradients -> a number for each row
PENALTY_BACKWARD = Traffic(1, 1)  # the gradients -> theirs
PENALTY_DOUBLE_BACKWARD = Traffic(4, 1)  # the gradients and the cotangent, for the dots and then for the result
