"""The theorem behind the penalty: the optimal critic has gradient norm 1 between real and fake samples.

    python examples/unit_gradient_norm.py            a picture and a JSON in out/

Proposition 1 of "Improved Training of Wasserstein GANs": along the straight line from a fake sample y to the real
sample x that the optimal transport couples it with, the optimal critic's gradient is (x - y) / |x - y|. Real samples
come from eight Gaussians, fake samples from one Gaussian in their middle. The coupling is computed exactly, and the
critic's gradient is measured on its lines before, during and after training, with the two-sided and the one-sided
penalty.
"""

import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_gp import fused_gradient_penalty

from report import COLORS, median_and_range, parse_arguments, progress, save_json, save_picture
from toy_critics import eight_gaussians, make_critic, optimal_coupling

BATCH = 256
WIDTH = 128
PENALTY_WEIGHT = 10.0
LEARNING_RATE = 1e-3
BETAS = (0.5, 0.9)
COUPLED_SAMPLES = 1000
BINS = 100
HISTOGRAM_MAX = 2
PENALTIES = {"two-sided": False, "one-sided": True}  # name -> one_sided


def one_gaussian(count: int) -> Tensor:
    return 0.2 * torch.randn(count, 2)


def train(
    critic: nn.Module, one_sided: bool, steps: int, measured_steps: Collection[int], coupled: tuple[Tensor, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Trains the critic. Returns `gradients_along` the lines between coupled samples at each of the measured steps."""
    measurements = {}
    optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, BETAS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for step in range(steps + 1):
        if step in measured_steps:
            measurements[step] = gradients_along(critic, *coupled)
        real, fake = eight_gaussians(BATCH), one_gaussian(BATCH)
        penalty = fused_gradient_penalty(critic, real, fake, weight=PENALTY_WEIGHT, one_sided=one_sided)
        loss = critic(fake).mean() - critic(real).mean() + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return measurements


def gradients_along(critic: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Gradient norms at random points on the lines from fake to real, and cosines between gradient and line."""
    points = (fake + torch.rand(len(real), 1) * (real - fake)).requires_grad_()
    (gradients,) = torch.autograd.grad(critic(points).sum(), points)
    return {"norm": gradients.norm(dim=1), "cosine": torch.cosine_similarity(gradients, real - fake)}


def run(seed: int, steps: int) -> list[dict[str, Any]]:
    results = []
    for name, one_sided in PENALTIES.items():
        torch.manual_seed(seed)  # the same initial critic, samples and alphas for both penalties
        real, fake = eight_gaussians(COUPLED_SAMPLES), one_gaussian(COUPLED_SAMPLES)
        partner, distance = optimal_coupling(real, fake)
        critic = make_critic(hidden_layers=3, width=WIDTH)
        measurements = train(critic, one_sided, steps, (0, steps // 10, steps), (real, fake[partner]))
        with torch.no_grad():
            estimate = (critic(eight_gaussians(10_000)).mean() - critic(one_gaussian(10_000)).mean()).item()
        for step, gradients in measurements.items():
            norms = gradients["norm"].tolist()
            low, median, high = statistics.quantiles(norms, n=4)
            results.append(
                {
                    "penalty": name,
                    "seed": seed,
                    "step": step,
                    "median_norm": median,
                    "half_of_norms_within": [low, high],
                    "share_within_a_tenth_of_1": sum(abs(norm - 1) < 0.1 for norm in norms) / len(norms),
                    "mean_cosine": gradients["cosine"].mean().item(),
                    "wasserstein_estimate_at_the_end": estimate,
                    "wasserstein_exact": distance,
                    "histogram": torch.histc(gradients["norm"], BINS, 0, HISTOGRAM_MAX).int().tolist(),
                }
            )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table shown in docs/figures.md."""
    rows = [
        "| penalty | step | median norm | share of norms within 0.1 of 1 | mean cosine with the line |",
        "|---|---|---|---|---|",
    ]
    for name in PENALTIES:
        for step in sorted({row["step"] for row in results}):
            seed_rows = [row for row in results if row["penalty"] == name and row["step"] == step]
            columns = ("median_norm", "share_within_a_tenth_of_1", "mean_cosine")
            cells = " | ".join(median_and_range([row[column] for row in seed_rows]) for column in columns)
            rows.append(f"| {name} | {step} | {cells} |")
    return "\n".join(rows)


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    first_seed = min(row["seed"] for row in results)
    steps = sorted({row["step"] for row in results})
    panels = figure.subplots(1, len(PENALTIES), sharey=True)
    for axes, name in zip(panels, PENALTIES, strict=True):
        for step, color in zip(steps, COLORS[::-1][-3:], strict=True):
            (row,) = (r for r in results if (r["penalty"], r["seed"], r["step"]) == (name, first_seed, step))
            edges = torch.linspace(0, HISTOGRAM_MAX, BINS + 1)
            axes.stairs(row["histogram"], edges, fill=True, color=color, alpha=0.75, label=f"step {step}")
        axes.axvline(1, color="black", linestyle="--", linewidth=1)
        axes.set_xlim(0, HISTOGRAM_MAX)
        axes.set(title=f"{name} penalty", xlabel="gradient norm on the coupling's lines", yscale="log")
    panels[0].set_ylabel("points")
    panels[0].legend()
    save_picture(path, figure)


def main() -> None:
    args = parse_arguments(
        "Gradient norms of a critic on lines between optimally coupled samples.", "100 steps, one seed"
    )
    steps = 100 if args.quick else 2000
    results = [row for seed in progress(args.seeds, "seeds") for row in run(seed, steps)]
    plot(args.out / "unit_gradient_norm.png", results)
    settings = {"steps": steps, "seeds": args.seeds, "quick": args.quick, "batch": BATCH, "width": WIDTH}
    settings |= {"penalty_weight": PENALTY_WEIGHT, "learning_rate": LEARNING_RATE, "betas": BETAS}
    save_json(args.out / "unit_gradient_norm.json", {"settings": settings, "results": results})
    print(table(results))
    print(f"\nSee unit_gradient_norm.png and unit_gradient_norm.json in {args.out}/")


if __name__ == "__main__":
    main()
