"""Value surfaces of critics on 2-D data, trained by weight clipping and by gradient penalty.

    python examples/value_surfaces.py            a picture and a JSON in out/

Figure 1 of "Improved Training of Wasserstein GANs": the generator is fixed (real samples plus Gaussian noise of unit
variance), and the critic is trained until its loss no longer changes. With clipping, the critic uses little of its
capacity, and its level sets are simple; with the penalty, they follow the data. Two numbers measure this: how often the
critic's value is higher at a real sample than at a point at some distance from it, and how close the critic's estimate
is to the exact Wasserstein distance.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from report import COLORS, median_and_range, parse_arguments, progress, save_json, save_picture
from toy_critics import (
    DATA,
    add_noise,
    gradient_norms,
    make_critic,
    optimal_coupling,
    train_by_clipping,
    train_by_penalty,
)

CLIPPING, PENALTY, CONSTANT_WEIGHT = "clipping", "penalty", "penalty, 10 throughout"
BATCH = 64
WIDTH = 512
CLIP_BOUND = 0.01
LEARNING_RATE = 1e-3  # with the penalty; clipping uses that of the WGAN paper
NEIGHBOUR_DISTANCE = 0.35  # half the distance between adjacent modes of the 25 Gaussians
EVALUATION_SAMPLES = 4000
# With a penalty weight of 10 from the start, a critic is slow to leave the single cone that it learns first: 25 modes
# take many more steps than are run here, as the last case shows. With a weight of 1 it is fast, but its gradient norms
# end above 1. Hence the schedule in `penalty_weight`.
CASES = [(name, method) for name in DATA for method in (CLIPPING, PENALTY)] + [("25 Gaussians", CONSTANT_WEIGHT)]
GRID = torch.linspace(-2.5, 2.5, 101)


def exact_distance(name: str, draws: int, count: int) -> float:
    """The exact Wasserstein distance between `count` real and `count` fake samples, mean over `draws` draws."""
    distances = [optimal_coupling(DATA[name](count), add_noise(DATA[name](count)))[1] for _ in range(draws)]
    return float(np.mean(distances))


def penalty_weight(fraction_of_steps: float) -> float:
    return 1.0 if fraction_of_steps < 0.6 else 10.0


@torch.no_grad()
def wasserstein_estimate(critic: nn.Module, real: Tensor, fake: Tensor) -> float:
    return (critic(real).mean() - critic(fake).mean()).item()


def above_surroundings(critic: nn.Module, real: Tensor) -> float:
    """How often the value at a real sample is above that at a point NEIGHBOUR_DISTANCE from it. Chance: 0.5."""
    angle = 2 * math.pi * torch.rand(len(real))
    neighbours = real + NEIGHBOUR_DISTANCE * torch.stack((angle.cos(), angle.sin()), 1)
    with torch.no_grad():
        return (critic(real) > critic(neighbours)).double().mean().item()


def run(name: str, method: str, seed: int, steps: int) -> tuple[dict[str, Any], Tensor]:
    """Trains one critic. Returns its results and its values on the grid."""
    torch.manual_seed(seed)
    data = DATA[name]
    critic = make_critic(hidden_layers=3, width=WIDTH)

    def sample_pair() -> tuple[Tensor, Tensor]:
        real = data(BATCH)
        return real, add_noise(real)

    if method == CLIPPING:
        losses = train_by_clipping(critic, sample_pair, steps, CLIP_BOUND)
    else:
        weight = penalty_weight if method == PENALTY else lambda _: 10.0
        losses = train_by_penalty(critic, sample_pair, steps, LEARNING_RATE, weight)
    real, fake = data(EVALUATION_SAMPLES), add_noise(data(EVALUATION_SAMPLES))
    between = fake + torch.rand(EVALUATION_SAMPLES, 1) * (real - fake)
    estimate = wasserstein_estimate(critic, real, fake)
    largest_norm = gradient_norms(critic, torch.cat((real, fake, between))).max().item()
    result = {
        "data": name,
        "method": method,
        "seed": seed,
        "estimate": estimate,
        "mean_norm_between": gradient_norms(critic, between).mean().item(),
        "largest_norm": largest_norm,
        "estimate_by_largest_norm": estimate / largest_norm,  # the critic rescaled to Lipschitz constant 1
        "above_surroundings": above_surroundings(critic, real),
        # Means over ten consecutive parts of the training, to check convergence.
        "critic_loss": [float(np.mean(part)) for part in np.array_split(losses, 10)],
    }
    with torch.no_grad():
        values = critic(torch.cartesian_prod(GRID, GRID)).reshape(len(GRID), len(GRID)).T
    return result, values


def table(results: list[dict[str, Any]], exact: dict[str, float]) -> str:
    """The Markdown table shown in docs/figures.md."""
    rows = [
        "| data | exact distance | method | estimate | divided by the largest norm | above the surroundings |",
        "|---|---|---|---|---|---|",
    ]
    for name, method in CASES:
        seed_rows = [row for row in results if (row["data"], row["method"]) == (name, method)]
        columns = ("estimate", "estimate_by_largest_norm", "above_surroundings")
        cells = " | ".join(median_and_range([row[column] for row in seed_rows]) for column in columns)
        rows.append(f"| {name} | {exact[name]:.2f} | {method} | {cells} |")
    return "\n".join(rows)


def plot(path: Path, surfaces: dict[tuple[str, str], Tensor]) -> None:
    """Level sets of the first seed's critics."""
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    panels = figure.subplots(2, len(DATA), sharex=True, sharey=True)
    for row, method in zip(panels, (CLIPPING, PENALTY), strict=True):
        for axes, (name, data) in zip(row, DATA.items(), strict=True):
            values = surfaces[name, method]
            axes.contour(GRID, GRID, values, levels=16, cmap="viridis", linewidths=1)
            axes.scatter(*data(300).T, s=5, color=COLORS[1], zorder=2)
            axes.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
        row[0].set_ylabel("weight clipping" if method == CLIPPING else "gradient penalty", fontsize=12)
    for axes, name in zip(panels[0], DATA, strict=True):
        axes.set_title(name)
    save_picture(path, figure)


def main() -> None:
    args = parse_arguments(
        "Value surfaces of critics trained by weight clipping and by gradient penalty.", "30 steps, one seed"
    )
    steps, draws, count = (30, 1, 500) if args.quick else (2000, 5, 2000)
    torch.manual_seed(args.seeds[0])
    exact = {name: exact_distance(name, draws, count) for name in DATA}
    results: list[dict[str, Any]] = []
    surfaces: dict[tuple[str, str], Tensor] = {}
    runs = [(name, method, seed) for seed in args.seeds for name, method in CASES]
    for name, method, seed in progress(runs, "critics"):
        result, values = run(name, method, seed, steps)
        results.append(result)
        surfaces.setdefault((name, method), values)
    plot(args.out / "value_surfaces.png", surfaces)
    settings = {
        "steps": steps,
        "seeds": args.seeds,
        "quick": args.quick,
        "batch": BATCH,
        "width": WIDTH,
        "away": NEIGHBOUR_DISTANCE,
    }
    save_json(args.out / "value_surfaces.json", {"settings": settings, "exact": exact, "results": results})
    print(table(results, exact))
    print(f"\nSee value_surfaces.png and value_surfaces.json in {args.out}/")


if __name__ == "__main__":
    main()
