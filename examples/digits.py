"""WGAN-GP on scikit-learn's handwritten digits, small enough for a CPU.

    python examples/digits.py            about a minute; writes the pictures and a JSON to out/

Trains a generator of 8x8 digits with a critic and a gradient penalty (Gulrajani et al., 2017). A classifier trained on
real digits then classifies the generated samples. At the end, the same critic step is timed with the usual hand-written
penalty and with fused_gp.
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
NOISE_DIM = 10
CRITIC_STEPS = 5
PENALTY_WEIGHT = 10.0
LEARNING_RATE = 2e-3  # 1e-3 and 3e-3 give slightly worse samples, 1e-2 far worse
BETAS = (0.0, 0.9)
EMA_DECAY = 0.98  # samples come from an average over about the last 50 generators
CONFIDENCE_THRESHOLD = 0.5
SAMPLES = 1000

# (critic, real, fake) -> the weighted penalty, and the gradient norms (B,).
PenaltyFunction = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def fused_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    return fused_gradient_penalty(critic, real, fake, weight=PENALTY_WEIGHT, return_norms=True)


def plain_autograd_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The hand-written code found in most WGAN-GP implementations."""
    alpha = torch.rand(real.size(0), 1, 1, 1)
    x_hat = (alpha * fake + (1 - alpha) * real).requires_grad_(True)
    scores = critic(x_hat)
    gradients = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True, retain_graph=True)[0]
    norms = torch.sqrt((gradients.flatten(1) ** 2).sum(1) + 1e-12)
    return PENALTY_WEIGHT * ((norms - 1) ** 2).mean(), norms.detach()


