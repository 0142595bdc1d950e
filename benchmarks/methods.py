"""Time, peak memory and accuracy of the methods and of chunks, against the hand-written lines under eager autograd.

    python -m benchmarks.methods [--device cpu] [--rounds N] [--critic vit] [--json FILE]

A step is the penalty and its gradient with respect to the weights. The peer is the lines that everybody copies
(the peer `snippet`), for the ViT with math attention, which alone they and the compiler can differentiate twice. All
take turns in one process, in another order each round; the ratio is taken round by round, above 1 ours is faster. Peak
memory is that of one step in a process of its own, after two to warm up, above what the process held before: parameter
gradients count. Fresh is the memory that the system handed out while the step was timed: a fault and a cleared page for
every 4 kB, which on a CPU may take as long as the arithmetic, and which allocators that keep what is freed do without.
The gradient's error is relative to the hand-written lines in fp64.
"""

import argparse
import copy
import json
import os
import random
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import memory, provenance, terminal, timing
from benchmarks.critics import ViT, dcgan
from benchmarks.options import check_device, check_rounds
from benchmarks.peers import snippet
from fused_gp import fused_gradient_penalty


class Critic(NamedTuple):
    build: Callable[[], nn.Module]
    batch: int
    options: tuple[dict[str, Any], ...]  # of our call


def chunked(*sizes: int, **options: Any) -> list[dict[str, Any]]:
    return [options | {"chunk_size": size} for size in sizes]


CRITICS = {
    "vit": Critic(
        ViT,
        8,
        (
            {},
            *chunked(4, 2, 1),
            {"method": "compiled"},
            *chunked(2, method="compiled"),
            {"method": "directional"},
            *chunked(8, 4, 2, 1, method="directional"),
        ),
    ),
    "conv, LeakyReLU": Critic(dcgan, 64, ({}, *chunked(16), {"method": "compiled"})),
    "conv, SiLU": Critic(
        partial(dcgan, activation=nn.SiLU), 64, ({"method": "directional"}, *chunked(16, method="directional"))
    ),
}
# Memory against batch; that of one chunk's samples by hand is what chunks cannot get below.
GROWTH: list[tuple[dict[str, Any] | None, int]] = [
    *(({"chunk_size": 2}, batch) for batch in (8, 16, 32)),
    *((None, batch) for batch in (1, 2, 8, 16, 32)),
]
PEER = "the lines by hand"


def label(options: dict[str, Any] | None) -> str:
    if options is None:
        return PEER
    chunk = options.get("chunk_size")
    return options.get("method", "double_backward") + (f", chunks of {chunk}" if chunk else "")


class Step:
    """The penalty's gradient with respect to the weights, at samples of one seed and with alphas of one seed."""

    def __init__(self, critic: str, batch: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.critic = CRITICS[critic].build().to(device, dtype)
        self.real, self.fake = (torch.randn(batch, 3, 64, 64).to(device, dtype) for _ in range(2))
        self.alpha = torch.rand(batch).to(device)
        self.device = device

    def __call__(self, options: dict[str, Any] | None, autocast: torch.dtype | None = None) -> None:
        self.critic.zero_grad()
        twice = options is None or options.get("method") != "directional"
        with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
            with torch.autocast(self.device, autocast) if autocast else nullcontext():
                if options is None:
                    alpha = self.alpha.to(self.real.dtype).view(-1, 1, 1, 1)
                    value = snippet.penalty_at(self.critic, snippet.interpolate(self.real, self.fake, alpha))
                else:
                    value = fused_gradient_penalty(self.critic, self.real, self.fake, alpha=self.alpha, **options)
            value.backward()

    def gradient(self) -> Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.critic.parameters()]
        return torch.cat([g.double().flatten() for g in grads])


def peak(critic: str, batch: int, options: dict[str, Any] | None, device: str) -> float:
    """MB, of one step in a process of its own."""
    call = json.dumps({"critic": critic, "batch": batch, "options": options, "device": device})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.methods", "--peak-of", call],
        env=os.environ | memory.ENVIRONMENT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout.strip().splitlines()[-1])


def peak_here(call: dict[str, Any]) -> float:
    step = Step(call["critic"], call["batch"], call["device"])
    for _ in range(2):
        step(call["options"])
    step.critic.zero_grad()
    return memory.peak(lambda: step(call["options"]), call["device"]) / 1e6


