"""What a benchmark is: inputs, and for each contestant a step on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.ours import contestants
from benchmarks.peers import Peer, peers_of_calls

Step = Callable[[], list[Tensor]]


class Entry(NamedTuple):
    """`check` gives the value and the gradients that are held to the truth; `step` is what is timed."""

    check: Step
    step: Step


@dataclass(frozen=True)
class Case(ABC):
    group: ClassVar[str]
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    compiling: bool = True  # those contestants too that must be compiled

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    def contestants(self) -> dict[str, Callable[[], Peer]]:
        return {name: make for name, make in self.everybody().items() if self.compiling or "compiled" not in name}

    @abstractmethod
    def everybody(self) -> dict[str, Callable[[], Peer]]:
        """The contestants, ours first."""

    @abstractmethod
    def inputs(self, device: str) -> Any:
        """The same for every contestant. Drawn on the CPU, so that they are the same on every device."""

    @abstractmethod
    def exact(self, inputs: Any) -> Any:
        """The same inputs in fp64."""

    @abstractmethod
    def enter(self, peer: Peer, inputs: Any) -> Entry:
        """What the contestant changes, such as a critic's buffers, is a copy of its own."""

    def yardsticks(self, inputs: Any) -> dict[str, Step]:
        """Other work that is timed in the same rounds, to tell how much could be won."""
        return {}

    def moved(self) -> int | None:
        """Bytes that the step has to move, where that is known."""
        return None


@dataclass(frozen=True)
class CallCase(Case):
    """Of the whole call, with a critic."""

    options: tuple[dict[str, Any], ...] = ({}, {"method": "compiled"})  # of ours, one contestant each

    def everybody(self) -> dict[str, Callable[[], Peer]]:
        return {**contestants(*self.options), **peers_of_calls(len(self.shape))}
