"""What the host pays: processor time of the two ops on a null device, and of the snippet's operations on the CPU.

    python -m benchmarks.host [--rounds N] [--json FILE]

On GPUs, batches of a GAN's size take less time to compute than to launch. Ours is timed up to the launch itself: every
argument checked, every kernel chosen, its call written down. The snippet's operations are dispatched to CPU tensors,
too small for their arithmetic to count. Rounds alternate between the two, and the ratio is taken round by round; below
1 ours is cheaper. Nothing is computed by ours here, so there is nothing to compare; benchmarks.ops does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks import provenance, results, terminal, timing
from benchmarks.options import check_rounds
from benchmarks.peers import snippet
from fused_gp import gradient_norm_penalty, interpolate
from fused_gp.kernels.null_device import Launch, null_device

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
SHAPE = (2, 4)
STEPS = 20  # per round: one takes too little time to be timed

ONE = torch.ones(())

Ops = tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]
Case = Callable[[Ops], object]


class Bare(torch.autograd.Function):
    """What a Function of two tensors costs that neither checks, allocates nor launches anything: nobody pays less."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return ctx.saved_tensors[0], None


OPS: dict[str, Ops] = {
    "ours": (
        lambda real, fake, alpha: interpolate(real, fake, alpha, backend="triton"),
        lambda gradients: gradient_norm_penalty(gradients, backend="triton"),
    ),
    "bare": (lambda real, fake, alpha: Bare.apply(fake, real), lambda gradients: Bare.apply(gradients, ONE)),
    "snippet": (snippet.interpolate, snippet.norm_penalty),
}


def cases(shape: tuple[int, ...]) -> dict[str, Case]:
    """Each op alone, and the two together: as a critic's step has them, and where fake is attached to a generator."""
    real, fake, gradients, cotangent = (torch.randn(shape) for _ in range(4))
    alpha = torch.rand(shape[0], *[1] * (len(shape) - 1))
    attached = fake.clone().requires_grad_()
    gradients.requires_grad_()

    def interpolation(ops: Ops) -> object:
        return ops[0](real, fake, alpha)

    def interpolation_and_backward(ops: Ops) -> object:
        return torch.autograd.grad(ops[0](real, attached, alpha), attached, cotangent)

    def penalty_and_backward(ops: Ops) -> object:
        return torch.autograd.grad(ops[1](gradients), gradients, ONE)

    return {
        "interpolation": interpolation,
        "interpolation and its backward": interpolation_and_backward,
        "penalty and its backward": penalty_and_backward,
        "both, as for a critic": lambda ops: (interpolation(ops), penalty_and_backward(ops)),
        "both and both backwards": lambda ops: (interpolation_and_backward(ops), penalty_and_backward(ops)),
    }


def processor_seconds(step: Callable[[], object]) -> float:
    """Of one step. Nothing here waits, so time in which other processes ran does not count."""
    start = time.process_time()
    for _ in range(STEPS):
        step()
    return (time.process_time() - start) / STEPS


def measure(case: Case, launches: list[Launch], rounds: int) -> dict[str, float]:
    """Launches, the median microseconds of each, and median and quartiles of ours / the snippet's."""
    case(OPS["ours"])  # compiles
    launches.clear()
    case(OPS["ours"])
    count = len(launches)

    def step(ops: Ops) -> None:
        case(ops)
        launches.clear()  # what a device would have freed by now

    times: dict[str, list[float]] = {name: [] for name in OPS}
    for _ in range(rounds):
        for name, ops in OPS.items():
            times[name].append(processor_seconds(partial(step, ops)))
    return {
        "launches": count,
        **{f"{name}_us": 1e6 * statistics.median(each) for name, each in times.items()},
        **timing.ratio(times["ours"], times["snippet"]),
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300, help=f"of {STEPS} steps of each, per case")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    check_rounds(parser, options.rounds)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = provenance.provenance("cpu")
    rows: list[dict[str, Any]] = []
    for name, target in TARGETS.items():
        with null_device(target) as launches:
            jobs = [(f"{name}: {case}", (case, step)) for case, step in cases(SHAPE).items()]
            for case, step in terminal.track(jobs):
                rows.append({"target": name, "case": case, **measure(step, launches, options.rounds)} | about)

    title = f"host time at {SHAPE}, fp32, torch {torch.__version__}, triton {triton.__version__}"
    columns = ("target", "case", "launches", "ours, us", "bare, us", "snippet, us", "ours / snippet", "quartiles")
    table = Table(*columns, title=title)
    for row in rows:
        numbers = [f"{row[f'{name}_us']:.1f}" for name in OPS]
        quartiles = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        table.add_row(row["target"], row["case"], str(row["launches"]), *numbers, f"{row['ratio']:.2f}", quartiles)
    Console().print(table)
    print("bare: Functions that do nothing, which autograd alone is paid for.")
    if options.json:
        results.save(options.json, rows)


if __name__ == "__main__":
    main()
