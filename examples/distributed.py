"""WGAN-GP on several processes: eight Gaussians on a circle, under DDP or FSDP2.

    torchrun --nproc-per-node 2 examples/distributed.py            DDP; a picture and a JSON in out/
    torchrun --nproc-per-node 2 examples/distributed.py --fsdp     the critic's weights sharded

gloo on CPUs, NCCL on GPUs. The penalty is one argument away from that of a single process: under FSDP2 the weights
are freed before a second backward could use them, so the method is "directional", which needs a smooth critic.
"""

import argparse
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fused_gp import fused_gradient_penalty

BATCH = 256  # of all ranks together
NOISE = 2
WIDTH = 64
CRITIC_STEPS = 5
PENALTY_WEIGHT = 1.0  # distances here are of the order of 1
LEARNING_RATE = 1e-3
BETAS = (0.0, 0.9)
SPREAD = 0.05


def network(inputs: int, outputs: int) -> nn.Sequential:
    """SiLU: smooth, as "directional" needs it."""
    layers = nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, outputs)
    return nn.Sequential(*layers)


def eight_gaussians(count: int, device: torch.device) -> Tensor:
    angles = torch.randint(8, (count, 1), device=device) * (math.pi / 4)
    return torch.cat((angles.cos(), angles.sin()), 1) + SPREAD * torch.randn(count, 2, device=device)


def train(
    generator: nn.Module, critic: nn.Module, method: str, steps: int, share: int, device: torch.device
) -> list[dict[str, float]]:
    """On this rank's share of each batch."""
    generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS)
    critic_optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, BETAS)
    curves = []
    interval = 0.1 if sys.stderr.isatty() else 10
    progress = tqdm(range(steps), "training", unit="step", mininterval=interval, disable=dist.get_rank() != 0)
    for _ in progress:
        for _ in range(CRITIC_STEPS):
            real = eight_gaussians(share, device)
            with torch.no_grad():
                fake = generator(torch.randn(share, NOISE, device=device))
            # One backward for the scores and the penalty: one reduction.
            penalty, norms = fused_gradient_penalty(
                critic, real, fake, weight=PENALTY_WEIGHT, method=method, return_norms=True
            )
            wasserstein = critic(real).mean() - critic(fake).mean()
            critic_optimizer.zero_grad()
            (penalty - wasserstein).backward()
            critic_optimizer.step()

        loss = -critic(generator(torch.randn(share, NOISE, device=device))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()

        numbers = torch.stack([wasserstein.detach(), penalty.detach(), norms.mean()])
        dist.all_reduce(numbers)
        watched = dict(zip(("W", "gp", "|grad|"), (numbers / dist.get_world_size()).tolist(), strict=True))
        curves.append(watched)
        progress.set_postfix({name: f"{value:.3f}" for name, value in watched.items()}, refresh=False)
    return curves


def largest_difference(*modules: nn.Module) -> float:
    """Between any rank's weights and those of rank 0."""
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for m in modules for p in m.parameters()]
    ours = torch.cat([w.detach().flatten() for w in weights])
    first = ours.clone()
    dist.broadcast(first, 0)
    difference = (ours - first).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    return difference.item()


def save_picture(path: Path, real: Tensor, fake: Tensor, curves: list[dict[str, float]], title: str) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    points, lines = figure.subplots(1, 2)
    points.scatter(*real.T.cpu(), s=4, color="#999999", label="real")
    points.scatter(*fake.T.cpu(), s=4, color="#b5367a", label="generated")
    points.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal", title=title)
    points.legend(loc="upper right")
    for (name, label), color in zip(
        {"W": "Wasserstein estimate", "gp": "penalty", "|grad|": "mean gradient norm"}.items(),
        ("#2a788e", "#b5367a", "#e8a33d"),
        strict=True,
    ):
        lines.plot([point[name] for point in curves], color=color, linewidth=1, label=label)
    lines.axhline(1, color="black", linestyle="--", linewidth=1)
    lines.set(xlabel="generator step", title="averaged over the ranks", ylim=(-0.1, 2))
    lines.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a WGAN-GP on several processes.",
        usage="torchrun --nproc-per-node N %(prog)s [options]",
    )
    parser.add_argument("--fsdp", action="store_true", help="shard the critic with FSDP2 instead of copying it (DDP)")
    parser.add_argument(
        "--steps", type=int, default=1000, help="generator steps, five critic steps each (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for picture and JSON (default out)")
    parser.add_argument("--quick", action="store_true", help="10 steps: everything runs, nothing is learned")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, which tells each process its rank")
    steps = 10 if args.quick else args.steps
    started = time.perf_counter()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(args.seed)  # the same weights everywhere
    critic: nn.Module = network(2, 1).to(device)
    generator = DistributedDataParallel(network(NOISE, 2).to(device))
    if args.fsdp:
        for layer in critic.children():
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(critic)
    else:
        critic = DistributedDataParallel(critic)
    torch.manual_seed(args.seed + 1 + rank)  # other samples, noise and alpha on each

    method = "directional" if args.fsdp else "double_backward"
    curves = train(generator, critic, method, steps, BATCH // ranks, device)
    difference = largest_difference(generator, critic)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            fake = generator.module(torch.randn(1000, NOISE, device=device))
        wrapper = "FSDP2" if args.fsdp else "DDP"
        title = f"{ranks} ranks, {wrapper}, {steps} steps"
        save_picture(args.out / "distributed.png", eight_gaussians(1000, device), fake, curves, title)
        summary: dict[str, Any] = {
            "ranks": ranks,
            "wrapper": wrapper,
            "method": method,
            "device": device.type,
            "steps": steps,
            "seed": args.seed,
            "largest_difference_between_ranks": difference,
            "last": {name: round(value, 4) for name, value in curves[-1].items()},
            "seconds": round(time.perf_counter() - started, 1),
        }
        (args.out / "distributed.json").write_text(json.dumps(summary) + "\n")
        print(f"{title}: W {curves[-1]['W']:.3f}, mean gradient norm {curves[-1]['|grad|']:.2f}")
        print(f"Largest difference between the ranks' weights: {difference:.1e}")
        print(f"See distributed.png and distributed.json in {args.out}/")
    # DDP refers to the process group, and goes first: gloo's threads must not outlive Python.
    del generator, critic
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
