"""WGAN-GP on scikit-learn's handwritten digits, small enough for a CPU.

    python examples/digits.py            about a minute; leaves the pictures and a JSON in out/

A generator learns to draw 8x8 digits from a critic under a gradient penalty (Gulrajani et al., 2017). A classifier
that knows only real digits then says what it sees in the samples, and at the end the same critic step is timed with
the penalty as everybody writes it and with ours.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import sklearn
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import fused_gp
from fused_gp import fused_gradient_penalty

BATCH = 64
NOISE = 10
CRITIC_STEPS = 5
PENALTY_WEIGHT = 10.0
LEARNING_RATE = 2e-3  # 1e-3 and 3e-3 end a little behind, 1e-2 far
BETAS = (0.0, 0.9)
EMA_DECAY = 0.98  # samples are drawn from an average of the last 50 or so generators
CONFIDENT = 0.5
SAMPLES = 1000

# Critic, real and fake to the weighted penalty and the gradient norms, (B,).
GradientPenalty = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(critic: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    return fused_gradient_penalty(critic, real, fake, weight=PENALTY_WEIGHT, return_norms=True)


def plain_autograd(critic: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The snippet found in most WGAN-GP code."""
    alpha = torch.rand(real.size(0), 1, 1, 1)
    x_hat = (alpha * fake + (1 - alpha) * real).requires_grad_(True)
    scores = critic(x_hat)
    gradients = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True, retain_graph=True)[0]
    norms = torch.sqrt((gradients.flatten(1) ** 2).sum(1) + 1e-12)
    return PENALTY_WEIGHT * ((norms - 1) ** 2).mean(), norms.detach()


def make_critic() -> nn.Module:
    """No normalisation: the penalty is on each sample's own gradient, and this small a critic trains without."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=4, stride=2, padding=1),  # 8x8 to 4x4
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 1),
    )


def make_generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 32 * 4 * 4),
        nn.Unflatten(1, (32, 4, 4)),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, kernel_size=4, stride=2, padding=1),  # 4x4 to 8x8
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 1, kernel_size=3, padding=1),
        nn.Tanh(),
    )


def critic_loss(
    critic: nn.Module, real: Tensor, fake: Tensor, gradient_penalty: GradientPenalty
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the three numbers worth watching."""
    penalty, norms = gradient_penalty(critic, real, fake)
    wasserstein = critic(real).mean() - critic(fake).mean()
    watched = {"W": wasserstein.item(), "gp": penalty.item(), "|grad|": norms.mean().item()}
    return penalty - wasserstein, watched


