"""What a benchmark is: inputs, for each implementation a step on them, and what the step is compared with."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.ours import implementations, plain_autograd
from benchmarks.names import COMPILED, OURS, is_ours
from benchmarks.peers import Implementation, peers_of_calls
from benchmarks.timing import Clock

Step = Callable[[], list[Tensor]]
Make = Callable[[], Implementation]

SEED = 1
# Of values and gradients, relative to fp64 from the same rounded inputs, in the Euclidean norm. Peers round every
# intermediate result of a half type.
HALF_TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Entry(NamedTuple):
    """`check` gives the value and the gradients that are compared with the reference; `step` is what is timed."""

    check: Step
    step: Step


@dataclass(frozen=True)
class Case(ABC):
    suite: ClassVar[str]
    budget: ClassVar[float]  # seconds of rounds
    bases: ClassVar[tuple[str, ...]] = (OURS, COMPILED)  # the implementations to whose times ratios are taken
    # On a CPU, and on a GPU, whose sums have other orders: an input of LeakyReLU that lies within rounding of zero has
    # another slope then. Nothing is checked in TF32.
    fp32_tolerances: ClassVar[tuple[float, float]] = (2e-4, 3e-3)

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    compiling: bool = True  # those implementations too that must be compiled
    memory: bool = False  # peak memory too
    timed: bool = True  # or peak memory alone
    quick: bool = False  # one of --quick
    clock: Clock = time.perf_counter
    only: tuple[str, ...] = ()  # these implementations alone
    tiny: dict[str, Any] = field(
        default_factory=dict
    )  # what a rehearsal changes, to take no time; without it, it has no such case

    @property
    def key(self) -> str:
        return f"{self.suite}: {self.name} {self.shape} {self.about['dtype']}"

    @property
    def about(self) -> dict[str, Any]:
        """What distinguishes the rows of this case from those of the others."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"suite": self.suite, "case": self.name, "shape": list(self.shape), "dtype": dtype}

    def at_tiny_size(self) -> "Case":
        return replace(self, **self.tiny)

    def implementations(self) -> dict[str, Make]:
        return {
            name: make
            for name, make in self.all_implementations().items()
            if (self.compiling or "compiled" not in name) and (not self.only or name in self.only)
        }

    def compiled_ways(self) -> dict[str, Make]:
        """Those for which torch or Triton compiles anew."""
        return {name: make for name, make in self.implementations().items() if is_ours(name) or "compiled" in name}

    @abstractmethod
    def all_implementations(self) -> dict[str, Make]:
        """Ours and the peers."""

    @contextmanager
    def prepared(self, device: str) -> Iterator[Any]:
        """The inputs; what the steps need around them is there inside."""
        yield self.inputs(device)

    @abstractmethod
    def inputs(self, device: str) -> Any:
        """The same for every implementation. Drawn on the CPU, so that they are the same on every device."""

    def exact(self, inputs: Any) -> Any:
        """The same inputs in fp64; None: nothing is computed, so that there is nothing to check."""
        return None

    def reference(self, inputs: Any) -> list[Tensor] | None:
        """Value and gradients in fp64, from the same inputs and the same seed."""
        exact = self.exact(inputs)
        return None if exact is None else seeded(self.enter(self.reference_implementation(), exact).check)

    def reference_implementation(self) -> Implementation:
        return plain_autograd()

    def tolerance(self, device: str, implementation: Implementation) -> float:
        return HALF_TOLERANCES.get(self.dtype, self.fp32_tolerances[device != "cpu"])

    @abstractmethod
    def enter(self, implementation: Implementation, inputs: Any) -> Entry:
        """What the implementation changes, such as a critic's buffers, is a copy of its own."""

    def baselines(self, inputs: Any) -> dict[str, Step]:
        """Other work that is timed in the same rounds, to tell how much could be won."""
        return {}

    def copies(self, inputs: Any, device: str) -> list[Any]:
        """The inputs and copies of them, on a device whose own time is taken from inputs that are in no cache."""
        return []

    def is_cold(self, inputs: Any, device: str) -> bool:
        """Whether there are enough copies for that."""
        return True

    def bytes_moved(self) -> int | None:
        """By the step at least, where that is known."""
        return None

    def extra_columns(
        self, implementation: Implementation, inputs: Any, results: list[Tensor], reference: list[Tensor] | None
    ) -> dict[str, Any]:
        """Of an implementation that passed the check, with what its check gave."""
        return {}


@dataclass(frozen=True)
class CallCase(Case):
    """Of the whole call, with a critic."""

    options: tuple[dict[str, Any], ...] = ({}, {"method": "compiled"})  # of ours, one implementation each

    def all_implementations(self) -> dict[str, Make]:
        return {**implementations(*self.options), **peers_of_calls(len(self.shape))}


def seeded(step: Step) -> list[Tensor]:
    torch.manual_seed(SEED)
    return step()


def relative_error(results: list[Tensor], reference: list[Tensor]) -> float:
    """In the Euclidean norm, of all the tensors as one vector."""
    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (results, reference))
    return ((a - b).norm() / b.norm()).item()
