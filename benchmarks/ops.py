"""Time the two ops, and the whole call around a critic that costs next to nothing, against the snippet.

    python -m benchmarks.ops [--device cpu] [--rounds N] [--json FILE]

Rounds alternate between the two, so that a change of the machine's speed meets both. The ratio is taken round by
round; above 1 ours is faster. Nothing is timed before both gave the same numbers.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import snippet, timing
from fused_gp import fused_gradient_penalty, gradient_norm_penalty, interpolate

SHAPES = [(2, 4), (64, 2), (64, 784), (64, 3, 64, 64), (64, 3, 256, 256)]

Step = Callable[[], list[Tensor]]


def ops_case(shape: tuple[int, ...], device: str) -> tuple[Step, Step]:
    """Interpolation, then penalty forward and backward on given gradients: all but the critic."""
    real, fake, gradients = (torch.randn(shape, device=device) for _ in range(3))
    alpha = torch.rand(shape[0], *[1] * (len(shape) - 1), device=device)

    def step(between: Callable[..., Tensor], penalise: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x_hat = between(real, fake, alpha)
        leaf = gradients.detach().requires_grad_()
        penalty = penalise(leaf)
        penalty.backward()
        assert leaf.grad is not None
        return [x_hat, penalty, leaf.grad]

    return (
        lambda: step(interpolate, gradient_norm_penalty),
        lambda: step(snippet.interpolate, snippet.norm_penalty),
    )


def call_case(shape: tuple[int, ...], device: str) -> tuple[Step, Step]:
    """The whole call and the backward to the weight of a linear critic."""
    real, fake = (torch.randn(shape, device=device) for _ in range(2))
    weight = torch.randn(shape[1:], device=device).flatten().requires_grad_()

    def step(penalise: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        penalty = penalise(lambda x: x.flatten(1) @ weight, real, fake)
        return [penalty, *torch.autograd.grad(penalty, weight)]

    return lambda: step(fused_gradient_penalty), lambda: step(snippet.gradient_penalty)


def measure(ours: Step, peer: Step, rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, and median and quartiles of the ratio peer / ours."""
    for one, two in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)

    times = [(timing.seconds(ours, device), timing.seconds(peer, device)) for _ in range(rounds)]
    ours_seconds, peer_seconds = zip(*times, strict=True)
    return {
        "ours_ms": 1e3 * statistics.median(ours_seconds),
        "peer_ms": 1e3 * statistics.median(peer_seconds),
        **timing.ratio(peer_seconds, ours_seconds),
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, help="rounds per case (default: by size, 25 to 2000)")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()

    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    cases = [(name, make, shape) for name, make in (("ops", ops_case), ("call", call_case)) for shape in SHAPES]
    for name, make, shape in track(cases, "timing", transient=True):
        rounds = options.rounds or max(25, min(2000, 10_000_000 // torch.Size(shape).numel()))
        figures = measure(*make(shape, options.device), rounds, options.device)
        results.append({"case": name, "shape": list(shape), "rounds": rounds, **figures})

    title = (
        f"against the snippet, fp32 on {options.device}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    table = Table("case", "shape", "ours, ms", "snippet, ms", "snippet / ours", "quartiles", title=title)
    for row in results:
        numbers = (f"{row['ours_ms']:.3f}", f"{row['peer_ms']:.3f}", f"{row['ratio']:.2f}")
        table.add_row(
            row["case"], str(tuple(row["shape"])), *numbers, f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        )
    Console().print(table)
    print("ops: interpolation + penalty, forward and backward. call: the whole call and the backward to the weights.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"title": title, "results": results}, indent=1))


if __name__ == "__main__":
    main()
