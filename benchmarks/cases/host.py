"""What the host pays for the two ops: processor time up to the launch, on a device that launches nothing.

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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Entry, Make, Step, Suite
from benchmarks.cases.ours import ours
from benchmarks.names import EMPTY_FUNCTIONS, OURS, SNIPPET
from benchmarks.peers import PEERS, Implementation
from benchmarks.timing import Clock
from fused_gp import gradient_norm_penalty, interpolate

TARGETS: dict[str, tuple[str, int | str, int]] = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHAPE = (2, 4)


class Inputs(NamedTuple):
    real: Tensor
    fake: Tensor
    attached: Tensor
    alpha: Tensor
    gradients: Tensor
    cotangent: Tensor
    launches: list[Any]


def interpolation(by: Implementation, x: Inputs) -> object:
    assert by.interpolate
    return by.interpolate(x.real, x.fake, x.alpha)


def interpolation_backward(by: Implementation, x: Inputs) -> object:
    """Where fake is attached to a generator."""
    assert by.interpolate
    return torch.autograd.grad(by.interpolate(x.real, x.attached, x.alpha), x.attached, x.cotangent)


def penalty_backward(by: Implementation, x: Inputs) -> object:
    assert by.norm_penalty
    return torch.autograd.grad(by.norm_penalty(x.gradients), x.gradients, ONE)


Part = Callable[[Implementation, Inputs], object]
STEPS: dict[str, tuple[Part, ...]] = {
    "interpolation": (interpolation,),
    "interpolation and its backward": (interpolation_backward,),
    "penalty and its backward": (penalty_backward,),
    "both, as for a critic": (interpolation, penalty_backward),
    "both and both backwards": (interpolation_backward, penalty_backward),
}
ONE = torch.ones(())


def through_triton() -> Implementation:
    """Ours, as it would be on a device."""
    return ours()()._replace(
        interpolate=partial(interpolate, backend="triton"),
        norm_penalty=partial(gradient_norm_penalty, backend="triton"),
    )


class EmptyFunction(torch.autograd.Function):
    """Of two tensors; checks, allocates and launches nothing."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return ctx.saved_tensors[0], None


def empty_functions() -> Implementation:
    return Implementation(
        lambda *_: ONE,
        lambda real, fake, alpha: EmptyFunction.apply(fake, real),
        lambda gradients: EmptyFunction.apply(gradients, ONE),
    )


@dataclass(frozen=True)
class HostCase(Case):
    suite: ClassVar[str] = "host"
    bases: ClassVar[tuple[str, ...]] = (SNIPPET,)
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
                yield self.inputs(device)._replace(launches=launches)
        finally:
            torch.set_num_threads(threads)

    def inputs(self, device: str) -> Inputs:
        torch.manual_seed(0)
        real, fake, gradients, cotangent = (torch.randn(self.shape) for _ in range(4))
        alpha = torch.rand(self.shape[0], *[1] * (len(self.shape) - 1))
        attached = fake.clone().requires_grad_()
        return Inputs(real, fake, attached, alpha, gradients.requires_grad_(), cotangent, [])

    def enter(self, implementation: Implementation, inputs: Inputs) -> Entry:
        def step() -> list[Tensor]:
            inputs.launches.clear()  # what a device would have freed by now
            for part in self.parts:
                part(implementation, inputs)
            return []

        return Entry(step, step)

    def baselines(self, inputs: Inputs) -> dict[str, Step]:
        return {EMPTY_FUNCTIONS: self.enter(empty_functions(), inputs).step}

    def extra_columns(self, implementation: Implementation, inputs: Inputs, *_: Any) -> dict[str, Any]:
        return {"launches": len(inputs.launches)}


def cases(device: str) -> list[Case]:
    return [
        HostCase(f"{target}: {name}", SHAPE, target=target, parts=parts)
        for target in TARGETS
        for name, parts in STEPS.items()
    ]


def quick(case: Case) -> bool:
    return case.name.startswith("sm_90")


WHAT = "processor time up to the launch, on a GPU that is not there"
SUITE = Suite(WHAT, cases, quick, budget=1.2, quick_budget=0.3, on_devices=False)
