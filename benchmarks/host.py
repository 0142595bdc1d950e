"""Time what the host pays: the two ops on a null device, which launches nothing, against the snippet's ops on the CPU.

    python -m benchmarks.host [--rounds N] [--json FILE]

On GPUs, batches of a GAN's size take less time to compute than to launch. Ours is timed up to the launch itself: every
argument checked, every kernel chosen, its call written down. The snippet's operations are dispatched to CPU tensors,
too small for their arithmetic to count. Rounds alternate between the two, and the ratio is taken round by round; below
1 ours is cheaper. Nothing is computed by ours here, so there is nothing to compare; benchmarks.ops does.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks import snippet, timing
from fused_gp import gradient_norm_penalty, interpolate
from fused_gp.kernels.null_device import Launch, null_device

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
SHAPE = (2, 4)
STEPS = 20  # per round: one takes too little time to be timed

Ops = tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]

OURS: Ops = (
    lambda real, fake, alpha: interpolate(real, fake, alpha, backend="triton"),
    lambda gradients: gradient_norm_penalty(gradients, backend="triton"),
)
SNIPPET: Ops = (snippet.interpolate, snippet.norm_penalty)


def cases(shape: tuple[int, ...]) -> dict[str, Callable[[Ops], object]]:
    """Each op alone, forward and with its backward, and the two together as a critic's step has them."""
    real, fake, gradients, cotangent = (torch.randn(shape) for _ in range(4))
    alpha = torch.rand(shape[0], *[1] * (len(shape) - 1))
    for leaf in (fake, gradients):
        leaf.requires_grad_()
    one = torch.ones(())

    def interpolate_forward(ops: Ops) -> object:
        return ops[0](real, fake, alpha)

    def interpolate_both(ops: Ops) -> object:
        return torch.autograd.grad(ops[0](real, fake, alpha), fake, cotangent)

    def penalty_forward(ops: Ops) -> object:
        return ops[1](gradients)

    def penalty_both(ops: Ops) -> object:
        return torch.autograd.grad(ops[1](gradients), gradients, one)

    def both(ops: Ops) -> object:
        return interpolate_both(ops), penalty_both(ops)

    return {
        "interpolate, forward": interpolate_forward,
        "interpolate, forward and backward": interpolate_both,
        "penalty, forward": penalty_forward,
        "penalty, forward and backward": penalty_both,
        "both ops, forward and backward": both,
    }


def measure(case: Callable[[Ops], object], launches: list[Launch], rounds: int) -> dict[str, float]:
    """Median microseconds of each, the median and quartiles of ours / the snippet's, and launches per step."""
    case(OURS)  # compiles
    launches.clear()
    case(OURS)
    count = len(launches)
    times = []
    for _ in range(rounds):
        times.append(
            (timing.seconds(lambda: case(OURS), "cpu", STEPS), timing.seconds(lambda: case(SNIPPET), "cpu", STEPS))
        )
        launches.clear()
    ours, theirs = zip(*times, strict=True)
    return {
        "launches": count,
        "ours_us": 1e6 * statistics.median(ours),
        "snippet_us": 1e6 * statistics.median(theirs),
        **timing.ratio(ours, theirs),
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300, help=f"of {STEPS} steps of each, per case")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    for name, target in TARGETS.items():
        with null_device(target) as launches:
            for case, step in track(cases(SHAPE).items(), f"timing {name}", transient=True):
                results.append({"target": name, "case": case, **measure(step, launches, options.rounds)})

    title = f"host time at {SHAPE}, fp32, torch {torch.__version__}, triton {triton.__version__}"
    table = Table("target", "case", "launches", "ours, us", "snippet, us", "ours / snippet", "quartiles", title=title)
    for row in results:
        table.add_row(
            row["target"], row["case"], str(row["launches"]), f"{row['ours_us']:.1f}", f"{row['snippet_us']:.1f}",
            f"{row['ratio']:.2f}", f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"title": title, "results": results}, indent=1))


if __name__ == "__main__":
    main()
