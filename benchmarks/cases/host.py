"""Processor time of the two ops up to the launch, on a simulated GPU.

On GPUs, batches of a GAN's size take less time to compute than to launch. Ours is timed up to the launch itself: every
argument checked, every kernel chosen, its call recorded. The snippet's operations are dispatched to CPU tensors, too
small for their arithmetic to count. Empty Functions are the least that autograd.Function costs. The ratio is to the
snippet's time: below 1 ours is cheaper. Ours computes nothing here, so there is no result to check; the suite ops does.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import ops
from benchmarks.cases.case import Case, Entry, Make, Step
from benchmarks.cases.ours import ours
from benchmarks.names import EMPTY_FUNCTIONS, OURS, SNIPPET
from benchmarks.peers import PEERS, Implementation
from benchmarks.timing import Clock
from fused_gp import gradient_norm_penalty, interpolate

TARGETS: dict[str, tuple[str, int | str, int]] = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHAPE = (2, 4)
ONE = torch.ones(())
Part = Callable[[Implementation, ops.Inputs], object]


def interpolation(by: Implementation, x: ops.Inputs) -> object:
    return by.interpolate(x.real, x.fake, x.alpha)


def interpolation_backward(by: Implementation, x: ops.Inputs) -> object:
    """Where fake has a graph, as behind a generator; here it is the gradients."""
    return torch.autograd.grad(by.interpolate(x.real, x.gradients, x.alpha), x.gradients, x.cotangent)


def penalty_backward(by: Implementation, x: ops.Inputs) -> object:
    return torch.autograd.grad(by.norm_penalty(x.gradients), x.gradients, ONE)


STEPS: dict[str, tuple[Part, ...]] = {
    "interpolation": (interpolation,),
    "interpolation and its backward": (interpolation_backward,),
    "penalty and its backward": (penalty_backward,),
    "both, as for a critic": (interpolation, penalty_backward),
    "both and both backwards": (interpolation_backward, penalty_backward),
}


class EmptyFunction(torch.autograd.Function):
    """Of two tensors; checks, allocates and launches nothing."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return ctx.saved_tensors[0], None


def through_triton() -> Implementation:
    """Ours, as it is on a device."""
    return ours()()._replace(
        interpolate=partial(interpolate, backend="triton"),
        norm_penalty=partial(gradient_norm_penalty, backend="triton"),
    )


class Inputs(NamedTuple):
    tensors: ops.Inputs
    launches: list[Any]


@dataclass(frozen=True)
class HostCase(Case):
    suite = "host"
    budget = 1.2
    bases = (SNIPPET,)
    clock: Clock = time.process_time  # the time of other processes is not in it
    target: str = ""
    parts: tuple[Part, ...] = ()

    def all_implementations(self) -> dict[str, Make]:
        return {OURS: through_triton, SNIPPET: PEERS[SNIPPET]}

    @contextmanager
    def prepared(self, device: str) -> Iterator[Inputs]:
        """On one thread, with a null device as Triton's current one."""
        from triton.backends.compiler import GPUTarget

        from fused_gp.kernels.null_device import null_device

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with null_device(GPUTarget(*TARGETS[self.target])) as launches:
                yield Inputs(self.inputs(device), launches)
        finally:
            torch.set_num_threads(threads)

    def inputs(self, device: str) -> ops.Inputs:
        tensors = ops.draw(self.shape)
        return tensors._replace(gradients=tensors.gradients.requires_grad_())

    def enter(self, implementation: Implementation, inputs: Inputs) -> Entry:
        def step() -> list[Tensor]:
            inputs.launches.clear()  # what a device would have freed by now
            for part in self.parts:
                part(implementation, inputs.tensors)
            return []

        return Entry(step, step)

    def baselines(self, inputs: Inputs) -> dict[str, Step]:
        empty = through_triton()._replace(
            interpolate=lambda real, fake, alpha: EmptyFunction.apply(fake, real),
            norm_penalty=lambda gradients: EmptyFunction.apply(gradients, ONE),
        )
        return {EMPTY_FUNCTIONS: self.enter(empty, inputs).step}

    def extra_columns(self, implementation: Implementation, inputs: Inputs, *_: Any) -> dict[str, Any]:
        return {"launches": len(inputs.launches)}


def cases(device: str) -> list[Case]:
    """Of the processor alone."""
    return [
        HostCase(f"{target}: {name}", SHAPE, target=target, parts=parts, quick=target == "sm_90")
        for target in (TARGETS if device == "cpu" else ())
        for name, parts in STEPS.items()
    ]
