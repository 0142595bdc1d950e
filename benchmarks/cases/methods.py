"""Time, peak memory and accuracy of the methods and of chunks, against the snippet under eager autograd.

The ratio is to the snippet's time: below 1 the method is faster. The gradient's error is that of the weights'
gradients, in fp32 and under bf16 autocast. Fresh memory is what the system handed out while a step ran: a page fault
and a cleared page for every 4 kB, which on a CPU may take as long as the arithmetic, and which allocators that keep
what is freed do without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import critics
from benchmarks.cases.case import Case, Make, Step, relative_error, seeded
from benchmarks.cases.ours import implementations
from benchmarks.cases.penalties import Inputs, PenaltyCase
from benchmarks.names import SNIPPET
from benchmarks.peers import PEERS, Implementation

IMAGES = (3, 64, 64)
VIT, CONV = (8, *IMAGES), (64, *IMAGES)


@dataclass(frozen=True)
class MethodCase(PenaltyCase):
    suite = "methods"
    budget = 0.0  # the least rounds
    bases = (SNIPPET,)
    # The error is a column of its own, so that the check needs to find gross mistakes only. Where an input of LeakyReLU
    # lies within rounding of zero, another rounding gives another slope: 3e-4 was seen.
    fp32_tolerances = (1e-3, 3e-3)
    memory: bool = True

    def all_implementations(self) -> dict[str, Make]:
        return {SNIPPET: PEERS[SNIPPET], **implementations(*self.options)}

    def baselines(self, inputs: Inputs) -> dict[str, Step]:
        return {}

    def extra_columns(
        self, implementation: Implementation, inputs: Inputs, results: list[Tensor], reference: list[Tensor] | None
    ) -> dict[str, Any]:
        assert reference is not None
        half = implementation._replace(gradient_penalty=under_autocast(implementation.gradient_penalty))
        rounded = seeded(self.enter(half, inputs).check)
        return {
            "gradient_error": relative_error(results[1:], reference[1:]),
            "bf16_gradient_error": relative_error(rounded[1:], reference[1:]),
        }


def under_autocast(penalty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        with torch.autocast(real.device.type, torch.bfloat16):
            return penalty(critic, real, fake)

    return call


def chunked(*sizes: int, **options: Any) -> list[dict[str, Any]]:
    return [options | {"chunk_size": size} for size in sizes]


def cases(device: str) -> list[Case]:
    vit = partial(MethodCase, "ViT", critic=critics.ViT, attention=True)
    smooth = partial(critics.dcgan, activation=nn.SiLU)
    compiled, directional = {"method": "compiled"}, {"method": "directional"}
    of_vit = (
        {}, *chunked(4, 2, 1), compiled, *chunked(2, **compiled), directional, *chunked(8, 4, 2, 1, **directional),
    )  # fmt: skip
    return [
        vit(VIT, options=of_vit),
        MethodCase("conv, LeakyReLU", CONV, critic=critics.dcgan, options=({}, *chunked(16), compiled), quick=True),
        MethodCase("conv, SiLU", CONV, critic=smooth, options=(directional, *chunked(16, **directional))),
        # Memory against batch. What the snippet takes for one chunk's samples is what chunks cannot get below.
        *(vit((batch, *IMAGES), options=(), timed=False, quick=True) for batch in (1, 2)),
        *(vit((batch, *IMAGES), options=({"chunk_size": 2},), timed=False) for batch in (16, 32)),
    ]
