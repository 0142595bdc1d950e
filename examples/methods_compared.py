"""The same training with the methods double_backward, compiled and directional: their curves, time and memory.

    python examples/methods_compared.py            a picture and a JSON in out/

The digits GAN of `digits.py` with a smooth critic. With the same seed, the methods use the same initial weights,
samples and alphas, so they differ only by rounding, and "directional" also by the error of its finite difference. Over
many steps of GAN training such differences grow, so they are compared with the differences between seeds. Also
measured: the time of a critic step, and its peak memory in a separate process.
"""

import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_gp import fused_gradient_penalty

from digits import BATCH, BETAS, CRITIC_STEPS, LEARNING_RATE, NOISE_DIM, PENALTY_WEIGHT, make_generator
from digits import make_critic as plain_critic
from report import COLORS, median_and_range, parse_arguments, progress, save_json, save_picture

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmarks import memory

METHODS = ("double_backward", "compiled", "directional")
LARGE_BATCH = 1024  # for time and memory; at batch 64, much of both is not the penalty's


def make_critic() -> nn.Module:
    return nn.Sequential(*(nn.SiLU() if isinstance(m, nn.LeakyReLU) else m for m in plain_critic().children()))


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, method: str) -> tuple[Tensor, float]:
    wasserstein = critic(real).mean() - critic(fake).mean()
    penalty = fused_gradient_penalty(critic, real, fake, weight=PENALTY_WEIGHT, method=method)
    return penalty - wasserstein, wasserstein.item()