def make_critic() -> nn.Module:
    """No normalisation: the penalty needs each sample's own gradient, and a critic this small trains without it."""
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
        nn.Linear(NOISE_DIM, 256),
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
    critic: nn.Module, real: Tensor, fake: Tensor, gradient_penalty: PenaltyFunction
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and three metrics for the log."""
    penalty, norms = gradient_penalty(critic, real, fake)
    wasserstein = critic(real).mean() - critic(fake).mean()
    metrics = {"W": wasserstein.item(), "gp": penalty.item(), "|grad|": norms.mean().item()}
    return penalty - wasserstein, metrics


def train(
    digits: Tensor, generator: nn.Module, critic: nn.Module, steps: int
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Returns the averaged generator, and the metrics of each generator step, averaged over its critic steps."""
    averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, BETAS, fused=True)
    curves = []
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; fewer updates in a log file
    progress = tqdm(range(steps), "training", unit="step", mininterval=interval, dynamic_ncols=True)
    for _ in progress:
        critic_metrics = []
        for _ in range(CRITIC_STEPS):
            real = digits[torch.randint(len(digits), (BATCH,))]
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, NOISE_DIM))
            loss, metrics = critic_loss(critic, real, fake, fused_penalty)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            critic_metrics.append(metrics)

        loss = -critic(generator(torch.randn(BATCH, NOISE_DIM))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
        averaged.update_parameters(generator)

        curves.append(
            {name: statistics.fmean(metrics[name] for metrics in critic_metrics) for name in critic_metrics[0]}
        )
        progress.set_postfix({name: f"{value:.2f}" for name, value in curves[-1].items()}, refresh=False)
    return averaged, curves


@torch.no_grad()
def generate_samples(generator: nn.Module, count: int) -> Tensor:
    generator.eval()
    samples = generator(torch.randn(count, NOISE_DIM))
    generator.train()
    return samples


def classify(classifier: ExtraTreesClassifier, images: Tensor) -> dict[str, Any]:
    """The classifier's confidence, and the number of images per predicted class."""
    confidence, classes = torch.from_numpy(classifier.predict_proba(images.flatten(1).numpy())).max(1)
    return {
        "mean_confidence": round(confidence.mean().item(), 4),
        "confident_share": round((confidence > CONFIDENCE_THRESHOLD).double().mean().item(), 4),
        "count_per_class": torch.bincount(classes, minlength=10).tolist(),
    }


def compare_steps(critic: nn.Module, real: Tensor, fake: Tensor, seed: int, rounds: int) -> dict[str, Any]:
    """Times a critic step without its optimizer, with both penalties: same weights, batch and alpha."""
    # With a critic that is one matrix product, almost all of the step is the penalty's own operations.
    linear_critic = nn.Sequential(nn.Flatten(), nn.Linear(real[0].numel(), 1, bias=False))
    implementations: dict[str, tuple[nn.Module, PenaltyFunction]] = {
        "plain autograd": (critic, plain_autograd_penalty),
        "fused_gp": (critic, fused_penalty),
        "penalty alone": (linear_critic, plain_autograd_penalty),
    }
    times: dict[str, list[float]] = {name: [] for name in implementations}
    gradients: dict[str, Tensor] = {}
    for round_number in range(-3, rounds):  # three warm-up rounds
        # Interleaved and in both orders, so that other load on the machine affects all implementations alike.
        for name in sorted(implementations, reverse=round_number % 2 == 0):
            module, gradient_penalty = implementations[name]
            module.zero_grad()
            torch.manual_seed(seed)
            start = time.perf_counter()
            critic_loss(module, real, fake, gradient_penalty)[0].backward()
            if round_number >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
            gradients[name] = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    quartiles = {name: statistics.quantiles(milliseconds, n=4) for name, milliseconds in times.items()}
    (_, plain, _), (_, fused, _), (_, alone, _) = quartiles.values()
    difference = (gradients["plain autograd"] - gradients["fused_gp"]).abs().max().item()
    return {
        "rounds": rounds,
        "milliseconds_quartiles": {name: [round(q, 3) for q in values] for name, values in quartiles.items()},
        "ratio": round(plain / fused, 3),
        "penalty_share": round(alone / plain, 3),
        "gradient_difference": difference,
        "gradient_difference_relative": difference / gradients["plain autograd"].abs().max().item(),
    }


def save_grid(path: Path, real: Tensor, samples: Tensor, title: str) -> None:
    """Ten real digits above a hundred generated samples."""

    def mosaic(images: Tensor) -> Tensor:
        tiles = F.pad(images.reshape(-1, 10, 8, 8), (1, 1, 1, 1), value=-1)
        return tiles.transpose(1, 2).flatten(0, 1).flatten(1)

    figure = Figure(figsize=(8, 9.6), facecolor="black", layout="constrained")
    panels = ((real, "real"), (samples, title))
    for axes, (images, label) in zip(figure.subplots(2, 1, height_ratios=[1, 10]), panels, strict=True):
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
        axes.set_yscale("log" if name == "gp" else "linear")  # the first steps' penalty is far larger than all others
        axes.grid(alpha=0.3)
    axes.axhline(1, color="black", linestyle="--", linewidth=1)  # the penalty's target norm
    axes.set_xlabel("generator step")
    figure.savefig(path, dpi=120)


def print_summary(summary: dict[str, Any]) -> None:
    classified, step = summary["judged"], summary["critic_step"]
    counts = classified["samples"]["count_per_class"]
    print(f"\nA classifier of real digits (accuracy on held-out digits {summary['classifier_accuracy']:.1%}):\n")
    print(f"{'':24}mean confidence   share above {CONFIDENCE_THRESHOLD}")
    for name, result in classified.items():
        print(f"  {name:22}{result['mean_confidence']:15.2f}{result['confident_share']:18.0%}")
    print(f"\nPredicted classes of {SAMPLES} generated samples ({sum(count > 0 for count in counts)} of ten occur):\n")
    print("  digit  " + "".join(f"{digit:5}" for digit in range(10)))
    print("  count  " + "".join(f"{count:5}" for count in counts))
    if summary["settings"]["quick"]:
        print("\n--quick: nothing is learned in 20 steps, so the numbers above are not meaningful.")
    print(f"\nThe same critic step (same weights, batch and alpha), {step['rounds']} interleaved rounds:\n")
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
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="output folder for the pictures and the JSON (default out)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="20 steps: checks that everything runs, nothing is learned"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    steps, rounds = (20, 5) if args.quick else (args.steps, 50)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # small layers gain little from a second thread and lose much on a busy machine

    pixels, labels = load_digits(return_X_y=True)
    digits = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    training, held_out, training_labels, held_out_labels = train_test_split(
        digits, labels, test_size=0.25, random_state=args.seed, stratify=labels
    )
    # A forest: unlike a network or nearest neighbours, it has low confidence on inputs such as noise.
    classifier = ExtraTreesClassifier(300, random_state=args.seed)
    classifier.fit(training.flatten(1).numpy(), training_labels)

    generator, critic = make_generator(), make_critic()
    untrained = generate_samples(generator, SAMPLES)
    averaged, curves = train(training, generator, critic, steps)
    samples = generate_samples(averaged, SAMPLES)

    args.out.mkdir(parents=True, exist_ok=True)
    one_of_each = torch.stack([held_out[held_out_labels == digit][0] for digit in range(10)])
    save_grid(args.out / "digits_samples.png", one_of_each, samples[:100], f"generated, after {steps} steps")
    save_curves(args.out / "digits_curves.png", curves)

    every = max(1, steps // 100)
    summary = {
        "settings": {"steps": steps, "seed": args.seed, "quick": args.quick, "threads": torch.get_num_threads()}
        | {"batch": BATCH, "noise": NOISE_DIM, "critic_steps": CRITIC_STEPS, "penalty_weight": PENALTY_WEIGHT}
        | {
            "learning_rate": LEARNING_RATE,
            "betas": BETAS,
            "ema_decay": EMA_DECAY,
            "confident_above": CONFIDENCE_THRESHOLD,
        },
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (fused_gp, torch, sklearn, matplotlib)},
        "classifier_accuracy": classifier.score(held_out.flatten(1).numpy(), held_out_labels),
        "judged": {
            "real, held out": classify(classifier, held_out),
            "samples": classify(classifier, samples),
            "untrained generator": classify(classifier, untrained),
            "uniform noise": classify(classifier, 2 * torch.rand(SAMPLES, 1, 8, 8) - 1),
        },
        "critic_step": compare_steps(critic, training[:BATCH], samples[:BATCH], args.seed, rounds),
        "curves": {"step": list(range(1, steps + 1, every))}
        | {name: [round(point[name], 4) for point in curves[::every]] for name in curves[0]},
        "seconds": round(time.perf_counter() - started, 1),
    }
    (args.out / "digits.json").write_text(json.dumps(summary) + "\n")
    print_summary(summary)
    print(f"\n{summary['seconds']:.0f} s without the imports. See digits_samples.png, digits_curves.png", end=" ")
    print(f"and digits.json in {args.out}/")


if __name__ == "__main__":
    main()