def train(
    digits: Tensor, generator: nn.Module, critic: nn.Module, steps: int
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The averaged generator, and per step what was watched, averaged over the critic's steps."""
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, BETAS, fused=True)
    curves = []
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file need not see every frame
    progress = tqdm(range(steps), "training", unit="step", mininterval=interval, dynamic_ncols=True)
    for _ in progress:
        watched = []
        for _ in range(CRITIC_STEPS):
            real = digits[torch.randint(len(digits), (BATCH,))]
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, NOISE))
            loss, numbers = critic_loss(critic, real, fake, ours)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            watched.append(numbers)

        loss = -critic(generator(torch.randn(BATCH, NOISE))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
        averaged.update_parameters(generator)

        curves.append({name: statistics.fmean(numbers[name] for numbers in watched) for name in watched[0]})
        progress.set_postfix({name: f"{value:.2f}" for name, value in curves[-1].items()}, refresh=False)
    return averaged, curves


@torch.no_grad()
def draw_samples(generator: nn.Module, count: int) -> Tensor:
    generator.eval()
    samples = generator(torch.randn(count, NOISE))
    generator.train()
    return samples


def judge(classifier: ExtraTreesClassifier, images: Tensor) -> dict[str, Any]:
    """How sure the classifier is, and of what."""
    confidence, classes = torch.from_numpy(classifier.predict_proba(images.flatten(1).numpy())).max(1)
    return {
        "mean_confidence": round(confidence.mean().item(), 4),
        "confident_share": round((confidence > CONFIDENT).double().mean().item(), 4),
        "count_per_class": torch.bincount(classes, minlength=10).tolist(),
    }


def compare_steps(critic: nn.Module, real: Tensor, fake: Tensor, seed: int, rounds: int) -> dict[str, Any]:
    """One critic step with either penalty: same weights, batch and alpha. The optimizer is left out of it."""
    # In the step of a critic that is one matrix product, little is left but the penalty's own operations.
    one_product = nn.Sequential(nn.Flatten(), nn.Linear(real[0].numel(), 1, bias=False))
    contestants: dict[str, tuple[nn.Module, GradientPenalty]] = {
        "plain autograd": (critic, plain_autograd),
        "fused_gp": (critic, ours),
        "penalty alone": (one_product, plain_autograd),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gradients: dict[str, Tensor] = {}
    for round_number in range(-3, rounds):  # three to warm up
        # In turns and in both orders, so that whatever else the machine does falls on all alike.
        for name in sorted(contestants, reverse=round_number % 2 == 0):
            module, gradient_penalty = contestants[name]
            module.zero_grad()
            torch.manual_seed(seed)
            start = time.perf_counter()
            critic_loss(module, real, fake, gradient_penalty)[0].backward()
            if round_number >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
            gradients[name] = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    quartiles = {name: statistics.quantiles(series, n=4) for name, series in times.items()}
    (_, plain, _), (_, fused, _), (_, alone, _) = quartiles.values()
    difference = (gradients["plain autograd"] - gradients["fused_gp"]).abs().max().item()
    return {
        "rounds": rounds,
        "milliseconds_quartiles": {name: [round(q, 3) for q in three] for name, three in quartiles.items()},
        "ratio": round(plain / fused, 3),
        "penalty_share": round(alone / plain, 3),
        "gradient_difference": difference,
        "gradient_difference_relative": difference / gradients["plain autograd"].abs().max().item(),
    }


def save_grid(path: Path, real: Tensor, samples: Tensor, title: str) -> None:
    """Ten real digits above a hundred samples."""

    def mosaic(images: Tensor) -> Tensor:
        tiles = F.pad(images.reshape(-1, 10, 8, 8), (1, 1, 1, 1), value=-1)
        return tiles.transpose(1, 2).flatten(0, 1).flatten(1)

    figure = Figure(figsize=(8, 9.6), facecolor="black", layout="constrained")
    both = ((real, "real"), (samples, title))
    for axes, (images, label) in zip(figure.subplots(2, 1, height_ratios=[1, 10]), both, strict=True):
        axes.imshow(mosaic(images).numpy(), cmap="magma", interpolation="bicubic", vmin=-1, vmax=1)
        axes.set_title(label, color="white", fontsize=12)
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def save_curves(path: Path, curves: list[dict[str, float]]) -> None:
    figure = Figure(figsize=(8, 8), layout="constrained")
    labels = {"W": "Wasserstein estimate", "gp": "penalty (weighted)", "|grad|": "mean gradient norm"}
    for axes, (name, label) in zip(figure.subplots(3, 1, sharex=True), labels.items(), strict=True):
        axes.plot(range(1, len(curves) + 1), [point[name] for point in curves], color="#b5367a", linewidth=1)
        axes.set_ylabel(label)
        axes.set_yscale("log" if name == "gp" else "linear")  # the first steps' penalty dwarfs all others
        axes.grid(alpha=0.3)
    axes.axhline(1, color="black", linestyle="--", linewidth=1)  # where the penalty wants the norm
    axes.set_xlabel("generator step")
    figure.savefig(path, dpi=120)


def print_summary(summary: dict[str, Any]) -> None:
    judged, step = summary["judged"], summary["critic_step"]
    counts = judged["samples"]["count_per_class"]
    print(f"\nA classifier of real digits, {summary['classifier_accuracy']:.1%} right on held-out ones, looks at\n")
    print(f"{'':24}mean confidence   share above {CONFIDENT}")
    for name, verdict in judged.items():
        print(f"  {name:22}{verdict['mean_confidence']:15.2f}{verdict['confident_share']:18.0%}")
    print(f"\nand sees {sum(count > 0 for count in counts)} of the ten classes in {SAMPLES} samples:\n")
    print("  digit  " + "".join(f"{digit:5}" for digit in range(10)))
    print("  seen   " + "".join(f"{count:5}" for count in counts))
    if summary["settings"]["quick"]:
        print("\n--quick: 20 steps teach nothing, so the numbers above are not meaningful.")
    print(f"\nThe same critic step (same weights, batch and alpha), {step['rounds']} rounds in turns:\n")
    for name in ("plain autograd", "fused_gp"):
        low, median, high = step["milliseconds_quartiles"][name]
        print(f"  {name:16}{median:7.2f} ms   (half of the rounds within {low:.2f} to {high:.2f})")
    print(f"\n  plain / fused_gp: {step['ratio']:.2f}. The penalty's own operations, without the critic, are")
    print(f"  about {step['penalty_share']:.0%} of the plain step; the rest is the critic's layers, the same in both.")
    print(f"  Largest difference between weight gradients: {step['gradient_difference']:.1e},", end=" ")
    print(f"{step['gradient_difference_relative']:.1e} of the largest gradient.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a WGAN-GP on handwritten digits, and time its critic step.")
    parser.add_argument("--steps", type=int, default=700, help="generator steps, five critic steps each (default 700)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for pictures and JSON (default out)")
    parser.add_argument("--quick", action="store_true", help="20 steps: everything runs, nothing is learned")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    steps, rounds = (20, 5) if args.quick else (args.steps, 50)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # layers this small gain little from a second one, and lose much on a busy machine

    pixels, labels = load_digits(return_X_y=True)
    digits = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    known, held_out, known_labels, held_out_labels = train_test_split(
        digits, labels, test_size=0.25, random_state=args.seed, stratify=labels
    )
    # A forest: unlike a network or a nearest neighbour it is unsure of what it has never seen, such as noise.
    classifier = ExtraTreesClassifier(300, random_state=args.seed)
    classifier.fit(known.flatten(1).numpy(), known_labels)

    generator, critic = make_generator(), make_critic()
    untrained = draw_samples(generator, SAMPLES)
    averaged, curves = train(known, generator, critic, steps)
    samples = draw_samples(averaged, SAMPLES)

    args.out.mkdir(parents=True, exist_ok=True)
    one_of_each = torch.stack([held_out[held_out_labels == digit][0] for digit in range(10)])
    save_grid(args.out / "digits_samples.png", one_of_each, samples[:100], f"generated, after {steps} steps")
    save_curves(args.out / "digits_curves.png", curves)

    every = max(1, steps // 100)
    summary = {
        "settings": {"steps": steps, "seed": args.seed, "quick": args.quick, "threads": torch.get_num_threads()}
        | {"batch": BATCH, "noise": NOISE, "critic_steps": CRITIC_STEPS, "penalty_weight": PENALTY_WEIGHT}
        | {"learning_rate": LEARNING_RATE, "betas": BETAS, "ema_decay": EMA_DECAY, "confident_above": CONFIDENT},
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (fused_gp, torch, sklearn, matplotlib)},
        "classifier_accuracy": classifier.score(held_out.flatten(1).numpy(), held_out_labels),
        "judged": {
            "real, held out": judge(classifier, held_out),
            "samples": judge(classifier, samples),
            "untrained generator": judge(classifier, untrained),
            "uniform noise": judge(classifier, 2 * torch.rand(SAMPLES, 1, 8, 8) - 1),
        },
        "critic_step": compare_steps(critic, known[:BATCH], samples[:BATCH], args.seed, rounds),
        "curves": {"step": list(range(1, steps + 1, every))}
        | {name: [round(point[name], 4) for point in curves[::every]] for name in curves[0]},
        "seconds": round(time.perf_counter() - started, 1),
    }
    (args.out / "digits.json").write_text(json.dumps(summary) + "\n")
    print_summary(summary)
    print(f"\n{summary['seconds']:.0f} s after the imports. See digits_samples.png, digits_curves.png", end=" ")
    print(f"and digits.json in {args.out}/")


if __name__ == "__main__":
    main()