def errors(critic: str, device: str, options: dict[str, Any] | None, truth: Tensor) -> dict[str, float]:
    """Relative to fp64: in fp32, and under bf16 autocast."""
    step = Step(critic, CRITICS[critic].batch, device)
    found = {}
    for name, autocast in (("error", None), ("bf16_error", torch.bfloat16)):
        step(options, autocast)
        found[name] = ((step.gradient() - truth).norm() / truth.norm()).item()
    return found


def truth_of(critic: str, device: str) -> Tensor:
    step = Step(critic, CRITICS[critic].batch, device)
    exact = copy.copy(step)
    exact.critic, exact.real, exact.fake, exact.alpha = (
        copy.deepcopy(step.critic).double(), step.real.double(), step.fake.double(), step.alpha.double()
    )  # fmt: skip
    exact(None)
    return exact.gradient()


def measure(critic: str, device: str, rounds: int) -> list[dict[str, Any]]:
    contestants: dict[str, dict[str, Any] | None] = {PEER: None}
    contestants |= {label(options): options for options in CRITICS[critic].options}
    truth = truth_of(critic, device)

    def each(stage: str) -> Iterator[str]:
        return terminal.track([(f"{critic}: {stage}, {name}", name) for name in contestants])

    rows = {name: errors(critic, device, contestants[name], truth) for name in each("error")}  # and warms up
    batch = CRITICS[critic].batch
    step = Step(critic, batch, device)
    for name in each("first call"):
        step(contestants[name])
    names = list(contestants)
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, list[int]] = {name: [] for name in names}
    for _ in terminal.track([(f"{critic}: a round of all", None)] * rounds):
        order.shuffle(names)
        for name in names:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            times[name].append(timing.seconds(partial(step, contestants[name]), device))
            faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peaks = {name: peak(critic, batch, contestants[name], device) for name in each("memory")}
    return [
        {
            "critic": critic, "batch": batch, "method": name, "rounds": rounds,
            "ms": 1e3 * statistics.median(times[name]), **timing.ratio(times[PEER], times[name]),
            "peak_mb": peaks[name], "peak_share": peaks[name] / peaks[PEER],
            "fresh_mb": statistics.median(faults[name]) * resource.getpagesize() / 1e6, **rows[name],
        }
        for name in contestants
    ]  # fmt: skip


def memory_against_batch(device: str) -> list[dict[str, Any]]:
    jobs = [(f"vit: memory, {label(options)}, batch {batch}", (options, batch)) for options, batch in GROWTH]
    return [
        {"critic": "vit", "method": label(options), "batch": batch, "peak_mb": peak("vit", batch, options, device)}
        for options, batch in terminal.track(jobs)
    ]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--critic", choices=CRITICS, help="one of them")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--peak-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_rounds(parser, options.rounds)
    check_device(parser, options.device)
    if options.peak_of:
        print(peak_here(options.peak_of))
        return

    about = provenance.provenance(options.device)
    chosen = [options.critic] if options.critic else list(CRITICS)
    results = [row | about for critic in chosen for row in measure(critic, options.device, options.rounds)]
    growth = [row | about for row in memory_against_batch(options.device)] if "vit" in chosen else []

    threads = torch.get_num_threads()
    title = f"a penalty step, fp32 on {options.device}, torch {torch.__version__}, {threads} threads"
    console = Console()
    console.width = max(console.width, 105)
    for critic in dict.fromkeys(row["critic"] for row in results):
        rows = [row for row in results if row["critic"] == critic]
        headings = ("method", "ms", "by hand / ours", "peak MB", "of by hand", "fresh MB", "error", "bf16 error")
        table = Table(*headings, title=f"{critic}, batch {rows[0]['batch']}: {title}")
        for row in rows:
            table.add_row(
                row["method"], f"{row['ms']:.0f}",
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})", f"{row['peak_mb']:.0f}",
                f"1/{1 / row['peak_share']:.1f}", f"{row['fresh_mb']:.0f}",
                f"{row['error']:.1e}", f"{row['bf16_error']:.1e}",
            )  # fmt: skip
        console.print(table)
    if growth:
        table = Table("ViT, method", "batch", "peak MB", title="memory against batch")
        for row in growth:
            table.add_row(row["method"], str(row["batch"]), f"{row['peak_mb']:.0f}")
        console.print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"title": title, "results": results, "growth": growth}, indent=1))


if __name__ == "__main__":
    main()
