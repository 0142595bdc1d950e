"""WGAN-GP on several processes: eight Gaussians on a circle, under DDP or FSDP2.

    torchrun --nproc-per-node 2 examples/distributed.py            DDP; a picture and a JSON in out/
    torchrun --nproc-per-node 2 examples/distributed.py --fsdp     the critic's weights sharded

The backend is gloo on CPUs, NCCL on GPUs. The call differs from that of a single process in one argument: FSDP2 frees
the weights before a second backward could use them, so the method is "directional", which needs a smooth critic.
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

BATCH = 256  # over all ranks
NOISE_DIM = 2
WIDTH = 64
CRITIC_STEPS = 5
PENALTY_WEIGHT = 1.0  # distances in this data are of the order of 1
LEARNING_RATE = 1e-3
BETAS = (0.0, 0.9)
SPREAD = 0.05


def make_network(inputs: int, outputs: int) -> nn.Sequential:
    """An MLP with SiLU, which is smooth, as "directional" requires."""
    layers = nn.Linear(inputs, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, outputs)
    return nn.Sequential(*layers)


def eight_gaussians(count: int, device: torch.device) -> Tensor:
    angles = torch.randint(8, (count, 1), device=device) * (math.pi / 4)
    return torch.cat((angles.cos(), angles.sin()), 1) + SPREAD * torch.randn(count, 2, device=device)


def train(
    generator: nn.Module, critic: nn.Module, method: str, steps: int, local_batch: int, device: torch.device
) -> list[dict[str, float]]:
    """Trains on this rank's share of each batch. Returns the metrics per generator step, averaged over the ranks."""
    generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS)
    critic_optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, BETAS)
    curves = []
    interval = 0.1 if sys.stderr.isatty() else 10
    progress = tqdm(range(steps), "training", unit="step", mininterval=interval, disable=dist.get_rank() != 0)
    for _ in progress:
        for _ in range(CRITIC_STEPS):
            real = eight_gaussians(local_batch, device)
            with torch.no_grad():
                fake = generator(torch.randn(local_batch, NOISE_DIM, device=device))
            # One backward for scores and penalty, so that DDP reduces the gradients once.
            penalty, norms = fused_gradient_penalty(
                critic, real, fake, weight=PENALTY_WEIGHT, method=method, return_norms=True
            )
            wasserstein = critic(real).mean() - critic(fake).mean()
            critic_optimizer.zero_grad()
            (penalty - wasserstein).backward()
            critic_optimizer.step()

        loss = -critic(generator(torch.randn(local_batch, NOISE_DIM, device=device))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()

        local_metrics = torch.stack([wasserstein.detach(), penalty.detach(), norms.mean()])
        dist.all_reduce(local_metrics)
        metrics = dict(zip(("W", "gp", "|grad|"), (local_metrics / dist.get_world_size()).tolist(), strict=True))
        curves.append(metrics)
        progress.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()}, refresh=False)
    return curves


def largest_weight_difference(*modules: nn.Module) -> float:
    """The largest difference between the weights of any rank and those of rank 0."""
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for m in modules for p in m.parameters()]
    local = torch.cat([w.detach().flatten() for w in weights])
    rank_0 = local.clone()
    dist.broadcast(rank_0, 0)
    difference = (local - rank_0).abs().max()
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
        description="Train a WGAN-GP on several processes, under DDP or FSDP2.",
        usage="torchrun --nproc-per-node N %(prog)s [options]",
    )
    parser.add_argument(
        "--fsdp", action="store_true", help="shard the critic with FSDP2 instead of replicating it with DDP"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, help="generator steps, five critic steps each (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="output folder for the picture and the JSON (default out)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="10 steps: checks that everything runs, nothing is learned"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if "RANK" not in os.environ:
        parser.error("start this program with torchrun, which sets RANK for each process")
    steps = 10 if args.quick else args.steps
    started = time.perf_counter()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(args.seed)  # the same initial weights on all ranks
    critic: nn.Module = make_network(2, 1).to(device)
    generator = DistributedDataParallel(make_network(NOISE_DIM, 2).to(device))
    if args.fsdp:
        for layer in critic.children():
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(critic)
    else:
        critic = DistributedDataParallel(critic)
    torch.manual_seed(args.seed + 1 + rank)  # different samples, noise and alpha on each rank

    method = "directional" if args.fsdp else "double_backward"
    curves = train(generator, critic, method, steps, BATCH // world_size, device)
    difference = largest_weight_difference(generator, critic)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            fake = generator.module(torch.randn(1000, NOISE_DIM, device=device))
        wrapper = "FSDP2" if args.fsdp else "DDP"
        title = f"{world_size} ranks, {wrapper}, {steps} steps"
        save_picture(args.out / "distributed.png", eight_gaussians(1000, device), fake, curves, title)
        summary: dict[str, Any] = {
            "ranks": world_size,
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
    # DDP holds a reference to the process group, so delete it first: gloo's threads must not outlive Python.
    del generator, critic
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
