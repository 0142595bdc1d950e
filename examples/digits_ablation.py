"""WGAN (weight clipping) against WGAN-GP on the handwritten digits of `digits.py`, with three critics for WGAN-GP.

    python examples/digits_ablation.py            a picture and a JSON in out/

All runs use the same generator and the same number of critic steps, with several seeds. Weight clipping uses the
optimizer of the WGAN paper (RMSprop, 5e-5), and the same at ten times the learning rate. The gradient penalty is used
with the critic as it is, with layer normalisation, and with batch normalisation, where a sample's score, and so its
gradient, depends on the batch. Two numbers measure the quality of the samples: the Inception score with a forest as the
classifier, and the Frechet distance from held-out digits between features of a small network.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_gp import fused_gradient_penalty

from digits import (
    BATCH,
    BETAS,
    CRITIC_STEPS,
    EMA_DECAY,
    LEARNING_RATE,
    NOISE_DIM,
    PENALTY_WEIGHT,
    generate_samples,
    make_generator,
)
from digits import make_critic as plain_critic
from report import COLORS, median_and_range, parse_arguments, progress, save_json, save_picture
from toy_critics import clip_weights

SAMPLES = 2000
SAMPLES_SHOWN = 40


class Method(NamedTuple):
    clip_bound: float | None = None
    learning_rate: float = LEARNING_RATE
    normalisation: type[nn.Module] | None = None


METHODS = {
    "penalty": Method(),
    "penalty, LayerNorm": Method(normalisation=nn.LayerNorm),
    "penalty, BatchNorm": Method(normalisation=nn.BatchNorm1d),
    "clipping": Method(clip_bound=0.01, learning_rate=5e-5),
    "clipping, 10 times the rate": Method(clip_bound=0.01, learning_rate=5e-4),
}


def make_critic(normalisation: type[nn.Module] | None) -> nn.Module:
    """The critic of `digits.py`, with LayerNorm or BatchNorm, if given, before the activation of each hidden layer."""
    critic = plain_critic()
    if normalisation is None:
        return critic
    assert isinstance(critic, nn.Sequential)
    conv, activation, flatten, linear, _, last = critic
    after_conv = nn.BatchNorm2d(16) if normalisation is nn.BatchNorm1d else nn.LayerNorm([16, 4, 4])
    return nn.Sequential(conv, after_conv, activation, flatten, linear, normalisation(256), activation, last)


class SampleQuality:
    """The quality of generated digits, by a classifier and a feature network trained on one half of the real digits.

    The other half is held out, for comparison.
    """

    def __init__(self, seed: int) -> None:
        pixels, labels = load_digits(return_X_y=True)
        self.training, self.held_out, training_labels, _ = train_test_split(
            pixels / 8 - 1, labels, test_size=0.5, random_state=seed, stratify=labels
        )
        self.forest = ExtraTreesClassifier(300, random_state=seed).fit(self.training, training_labels)
        with threadpool_limits(1):  # with more threads, most of the time is synchronisation
            self.network = MLPClassifier([64], random_state=seed, max_iter=500).fit(self.training, training_labels)
        self.held_out_features = self.features(self.held_out)

    def features(self, images: np.ndarray) -> np.ndarray:
        return np.maximum(images @ self.network.coefs_[0] + self.network.intercepts_[0], 0)

    def frechet(self, images: np.ndarray) -> float:
        """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), with mean m and covariance C of the features of the images, m' and
        C' of those of the held-out digits."""
        features, held_out = self.features(images), self.held_out_features
        covariance, held_out_covariance = np.cov(features.T), np.cov(held_out.T)
        roots = np.sqrt(np.clip(np.linalg.eigvals(covariance @ held_out_covariance).real, 0, None))
        squared_distance = ((features.mean(0) - held_out.mean(0)) ** 2).sum()
        return float(squared_distance + np.trace(covariance + held_out_covariance) - 2 * roots.sum())

    def score(self, images: np.ndarray) -> float:
        """The Inception score formula: exp of the mean KL divergence of an image's class probabilities from their mean
        over the images. Between 1 and 10."""
        classes = self.forest.predict_proba(images)
        logs = np.log(np.clip(classes, 1e-12, None)) - np.log(np.clip(classes.mean(0), 1e-12, None))
        return float(np.exp((classes * logs).sum(1).mean()))

    def of_real_digits(self) -> dict[str, float]:
        """The same metrics for real digits."""
        return {"score": self.score(self.held_out), "frechet_distance": self.frechet(self.training)}


