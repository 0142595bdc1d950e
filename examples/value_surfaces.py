"""What a critic sees: its values over the plane, trained by weight clipping and by gradient penalty.

    python examples/value_surfaces.py            a picture and a JSON in out/

Figure 1 of "Improved Training of Wasserstein GANs": the generator is fixed, real samples plus Gaussian noise of unit
variance, and the critic is trained until its loss no longer changes. Under clipping it uses little of its capacity, and
its level sets are plain; under the penalty they follow the data. Two numbers hold that: how often a real sample is
valued above a point at some distance from it, and how near the critic's estimate comes to the exact Wasserstein
distance.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from report import COLORS, over_seeds, parse_arguments, progress, save, save_picture
from toy_critics import (
    DATA,
    add_noise,
    gradient_norms,
    make_critic,
    optimal_coupling,
    train_by_clipping,
    train_by_penalty,
)

CLIPPING, PENALTY, HEAVY = "clipping", "penalty", "penalty, 10 throughout"
BATCH = 64
WIDTH = 512
BOUND = 0.01
LEARNING_RATE = 1e-3  # of the penalty; clipping has that of its paper
AWAY = 0.35  # half of the way from one of the 25 Gaussians to the next
LOOKED_AT = 4000
# Under a weight of 10 from the start a critic is slow to leave the plain cone that it finds first: 25 modes take many
# more steps than there are here, as the last of these shows. Under 1 it is quick, but its norms end above 1.
CRITICS = [(name, method) for name in DATA for method in (CLIPPING, PENALTY)] + [("25 Gaussians", HEAVY)]
GRID = torch.linspace(-2.5, 2.5, 101)


def exact_distance(name: str, draws: int, count: int) -> float:
    """Mean over some draws of so many samples, each coupled exactly."""
    distances = [optimal_coupling(DATA[name](count), add_noise(DATA[name](count)))[1] for _ in range(draws)]
    return float(np.mean(distances))


def penalty_weight(done: float) -> float:
    return 1.0 if done < 0.6 else 10.0


@torch.no_grad()
def estimate(critic: nn.Module, real: Tensor, fake: Tensor) -> float:
    return (critic(real).mean() - critic(fake).mean()).item()


def above_surroundings(critic: nn.Module, real: Tensor) -> float:
    """How often a real sample's value is above that of a point AWAY from it. One half is chance."""
    angle = 2 * math.pi * torch.rand(len(real))
    around = real + AWAY * torch.stack((angle.cos(), angle.sin()), 1)
    with torch.no_grad():
        return (critic(real) > critic(around)).double().mean().item()


def run(name: str, method: str, seed: int, steps: int) -> tuple[dict[str, Any], Tensor]:
    """Numbers, and values on the grid."""
    torch.manual_seed(seed)
    data = DATA[name]
    critic = make_critic(hidden_layers=3, width=WIDTH)

    def sample() -> tuple[Tensor, Tensor]:
        real = data(BATCH)
        return real, add_noise(real)

    if method == CLIPPING:
        losses = train_by_clipping(critic, sample, steps, BOUND)
    else:
        weights = penalty_weight if method == PENALTY else lambda _: 10.0
        losses = train_by_penalty(critic, sample, steps, LEARNING_RATE, weights)
    real, fake = data(LOOKED_AT), add_noise(data(LOOKED_AT))
    between = fake + torch.rand(LOOKED_AT, 1) * (real - fake)
    raw = estimate(critic, real, fake)
    largest = gradient_norms(critic, torch.cat((real, fake, between))).max().item()
    numbers = {
        "data": name,
        "method": method,
        "seed": seed,
        "estimate": raw,
        "mean_norm_between": gradient_norms(critic, between).mean().item(),
        "largest_norm": largest,
        "estimate_by_largest_norm": raw / largest,  # what a critic of Lipschitz constant 1 would say
        "above_surroundings": above_surroundings(critic, real),
        # Means over ten stretches of the training: how it converged.
        "critic_loss": [float(np.mean(stretch)) for stretch in np.array_split(losses, 10)],
    }
    with torch.no_grad():
        values = critic(torch.cartesian_prod(GRID, GRID)).reshape(len(GRID), len(GRID)).T
    return numbers, values


def table(results: list[dict[str, Any]], exact: dict[str, float]) -> str:
    """Markdown; what docs/figures.md shows."""
    rows = [
        "| data | exact distance | method | estimate | divided by the largest norm | above the surroundings |",
        "|---|---|---|---|---|---|",
    ]
    for name, method in CRITICS:
        of_all_seeds = [row for row in results if (row["data"], row["method"]) == (name, method)]
        columns = ("estimate", "estimate_by_largest_norm", "above_surroundings")
        cells = " | ".join(over_seeds([row[column] for row in of_all_seeds]) for column in columns)
        rows.append(f"| {name} | {exact[name]:.2f} | {method} | {cells} |")
    return "\n".join(rows)


def draw(path: Path, surfaces: dict[tuple[str, str], Tensor]) -> None:
    """Of the first seed."""
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
    args = parse_arguments("Value surfaces of critics by clipping and by penalty.", "30 steps, one seed")
    steps, draws, count = (30, 1, 500) if args.quick else (2000, 5, 2000)
    torch.manual_seed(args.seeds[0])
    exact = {name: exact_distance(name, draws, count) for name in DATA}
    results: list[dict[str, Any]] = []
    surfaces: dict[tuple[str, str], Tensor] = {}
    runs = [(name, method, seed) for seed in args.seeds for name, method in CRITICS]
    for name, method, seed in progress(runs, "critics"):
        numbers, values = run(name, method, seed, steps)
        results.append(numbers)
        surfaces.setdefault((name, method), values)
    draw(args.out / "value_surfaces.png", surfaces)
    settings = {"steps": steps, "seeds": args.seeds, "quick": args.quick, "batch": BATCH, "width": WIDTH, "away": AWAY}
    save(args.out / "value_surfaces.json", {"settings": settings, "exact": exact, "results": results})
    print(table(results, exact))
    print(f"\nSee value_surfaces.png and value_surfaces.json in {args.out}/")


if __name__ == "__main__":
    main()
