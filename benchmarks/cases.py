"""The suite. Sizes that are for devices only would take a CPU too long."""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch

from benchmarks import critics, generators
from benchmarks.case import Case
from benchmarks.ops import BOTH, OPS, OpCase
from benchmarks.penalty import PenaltyCase
from benchmarks.training import TrainingCase

MNIST, FACES, LARGE = (64, 784), (64, 3, 64, 64), (64, 3, 256, 256)
# Rows of a plane, of MNIST at batches of 1 to 4096, of images up to 256 x 256.
SIZES = [(2, 4), (4096, 2), (1, 784), MNIST, (4096, 784), (64, 3, 32, 32), FACES, (64, 3, 128, 128), LARGE]
HALVES = (torch.bfloat16, torch.float16)


def cases(device: str) -> list[Case]:
    large = device != "cpu"
    sizes = [*SIZES, (256, *LARGE[1:])] if large else SIZES
    batch, resnet_batch = (64, 64) if large else (16, 8)  # a ResNet's step is the longest
    few: tuple[dict[str, Any], ...] = ({}, {"method": "compiled"})
    chunked = (*few, {"chunk_size": batch // 4})
    return [
        *(OpCase(BOTH, size) for size in sizes),
        *(OpCase(BOTH, size, dtype) for dtype in HALVES for size in (MNIST, FACES, LARGE)),
        *(OpCase(name, size) for name in OPS if name != BOTH for size in (MNIST, FACES, LARGE)),
        PenaltyCase("MLP", (256, 2), critic=partial(critics.mlp, 2)),
        PenaltyCase("MLP", MNIST, critic=partial(critics.mlp, 784)),
        PenaltyCase("packed table", (500, 100), critic=partial(critics.Packed, 100), group_size=10),
        PenaltyCase("DCGAN", (batch, 3, 64, 64), critic=critics.dcgan, options=chunked),
        *(PenaltyCase("DCGAN", (batch, 3, 64, 64), dtype, critic=critics.dcgan) for dtype in (HALVES if large else ())),
        # Compiled it takes as long as under spectral normalisation, and on a CPU a minute before it runs.
        PenaltyCase("WGAN-GP ResNet", (resnet_batch, 3, 32, 32), compiling=large, critic=critics.resnet),
        PenaltyCase("spectral-norm ResNet", (resnet_batch, 3, 32, 32), critic=critics.spectral_resnet),
        PenaltyCase(
            "ViT",
            (batch // 4, 3, 64, 64),
            critic=partial(critics.ViT, 128, 3, 8),
            options=(*few, {"chunk_size": 1}, {"method": "directional"}, {"method": "directional", "chunk_size": 1}),
        ),
        TrainingCase("MLP", (256, 2), generator=generators.points, critic=partial(critics.mlp, 2)),
        TrainingCase(
            "DCGAN", (2 * batch, 3, 32, 32), generator=partial(generators.dcgan, 32), critic=partial(critics.dcgan, 32)
        ),
    ]


def quick(device: str) -> list[Case]:
    """One minute."""
    wanted: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "op": [(BOTH, size) for size in (MNIST, FACES)],
        "penalty": [("MLP", MNIST), ("packed table", (500, 100))],
        "training step": [("MLP", (256, 2))],
    }
    return [
        replace(case, compiling=False)
        for case in cases(device)
        if case.dtype == torch.float32 and (case.name, case.shape) in wanted[case.group]
    ]


def smallest() -> list[Case]:
    """Every kind of case once, at a size of which many run in a second."""
    found: dict[tuple[str, str, torch.dtype], Case] = {}
    for case in sorted(cases("cpu"), key=lambda case: prod(case.shape)):
        found.setdefault((case.group, case.name, case.dtype), case)
    return [_cut(case) for case in found.values()]


def _cut(case: Case) -> Case:
    """To two samples, or groups of them."""
    if not isinstance(case, PenaltyCase | TrainingCase):
        return case
    changes: dict[str, Any] = {
        "options": tuple(o | ({"chunk_size": 1} if "chunk_size" in o else {}) for o in case.options)
    }
    batch = 2 * case.group_size if isinstance(case, PenaltyCase) else 2
    return replace(case, shape=(batch, *case.shape[1:]), **changes)


def measured_for_memory(case: Case) -> bool:
    """The two ops at their largest, and the critics that memory is short for."""
    if case.dtype != torch.float32:
        return False
    largest = case.group == "op" and case.name == BOTH and case.shape == LARGE
    return largest or (case.group == "penalty" and case.name in ("DCGAN", "ViT"))
