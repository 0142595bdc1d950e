"""Where a test runs: a backend of the package, and the device of its tensors."""

from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_map_only


class Place(NamedTuple):
    backend: str
    device: str


CPU = Place("torch", "cpu")
PLACES = [
    pytest.param(CPU, id="torch"),
    pytest.param(Place("triton", "cpu"), id="interpreter"),
    pytest.param(Place("triton", "cuda"), id="device", marks=pytest.mark.gpu),
]
KERNEL_PLACES = PLACES[1:]


def to_device(things, device):
    """A structure, with all tensors in it on this device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), things)