def run(name: str, seed: int, steps: int, quality: SampleQuality) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Trains one GAN. Returns its results, and its samples over time."""
    torch.manual_seed(seed)
    method = METHODS[name]
    digits = torch.from_numpy(quality.training).float().reshape(-1, 1, 8, 8)
    generator, critic = make_generator(), make_critic(method.normalisation)
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.RMSprop(module.parameters(), method.learning_rate)
        if method.clip_bound
        else torch.optim.Adam(module.parameters(), method.learning_rate, BETAS, fused=True)
        for module in (critic, generator)
    ]
    losses, snapshots = [], {}
    snapshot_steps = sorted({max(1, steps * share // 100) for share in (5, 20, 50, 100)})
    for step in range(1, steps + 1):
        mean_loss = 0.0
        for _ in range(CRITIC_STEPS):
            real = digits[torch.randint(len(digits), (BATCH,))]
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, NOISE_DIM))
            loss = critic(fake).mean() - critic(real).mean()
            mean_loss += loss.item() / CRITIC_STEPS
            if method.clip_bound is None:
                loss = loss + fused_gradient_penalty(critic, real, fake, weight=PENALTY_WEIGHT)
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
            if method.clip_bound is not None:
                clip_weights(critic, method.clip_bound)
        loss = -critic(generator(torch.randn(BATCH, NOISE_DIM))).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        averaged.update_parameters(generator)
        losses.append(mean_loss)
        if step in snapshot_steps:
            snapshots[step] = generate_samples(averaged, SAMPLES if step == steps else SAMPLES_SHOWN)
    images = snapshots[steps].flatten(1).double().numpy()
    metrics = {"score": quality.score(images), "frechet_distance": quality.frechet(images)}
    every = max(1, steps // 70)
    means = [float(np.mean(losses[i : i + every])) for i in range(0, steps, every)]
    return {"method": name, "seed": seed, **metrics, "every": every, "critic_loss": means}, snapshots


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table shown in docs/figures.md."""
    rows = ["| critic | score, 1 to 10 | Frechet distance |", "|---|---|---|"]
    for name in dict.fromkeys(row["method"] for row in results):
        seed_rows = [row for row in results if row["method"] == name]
        score = median_and_range([row["score"] for row in seed_rows])
        rows.append(f"| {name} | {score} | {median_and_range([row['frechet_distance'] for row in seed_rows], 1)} |")
    return "\n".join(rows)


def mosaic(images: Tensor, columns: int) -> np.ndarray:
    tiles = F.pad(images.reshape(-1, columns, 8, 8), (1, 1, 1, 1), value=-1)
    return tiles.transpose(1, 2).flatten(0, 1).flatten(1).numpy()


def plot(path: Path, results: list[dict[str, Any]], samples: dict[str, dict[int, Tensor]]) -> None:
    """Samples of the first seed over time, one row per method; below, the critic losses of all seeds."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[2.2, 1])
    grids, curves = (figure.add_subfigure(halves[i]) for i in range(2))
    steps = list(next(iter(samples.values())))
    panels = grids.subplots(len(METHODS), len(steps))
    for row, name in zip(panels, METHODS, strict=True):
        for axes, step in zip(row, steps, strict=True):
            axes.imshow(mosaic(samples[name][step][:SAMPLES_SHOWN], 10), cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace(", ", ",\n"), fontsize=9)
    for axes, step in zip(panels[0], steps, strict=True):
        axes.set_title(f"step {step}", fontsize=10)
    penalty_axes, clipping_axes = curves.subplots(1, 2)
    for name, color in zip(METHODS, COLORS, strict=False):
        axes = clipping_axes if METHODS[name].clip_bound else penalty_axes
        for index, row in enumerate(r for r in results if r["method"] == name):
            x = row["every"] * np.arange(1, len(row["critic_loss"]) + 1)
            label = name if index == 0 else None
            axes.plot(x, np.negative(row["critic_loss"]), color=color, linewidth=1.2, label=label)
    for axes in (penalty_axes, clipping_axes):
        axes.set(xlabel="generator step", ylabel="negative critic loss", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_picture(path, figure, dpi=80)


def main() -> None:
    args = parse_arguments(
        "Compare WGAN (weight clipping) with WGAN-GP on handwritten digits.", "10 steps, one seed: nothing is learned"
    )
    # One of the critics has batch normalisation on purpose.
    warnings.filterwarnings("ignore", message=".*batch normalisation", category=UserWarning)
    steps = 10 if args.quick else 700
    results: list[dict[str, Any]] = []
    samples: dict[str, dict[int, Tensor]] = {}
    bar = progress(range(len(args.seeds) * len(METHODS)), "GANs")
    for seed in args.seeds:
        quality = SampleQuality(seed)
        for name in METHODS:
            result, snapshots = run(name, seed, steps, quality)
            results.append(result)
            samples.setdefault(name, snapshots)
            bar.update()
        results.append({"method": "real digits", "seed": seed, **quality.of_real_digits()})
    bar.close()
    rows = [row for row in results if row["method"] in METHODS]
    plot(args.out / "digits_ablation.png", rows, samples)
    settings = {"steps": steps, "seeds": args.seeds, "quick": args.quick, "critic_steps": CRITIC_STEPS}
    save_json(args.out / "digits_ablation.json", {"settings": settings, "results": results})
    print(table(results))
    print(f"\nSee digits_ablation.png and digits_ablation.json in {args.out}/")


if __name__ == "__main__":
    main()
