"""The functions that an implementation has to offer."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Absent(Exception):
    """The peer cannot run on this machine; the message says why."""


def missing(*_: Tensor) -> Tensor:
    raise NotImplementedError("this form has no such function")


class Implementation(NamedTuple):
    gradient_penalty: Callable[..., Tensor]
    interpolate: Callable[[Tensor, Tensor, Tensor], Tensor] = missing
    norm_penalty: Callable[[Tensor], Tensor] = missing
    groups: bool = False  # gradient_penalty takes group_size; the others are given the rows of a group as one
    first_order: bool = False  # differentiates the critic once only
