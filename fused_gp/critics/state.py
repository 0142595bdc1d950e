"""What a run of a critic changes, and how it is put back: the random generators, and the buffers of its modules."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


class RandomState:
    """The state of torch's generators for the CPU and for one device, as it is now."""

    def __init__(self, device: torch.device) -> None:
        # Each with the device it is asked for: there may be several, and the current one need not be the critic's.
        self._generators: list[tuple[Any, tuple[torch.device, ...]]] = [(torch, ())]
        if device.type != "cpu":
            self._generators.append((torch.get_device_module(device), (device,) if device.type != "mps" else ()))
        self._states = [module.get_rng_state(*where) for module, where in self._generators]

    def restore(self) -> None:
        for (module, where), state in zip(self._generators, self._states, strict=True):
            module.set_rng_state(state, *where)


class Buffers:
    """Copies of the buffers of modules in training mode; in evaluation mode nothing is written to them."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        self._kept: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self._owners: set[int] = set()
        self._replaced: list[Tensor | None] | None = None  # those in whose place there are copies, inside `restored`
        self.keep(modules)

    @property
    def empty(self) -> bool:
        return not self._kept

    def keep(self, modules: Iterable[Module]) -> None:
        """Before they run; those that are kept already stay as they are."""
        for module in modules:
            owner = module._buffers
            if not (owner and module.training) or id(owner) in self._owners:
                continue
            self._owners.add(id(owner))
            for name, buffer in owner.items():
                if buffer is not None:
                    self._kept.append((owner, name, buffer.clone()))
                    if self._replaced is not None:
                        self._replaced.append(buffer)
                        owner[name] = buffer.clone()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the modules have copies of their buffers as they were; what they write to these is discarded."""
        outer, replaced = self._replaced, [owner[name] for owner, name, _ in self._kept]
        self._replaced = replaced
        for owner, name, before in self._kept:
            owner[name] = before.clone()
        try:
            yield
        finally:
            for (owner, name, _), buffer in zip(self._kept, replaced, strict=False):  # an inner context may know more
                owner[name] = buffer
            self._replaced = outer
