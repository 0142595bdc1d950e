"""Exploding and vanishing gradients in a critic with twelve hidden layers, and the distribution of its weights.

    python examples/gradients_by_layer.py            a picture and a JSON in out/

Critics with 12 hidden layers are trained on the Swiss roll with weights clipped at 0.1, 0.01 and 0.001, and with the
gradient penalty (Figure 2 of "Improved Training of Wasserstein GANs"). After training, the gradient of the critic's
loss with respect to each layer's activations is computed. Over the layers, the logarithm of its norm falls or rises
linearly with clipping, and stays level with the penalty.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from report import COLORS, median_and_range, parse_arguments, progress, save_json, save_picture
from toy_critics import add_noise, clip_weights, make_critic, swiss_roll, train_by_clipping, train_by_penalty

HIDDEN_LAYERS = 12
WIDTH = 512
BATCH = 64
PENALTY_WEIGHT = 10.0
LEARNING_RATE = 1e-4  # with the penalty; clipping uses that of the WGAN paper
BOUNDS = {"penalty": None, "clipping at 0.1": 0.1, "clipping at 0.01": 0.01, "clipping at 0.001": 0.001}
BINS = 60


def gradient_by_layer(critic: nn.Sequential) -> list[float]:
    """The norm of the loss's gradient with respect to the activations of each hidden layer, from first to last."""
    real = swiss_roll(1000)
    x = torch.cat((real, add_noise(real)))
    activations = []
    for module in critic:
        x = module(x)
        if isinstance(module, nn.ReLU):
            activations.append(x)
    loss = x[1000:].mean() - x[:1000].mean()
    return [gradient.double().norm().item() for gradient in torch.autograd.grad(loss, activations)]


def slope(norms: list[float]) -> float | None:
    """In decades per layer towards the input: below 0 the gradient vanishes, above 0 it explodes.

    None if a norm underflowed to 0.
    """
    if min(norms) == 0:
        return None
    return -float(np.polyfit(range(len(norms)), np.log10(norms), 1)[0])


def share_at_the_bounds(weights: torch.Tensor, bound: float) -> float:
    return (weights.abs() >= 0.999 * bound).double().mean().item()


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    critic = make_critic(HIDDEN_LAYERS, WIDTH)
    bound = BOUNDS[name]

    def hidden_weights() -> torch.Tensor:
        matrices = [module.weight.detach().flatten() for module in critic if isinstance(module, nn.Linear)]
        return torch.cat(matrices[1:-1])  # without the first and the last layer, which have 2 inputs and 1 output

    if bound is not None:
        clip_weights(critic, bound)  # before measuring the share of weights at the bounds
    limit = bound or hidden_weights().abs().max().item()
    share_before = share_at_the_bounds(hidden_weights(), limit)

    def sample_pair() -> tuple[torch.Tensor, torch.Tensor]:
        real = swiss_roll(BATCH)
        return real, add_noise(real)

    if bound is None:
        train_by_penalty(critic, sample_pair, steps, LEARNING_RATE, lambda _: PENALTY_WEIGHT)
    else:
        train_by_clipping(critic, sample_pair, steps, bound)
    norms = gradient_by_layer(critic)
    limit = bound or hidden_weights().abs().max().item()
    counts, edges = np.histogram(hidden_weights().numpy(), BINS, (-limit, limit))
    return {
        "method": name,
        "seed": seed,
        "gradient_norms": norms,
        "slope_in_decades_per_layer": slope(norms),
        "largest_weight": limit,
        "share_at_the_bounds": share_at_the_bounds(hidden_weights(), limit),
        "share_at_the_bounds_before_training": share_before,
        "histogram": {"counts": counts.tolist(), "edges": [float(f"{edge:.4g}") for edge in edges]},
    }


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table shown in docs/figures.md."""
    rows = [
        "| method | slope, decades per layer | weights at the bounds, before training | after |",
        "|---|---|---|---|",
    ]
    for name in BOUNDS:
        seed_rows = [row for row in results if row["method"] == name]
        slopes = [row["slope_in_decades_per_layer"] for row in seed_rows]
        cells = ["underflow" if None in slopes else median_and_range(slopes)]
        for column in ("share_at_the_bounds_before_training", "share_at_the_bounds"):
            cells.append(median_and_range([100 * row[column] for row in seed_rows], 1) + " %")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    lines, *histograms = figure.subplot_mosaic(
        [["lines", "penalty", "clipping at 0.1"], ["lines", "clipping at 0.01", "clipping at 0.001"]],
        width_ratios=[1.5, 1, 1],
    ).values()
    markers = "osD^"
    for name, color, marker in zip(BOUNDS, COLORS, markers, strict=False):
        norms = np.median([row["gradient_norms"] for row in results if row["method"] == name], axis=0)
        lines.plot(range(1, HIDDEN_LAYERS + 1), norms, color=color, marker=marker, markersize=4, label=name)
    lines.set(xlabel="hidden layer", ylabel="norm of the loss's gradient at its activations", yscale="log")
    lines.set_xticks(range(1, HIDDEN_LAYERS + 1))
    lines.legend(fontsize=8)
    lines.grid(alpha=0.3)
    first_seed = min(row["seed"] for row in results)
    panels = dict(zip(("penalty", "clipping at 0.1", "clipping at 0.01", "clipping at 0.001"), histograms, strict=True))
    for (name, axes), color in zip(panels.items(), COLORS, strict=False):
        (row,) = (r for r in results if (r["method"], r["seed"]) == (name, first_seed))
        counts, edges = row["histogram"]["counts"], row["histogram"]["edges"]
        axes.stairs(np.divide(counts, sum(counts)), edges, fill=True, color=color)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("weight", fontsize=8)
        axes.set_xticks([edges[0], 0, edges[-1]], [f"{edges[0]:.2g}", "0", f"{edges[-1]:.2g}"])
        axes.tick_params(labelsize=8)
    save_picture(path, figure)


def main() -> None:
    args = parse_arguments(
        "Gradients by layer, and the distribution of the weights, of a deep critic.", "10 steps, one seed"
    )
    steps = 10 if args.quick else 200
    runs = [(name, seed) for seed in args.seeds for name in BOUNDS]
    results = [run(name, seed, steps) for name, seed in progress(runs, "critics")]
    plot(args.out / "gradients_by_layer.png", results)
    settings = {"steps": steps, "seeds": args.seeds, "quick": args.quick, "batch": BATCH, "width": WIDTH}
    save_json(args.out / "gradients_by_layer.json", {"settings": settings, "results": results})
    print(table(results))
    print(f"\nSee gradients_by_layer.png and gradients_by_layer.json in {args.out}/")


if __name__ == "__main__":
    main()
