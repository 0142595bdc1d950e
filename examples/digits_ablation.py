"""WGAN against WGAN-GP on the handwritten digits of `digits.py`, and three critics under the penalty.

    python examples/digits_ablation.py            a picture and a JSON in out/

The same generator, the same number of critic steps, several seeds. Weight clipping with the optimizer of its paper
(RMSprop, 5e-5) and at ten times its rate; the gradient penalty with the critic as it is, with layer normalisation, and
with batch normalisation, under which a sample's score, and so its gradient, depends on the batch. Two numbers judge the
samples: a score like Inception's, from a forest's classes, and the Frechet distance from held-out digits between
features of a small network.
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
    NOISE,
    PENALTY_WEIGHT,
    draw_samples,
    make_generator,
)
from digits import make_critic as plain_critic
from report import COLORS, over_seeds, parse_arguments, progress, save, save_picture
from toy_critics import clip_weights

SAMPLES = 2000
SHOWN = 40


class Method(NamedTuple):
    clip: float | None = None
    learning_rate: float = LEARNING_RATE
    normalise: type[nn.Module] | None = None


METHODS = {
    "penalty": Method(),
    "penalty, LayerNorm": Method(normalise=nn.LayerNorm),
    "penalty, BatchNorm": Method(normalise=nn.BatchNorm1d),
    "clipping": Method(clip=0.01, learning_rate=5e-5),
    "clipping, 10 times the rate": Method(clip=0.01, learning_rate=5e-4),
}


def make_critic(normalise: type[nn.Module] | None) -> nn.Module:
    """Normalised, if at all, before the activation of each hidden layer, image by image or over the batch."""
    critic = plain_critic()
    if normalise is None:
        return critic
    assert isinstance(critic, nn.Sequential)
    conv, activation, flatten, linear, _, last = critic
    after_conv = nn.BatchNorm2d(16) if normalise is nn.BatchNorm1d else nn.LayerNorm([16, 4, 4])
    return nn.Sequential(conv, after_conv, activation, flatten, linear, normalise(256), activation, last)


class Judge:
    """Knows the real digits of one half by a forest and a network, and has the others to compare with."""

    def __init__(self, seed: int) -> None:
        pixels, labels = load_digits(return_X_y=True)
        self.known, self.held_out, known_labels, _ = train_test_split(
            pixels / 8 - 1, labels, test_size=0.5, random_state=seed, stratify=labels
        )
        self.forest = ExtraTreesClassifier(300, random_state=seed).fit(self.known, known_labels)
        with threadpool_limits(1):  # or threads wait for one another most of the time
            self.network = MLPClassifier([64], random_state=seed, max_iter=500).fit(self.known, known_labels)
        self.held_out_features = self.features(self.held_out)

    def features(self, images: np.ndarray) -> np.ndarray:
        return np.maximum(images @ self.network.coefs_[0] + self.network.intercepts_[0], 0)

    def frechet(self, images: np.ndarray) -> float:
        """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of the features' means and covariances."""
        ours, theirs = self.features(images), self.held_out_features
        covariance, other = np.cov(ours.T), np.cov(theirs.T)
        roots = np.sqrt(np.clip(np.linalg.eigvals(covariance @ other).real, 0, None))
        return float(((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(covariance + other) - 2 * roots.sum())

    def score(self, images: np.ndarray) -> float:
        """exp of the mean KL divergence of an image's classes from all images' classes: 1 to 10."""
        classes = self.forest.predict_proba(images)
        logs = np.log(np.clip(classes, 1e-12, None)) - np.log(np.clip(classes.mean(0), 1e-12, None))
        return float(np.exp((classes * logs).sum(1).mean()))

    def best(self) -> dict[str, float]:
        """What real digits get."""
        return {"score": self.score(self.held_out), "frechet_distance": self.frechet(self.known)}


def run(name: str, seed: int, steps: int, judge: Judge) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Numbers, and samples over time."""
    torch.manual_seed(seed)
    method = METHODS[name]
    digits = torch.from_numpy(judge.known).float().reshape(-1, 1, 8, 8)
    generator, critic = make_generator(), make_critic(method.normalise)
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.RMSprop(module.parameters(), method.learning_rate)
        if method.clip
        else torch.optim.Adam(module.parameters(), method.learning_rate, BETAS, fused=True)
        for module in (critic, generator)
    ]
    losses, snapshots = [], {}
    looks = sorted({max(1, steps * share // 100) for share in (5, 20, 50, 100)})
    for step in range(1, steps + 1):
        loss_now = 0.0
        for _ in range(CRITIC_STEPS):
            real = digits[torch.randint(len(digits), (BATCH,))]
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, NOISE))
            loss = critic(fake).mean() - critic(real).mean()
            loss_now += loss.item() / CRITIC_STEPS
            if method.clip is None:
                loss = loss + fused_gradient_penalty(critic, real, fake, weight=PENALTY_WEIGHT)
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
            if method.clip is not None:
                clip_weights(critic, method.clip)
        loss = -critic(generator(torch.randn(BATCH, NOISE))).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        averaged.update_parameters(generator)
        losses.append(loss_now)
        if step in looks:
            snapshots[step] = draw_samples(averaged, SAMPLES if step == steps else SHOWN)
    images = snapshots[steps].flatten(1).double().numpy()
    numbers = {"score": judge.score(images), "frechet_distance": judge.frechet(images)}
    every = max(1, steps // 70)
    means = [float(np.mean(losses[i : i + every])) for i in range(0, steps, every)]
    return {"method": name, "seed": seed, **numbers, "every": every, "critic_loss": means}, snapshots


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; what docs/figures.md shows."""
    rows = ["| critic | score, 1 to 10 | Frechet distance |", "|---|---|---|"]
    for name in dict.fromkeys(row["method"] for row in results):
        of_all_seeds = [row for row in results if row["method"] == name]
        score = over_seeds([row["score"] for row in of_all_seeds])
        rows.append(f"| {name} | {score} | {over_seeds([row['frechet_distance'] for row in of_all_seeds], 1)} |")
    return "\n".join(rows)


def mosaic(images: Tensor, columns: int) -> np.ndarray:
    tiles = F.pad(images.reshape(-1, columns, 8, 8), (1, 1, 1, 1), value=-1)
    return tiles.transpose(1, 2).flatten(0, 1).flatten(1).numpy()


def draw(path: Path, results: list[dict[str, Any]], samples: dict[str, dict[int, Tensor]]) -> None:
    """Samples of the first seed over time, a row for each method; below, all seeds' critic losses."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[2.2, 1])
    grids, curves = (figure.add_subfigure(halves[i]) for i in range(2))
    steps = list(next(iter(samples.values())))
    panels = grids.subplots(len(METHODS), len(steps))
    for row, name in zip(panels, METHODS, strict=True):
        for axes, step in zip(row, steps, strict=True):
            axes.imshow(mosaic(samples[name][step][:SHOWN], 10), cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace(", ", ",\n"), fontsize=9)
    for axes, step in zip(panels[0], steps, strict=True):
        axes.set_title(f"step {step}", fontsize=10)
    penalised, clipped = curves.subplots(1, 2)
    for name, color in zip(METHODS, COLORS, strict=False):
        axes = clipped if METHODS[name].clip else penalised
        for index, row in enumerate(r for r in results if r["method"] == name):
            x = row["every"] * np.arange(1, len(row["critic_loss"]) + 1)
            label = name if index == 0 else None
            axes.plot(x, np.negative(row["critic_loss"]), color=color, linewidth=1.2, label=label)
    for axes in (penalised, clipped):
        axes.set(xlabel="generator step", ylabel="negative critic loss", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_picture(path, figure, dpi=80)


def main() -> None:
    args = parse_arguments("WGAN against WGAN-GP on handwritten digits.", "10 steps, one seed: nothing is learned")
    # One critic here has batch normalisation on purpose.
    warnings.filterwarnings("ignore", message=".*batch normalisation", category=UserWarning)
    steps = 10 if args.quick else 700
    results: list[dict[str, Any]] = []
    samples: dict[str, dict[int, Tensor]] = {}
    bar = progress(range(len(args.seeds) * len(METHODS)), "GANs")
    for seed in args.seeds:
        judge = Judge(seed)
        for name in METHODS:
            numbers, snapshots = run(name, seed, steps, judge)
            results.append(numbers)
            samples.setdefault(name, snapshots)
            bar.update()
        results.append({"method": "real digits", "seed": seed, **judge.best()})
    bar.close()
    rows = [row for row in results if row["method"] in METHODS]
    draw(args.out / "digits_ablation.png", rows, samples)
    settings = {"steps": steps, "seeds": args.seeds, "quick": args.quick, "critic_steps": CRITIC_STEPS}
    save(args.out / "digits_ablation.json", {"settings": settings, "results": results})
    print(table(results))
    print(f"\nSee digits_ablation.png and digits_ablation.json in {args.out}/")


if __name__ == "__main__":
    main()