def train(method: str, seed: int, steps: int) -> list[float]:
    """The Wasserstein estimate at each critic step."""
    torch.manual_seed(seed)
    digits = torch.from_numpy(load_digits().data).float().reshape(-1, 1, 8, 8) / 8 - 1
    generator, critic = make_generator(), make_critic()
    generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS)
    critic_optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, BETAS)
    curve = []
    for _ in range(steps):
        for _ in range(CRITIC_STEPS):
            real = digits[torch.randint(len(digits), (BATCH,))]
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, NOISE_DIM))
            loss, wasserstein = critic_loss(critic, real, fake, method)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            curve.append(wasserstein)
        loss = -critic(generator(torch.randn(BATCH, NOISE_DIM))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return curve


def step_times(rounds: int) -> dict[str, float]:
    """Median milliseconds of a critic step without its optimizer; rounds of the methods are interleaved."""
    real, fake = torch.randn(2, LARGE_BATCH, 1, 8, 8)
    critics = {method: make_critic() for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for round_number in range(-2, rounds):  # two warm-up rounds
        for method, critic in critics.items():
            critic.zero_grad()
            start = time.perf_counter()
            critic_loss(critic, real, fake, method)[0].backward()
            if round_number >= 0:
                times[method].append(1000 * (time.perf_counter() - start))
    return {method: statistics.median(milliseconds) for method, milliseconds in times.items()}


def step_memory(method: str) -> float:
    """Peak memory of a critic step in this process, in MB."""
    torch.set_num_threads(1)
    real, fake = torch.randn(2, LARGE_BATCH, 1, 8, 8)
    critic = make_critic()

    def step() -> None:
        critic.zero_grad()
        critic_loss(critic, real, fake, method)[0].backward()

    step()
    step()
    critic.zero_grad()
    return memory.peak(step, "cpu") / 1e6


def measure_costs(rounds: int) -> dict[str, dict[str, float]]:
    times = step_times(rounds)
    os.environ.update(memory.ENVIRONMENT)  # for the worker processes
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        peaks = dict(zip(METHODS, pool.map(step_memory, METHODS), strict=True))
    return {method: {"milliseconds": times[method], "peak_mb": peaks[method]} for method in METHODS}


def curve_distances(
    curves: dict[tuple[str, int], list[float]], window: slice
) -> tuple[dict[str, list[float]], list[float]]:
    """Mean distance of each method's curve from that of double_backward with the same seed, and between seeds.

    The latter compares the double_backward curves of every two seeds. Both are relative to the mean of the curves.
    """
    parts = {key: np.array(curve)[window] for key, curve in curves.items()}
    seeds = sorted({seed for _, seed in curves})
    scale = np.mean([np.abs(curve).mean() for curve in parts.values()])
    between_methods = {
        method: [float(np.abs(parts[method, seed] - parts[METHODS[0], seed]).mean() / scale) for seed in seeds]
        for method in METHODS[1:]
    }
    between_seeds = [
        float(np.abs(parts[METHODS[0], a] - parts[METHODS[0], b]).mean() / scale) for a in seeds for b in seeds if a < b
    ]
    return between_methods, between_seeds


def summarise(curves: dict[tuple[str, int], list[float]]) -> list[dict[str, Any]]:
    """Distances over the first tenth of the steps, where differences have hardly grown, and over all steps."""
    length = len(next(iter(curves.values())))
    windows = {"first tenth": slice(length // 10), "all": slice(length)}
    results = []
    for window, part in windows.items():
        between_methods, between_seeds = curve_distances(curves, part)
        for method, distance in between_methods.items():
            results.append({"method": method, "window": window, "distance": distance})
        results.append({"method": "another seed", "window": window, "distance": between_seeds})
    return results


def table(results: list[dict[str, Any]], costs: dict[str, dict[str, float]]) -> str:
    """The Markdown table shown in docs/figures.md. With one seed, the distance between seeds is left empty."""
    rows = [
        "| method | distance of the curve, first tenth of the steps | all steps | ms a step | peak MB |",
        "|---|---|---|---|---|",
    ]
    for method in (*METHODS, "another seed"):
        cells = []
        for window in ("first tenth", "all"):
            distance = [r["distance"] for r in results if (r["method"], r["window"]) == (method, window)]
            percent = [100 * value for values in distance for value in values]
            cells.append(median_and_range(percent) + " %" if percent else "")
        cost = costs.get(method)
        cells += [f"{cost['milliseconds']:.1f}", f"{cost['peak_mb']:.0f}"] if cost else ["", ""]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(path: Path, curves: dict[tuple[str, int], list[float]], costs: dict[str, dict[str, float]]) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    lines, times, peaks = figure.subplots(1, 3, width_ratios=[3, 1, 1])
    styles: tuple[dict[str, Any], ...] = (
        {"linewidth": 5, "alpha": 0.35},
        {"linewidth": 2},
        {"linewidth": 1.2, "linestyle": "--", "color": "black"},
    )
    for seed_index, seed in enumerate(sorted({seed for _, seed in curves})):
        for method, color, style in zip(METHODS, COLORS, styles, strict=False):
            curve = np.array(curves[method, seed])
            every = CRITIC_STEPS * max(1, len(curve) // (60 * CRITIC_STEPS))
            smooth = curve[: len(curve) // every * every].reshape(-1, every).mean(1)
            label = method if seed_index == 0 else None
            lines.plot(every * np.arange(1, len(smooth) + 1), smooth, label=label, **({"color": color} | style))
    lines.set(xlabel="critic step", ylabel="Wasserstein estimate, each seed")
    lines.legend()
    lines.grid(alpha=0.3)
    for axes, key, label in ((times, "milliseconds", "ms a critic step"), (peaks, "peak_mb", "peak MB of one")):
        names = [method.replace("_", "\n") for method in METHODS]
        axes.bar(names, [costs[method][key] for method in METHODS], color=COLORS[:3])
        axes.set_ylabel(label)
        axes.tick_params("x", labelrotation=45, labelsize=8)
    save_picture(path, figure)


def main() -> None:
    args = parse_arguments("The same training with the three methods.", "10 steps, one seed")
    steps = 10 if args.quick else 200
    runs = [(method, seed) for method in METHODS for seed in args.seeds]
    curves = {(method, seed): train(method, seed, steps) for method, seed in progress(runs, "GANs")}
    costs = measure_costs(rounds=3 if args.quick else 30)
    results = summarise(curves)
    plot(args.out / "methods_compared.png", curves, costs)
    settings = {"steps": steps, "seeds": args.seeds, "quick": args.quick, "batch": BATCH, "large_batch": LARGE_BATCH}
    save_json(args.out / "methods_compared.json", {"settings": settings, "results": results, "costs": costs})
    print(table(results, costs))
    print(f"\nSee methods_compared.png and methods_compared.json in {args.out}/")


if __name__ == "__main__":
    main()
