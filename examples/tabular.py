"""A tabular GAN with a packed critic, and a penalty with one gradient norm per pack.

    python examples/tabular.py            a picture and a JSON in out/

The table is scikit-learn's breast cancer data: 569 rows of 30 skewed, correlated measurements. As in PacGAN and CTGAN,
the critic scores several rows together (a pack), so that it can detect rows that are too similar. `group_size` gives
each pack one alpha and one norm. The distribution of each column and the correlations are compared before and after
training.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fused_gp import fused_gradient_penalty

from report import COLORS, median_and_range, parse_arguments, progress, save_json, save_picture

PACK = 4
BATCH = 128  # rows
NOISE_DIM = 32
CRITIC_STEPS = 5
PENALTY_WEIGHT = 10.0
LEARNING_RATE = 5e-4
BETAS = (0.5, 0.9)
COLUMNS_SHOWN = (
    "mean radius",
    "mean texture",
    "mean concavity",
    "area error",
    "worst symmetry",
    "worst fractal dimension",
)


class PackedCritic(nn.Module):
    """Maps (rows, columns) to one score per pack of consecutive rows."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(PACK * columns, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1)
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows.reshape(len(rows) // PACK, -1))


def make_generator(columns: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE_DIM, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, columns),
    )  # fmt: skip


def load_table(seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Training and held-out rows (half each), standardised with the training rows' statistics, and the column names."""
    table = load_breast_cancer()
    training, held_out = train_test_split(table.data, test_size=0.5, random_state=seed, stratify=table.target)
    mean, deviation = training.mean(0), training.std(0)
    return (training - mean) / deviation, (held_out - mean) / deviation, list(table.feature_names)


def train(generator: nn.Module, critic: nn.Module, table: Tensor, steps: int) -> None:
    generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS)
    critic_optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, BETAS)
    for _ in range(steps):
        for _ in range(CRITIC_STEPS):
            real = table[torch.randint(len(table), (BATCH,))]
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, NOISE_DIM))
            penalty = fused_gradient_penalty(critic, real, fake, weight=PENALTY_WEIGHT, group_size=PACK)
            loss = critic(fake).mean() - critic(real).mean() + penalty
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
        loss = -critic(generator(torch.randn(BATCH, NOISE_DIM))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()


@torch.no_grad()
def generate_rows(generator: nn.Module, count: int) -> np.ndarray:
    generator.eval()
    rows = generator(torch.randn(count, NOISE_DIM)).double().numpy()
    generator.train()
    return rows


def compare_with_held_out(rows: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Distances from the held-out rows: of each column, in standard deviations, and of the correlations."""
    marginals = [wasserstein_distance(*pair) for pair in zip(rows.T, held_out.T, strict=True)]
    correlations = np.abs(np.corrcoef(rows.T) - np.corrcoef(held_out.T))
    return {
        "mean_marginal_distance": float(np.mean(marginals)),
        "worst_marginal_distance": float(np.max(marginals)),
        "mean_correlation_error": float(correlations[np.triu_indices_from(correlations, 1)].mean()),
    }


def run(seed: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    torch.manual_seed(seed)
    training, held_out, names = load_table(seed)
    generator, critic = make_generator(len(names)), PackedCritic(len(names))
    before = generate_rows(generator, len(held_out))
    train(generator, critic, torch.from_numpy(training).float(), steps)
    rows = {"before": before, "after": generate_rows(generator, len(held_out)), "real": training}
    results = [{"rows": name, "seed": seed, **compare_with_held_out(drawn, held_out)} for name, drawn in rows.items()]
    return results, rows


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table shown in docs/figures.md."""
    rows = [
        "| rows | mean distance of a column | of the worst column | mean error of a correlation |",
        "|---|---|---|---|",
    ]
    for name in ("before", "after", "real"):
        seed_rows = [row for row in results if row["rows"] == name]
        columns = ("mean_marginal_distance", "worst_marginal_distance", "mean_correlation_error")
        rows.append(f"| {name} | {' | '.join(median_and_range([row[c] for row in seed_rows]) for c in columns)} |")
    return "\n".join(rows)


def plot(path: Path, rows: dict[str, np.ndarray], names: list[str]) -> None:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, name in zip(panels.flat, COLUMNS_SHOWN, strict=True):
        column = names.index(name)
        low, high = np.quantile(rows["real"][:, column], [0.0, 0.99])
        bins = np.linspace(low - 1, high + 1, 40)
        axes.hist(rows["real"][:, column], bins, color="#bbbbbb", label="real", density=True)
        for drawn, color, line in (("before", COLORS[1], "--"), ("after", COLORS[0], "-")):
            axes.hist(
                rows[drawn][:, column], bins, color=color, label=drawn, histtype="step", linestyle=line, density=True
            )
        real = rows["real"][:, column]
        # Before training, the histogram is one spike, so the axis is scaled to the real rows.
        axes.set_ylim(0, 1.6 * np.histogram(real, bins, density=True)[0].max())
        axes.set_title(name, fontsize=10)
        axes.set_yticks([])
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("standard deviations from the mean", fontsize=10)
    figure.supylabel("density", fontsize=10)
    save_picture(path, figure)


def main() -> None:
    args = parse_arguments("Train a tabular GAN with a packed critic.", "20 steps, one seed: little is learned")
    steps = 20 if args.quick else 1500
    runs = {seed: run(seed, steps) for seed in progress(args.seeds, "seeds")}
    results = [row for rows, _ in runs.values() for row in rows]
    _, _, names = load_table(args.seeds[0])
    plot(args.out / "tabular.png", runs[args.seeds[0]][1], names)
    settings = {"steps": steps, "seeds": args.seeds, "quick": args.quick, "pack": PACK, "batch": BATCH}
    save_json(args.out / "tabular.json", {"settings": settings, "results": results})
    print(table(results))
    print(f"\nSee tabular.png and tabular.json in {args.out}/")


if __name__ == "__main__":
    main()
