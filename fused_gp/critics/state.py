"""What a run of a critic changes, kept so that it can run again from the same state: random generators and buffers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


class CriticState:
    """The state from which a critic is about to run. As a context manager, it restores the generators at the end.

    Dropout draws a mask at each run, and spectral norm takes a step of its power iteration. Between the two ends of a
    difference neither may change: the change would be divided by a small step.
    """

    def __init__(self, modules: Iterable[Module], device: torch.device) -> None:
        # During a capture the generator's state is that of each replay: it can be neither read nor restored.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph cannot capture critics that run again from the same random numbers: call the penalty "
                "once before the capture, as a warm-up, and with method='double_backward' or 'compiled'; "
                "method='directional' runs them again at every call"
            )
        # Each with the device it is asked for: there may be several, and the current one need not be the critic's.
        self._generators: list[tuple[Any, tuple[torch.device, ...]]] = [(torch, ())]
        if device.type != "cpu":
            self._generators.append((torch.get_device_module(device), (device,) if device.type != "mps" else ()))
        self._random_states = [module.get_rng_state(*where) for module, where in self._generators]
        self.buffers = Buffers(modules)

    def __enter__(self) -> "CriticState":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore_generators()

    def restore_generators(self) -> None:
        for (module, where), state in zip(self._generators, self._random_states, strict=True):
            module.set_rng_state(state, *where)

    def rerun(self, critic: Callable[..., Any]) -> Callable[..., Any]:
        """The critic, running from this state each time, and leaving its own buffers as they are."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.restore_generators()
            with self.buffers.restored():
                return critic(*args, **kwargs)

        return run


class Buffers:
    """Copies of the buffers of modules in training mode; in evaluation mode nothing is written to them."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        self.kept: list[tuple[dict[str, Tensor | None], str, Tensor]] = []  # the owner's dict, the name, the copy
        self._owners: set[int] = set()
        self._replaced: list[Tensor | None] | None = None  # by copies, inside `restored`
        self.keep(modules)

    def keep(self, modules: Iterable[Module]) -> None:
        """Before they run. What is kept already stays as it is."""
        for module in modules:
            owner = module._buffers
            if not (owner and module.training) or id(owner) in self._owners:
                continue
            self._owners.add(id(owner))
            for name, buffer in owner.items():
                if buffer is not None:
                    self.kept.append((owner, name, buffer.clone()))
                    if self._replaced is not None:
                        self._replaced.append(buffer)
                        owner[name] = buffer.clone()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the modules have copies of their buffers as they were; what they write to these is discarded."""
        outer, replaced = self._replaced, [owner[name] for owner, name, _ in self.kept]
        self._replaced = replaced
        for owner, name, before in self.kept:
            owner[name] = before.clone()
        try:
            yield
        finally:
            for (owner, name, _), buffer in zip(self.kept, replaced, strict=False):  # an inner context may keep more
                owner[name] = buffer
            self._replaced = outer
