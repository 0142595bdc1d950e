"""Time a penalty step, the call and its backward to the weights, against hand-written versions.

    python -m benchmarks.systems [--device cpu] [--rounds N] [--only NAME] [--size SIZE] [--json FILE]

Each row, a system's penalty, has two peers: the lines as its users write them, and tidy, as somebody writes them who
knows torch well. Ours and theirs take turns of some steps each, as in a training loop, each round in another order, so
that a change of the machine's speed meets all. The ratio to each peer is taken round by round; above 1 ours is faster.
Nothing is timed before all gave the same numbers.

Tiny: 64 points of a plane and a critic of two hidden layers, where time is what Python and small operations cost.
Large: 64 images of 3 x 64 x 64 and a critic of one layer of patches, where time is what memory costs.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import provenance, terminal, timing
from benchmarks.options import check_device, check_rounds
from fused_gp import dragan_penalty, fused_gradient_penalty, input_gradient_penalty, r1_penalty, r2_penalty

BATCH = 64
PAC = 8
SHAPES = {"tiny": (BATCH, 2), "large": (BATCH, 3, 64, 64)}
IN_WORDS = {
    "large": "64 images of 3 x 64 x 64, one layer of patches",
    "tiny": "64 points of a plane, two hidden layers of 64",
}
PEERS = {"usual": "the usual lines", "tidy": "the tightest"}
TURN = {"tiny": 10, "large": 1}  # steps
ROUNDS = {"tiny": 200, "large": 120}

Penalty = Callable[..., Any]


class Row(NamedTuple):
    """A system's penalty, ours and theirs: functions of (critic, real, fake)."""

    name: str
    ours: Penalty
    usual: Penalty
    tidy: Penalty
    critic: Callable[[str], nn.Module]


ROWS: list[Row] = []


def mlp(width: int, outputs: int = 1) -> nn.Sequential:
    hidden = [nn.Linear(width, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(64, outputs))


def patches(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.LeakyReLU(0.2), nn.Conv2d(16, outputs, 1))


def one_score(size: str) -> nn.Module:
    return mlp(2) if size == "tiny" else nn.Sequential(*patches(), nn.Flatten(), nn.Linear(64, 1))


class Packed(nn.Module):
    def __init__(self, size: str) -> None:
        super().__init__()
        self.layers = mlp(PAC * torch.Size(SHAPES[size][1:]).numel())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.reshape(len(x) // PAC, -1))


class Several(nn.Module):
    """Two outputs, of the samples and of the samples cut short."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.first, self.second = one_score(size), one_score(size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x.clamp(-1, 1))


class Graph(nn.Module):
    """Samples in two tensors."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.bonds, self.atoms = one_score(size), one_score(size)

    def forward(self, bonds: Tensor, atoms: Tensor) -> Tensor:
        return torch.tanh(self.bonds(bonds) + self.atoms(atoms))


# The pieces that hand-written penalties are made of: as usual, and tidy.


def points(real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    alpha = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device)
    if tidy:
        return torch.lerp(real, fake, alpha).requires_grad_()
    return (alpha * fake + (1 - alpha) * real).requires_grad_(True)


def gradient(scores: Tensor, x: Tensor, tidy: bool) -> Tensor:
    ones = torch.ones_like(scores)
    if tidy:
        (gradients,) = torch.autograd.grad(scores, x, ones, create_graph=True)
        return gradients if gradients.ndim == 2 else gradients.flatten(1)
    gradients = torch.autograd.grad(
        outputs=scores, inputs=x, grad_outputs=ones, create_graph=True, retain_graph=True, only_inputs=True
    )[0]
    return gradients.view(gradients.size(0), -1)


def norm(gradients: Tensor, tidy: bool) -> Tensor:
    return torch.linalg.vector_norm(gradients, dim=1) if tidy else gradients.norm(2, dim=1)


def mean_square(gradients: Tensor, weight: float, tidy: bool) -> Tensor:
    if tidy:
        return gradients.square().sum() * (weight / len(gradients))
    return (gradients.square().sum(1) * weight).mean()


def row(name: str, ours: Penalty, critic: Callable[[str], nn.Module] = one_score) -> Callable[[Penalty], Penalty]:
    """Decorates theirs, a function of (critic, real, fake, tidy)."""

    def add(theirs: Penalty) -> Penalty:
        ROWS.append(Row(name, ours, partial(theirs, tidy=False), partial(theirs, tidy=True), critic))
        return theirs

    return add


@row("WGAN-GP, eps", lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, weight=10))
def wgan_gp_eps(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    norms = (gradient(critic(x), x, tidy).square().sum(1) + 1e-12).sqrt()
    return 10 * (norms - 1).square().mean()


@row("Improved WGAN", lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, weight=10, eps=0.0))
def improved_wgan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    return 10 * (norm(gradient(critic(x), x, tidy), tidy) - 1).square().mean()


@row(
    "TF-GAN",
    lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, target=2.0, weight=0.25, eps=1e-10),
)
def tf_gan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    norms = (gradient(critic(x), x, tidy).square().sum(1) + 1e-10).sqrt()
    return (norms / 2 - 1).square().mean()


@row(
    "WGAN-LP",
    lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, one_sided=True, weight=10, eps=0.0),
)
def wgan_lp(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    return 10 * (norm(gradient(critic(x), x, tidy), tidy) - 1).relu().square().mean()


@row("0-GP", lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, target=0.0, weight=10))
def zero_gp(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    return mean_square(gradient(critic(x), x, tidy), 10, tidy)


@row("DRAGAN", lambda critic, real, fake: dragan_penalty(critic, real, weight=10, eps=0.0))
def dragan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, real + 0.5 * real.std() * torch.rand_like(real), tidy)
    return 10 * (norm(gradient(critic(x), x, tidy), tidy) - 1).square().mean()


@row("StyleGAN R1", lambda critic, real, fake: r1_penalty(critic, real, weight=10.0))
def r1(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = real.detach().requires_grad_()
    return mean_square(gradient(critic(x), x, tidy), 5, tidy)


@row(
    "R3GAN",
    lambda critic, real, fake: r1_penalty(critic, real, weight=10.0) + r2_penalty(critic, fake, weight=10.0),
)
def r3gan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    return r1(critic, real, fake, tidy) + r1(critic, fake, real, tidy)


def from_outputs(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    x = real.clone().requires_grad_()
    return input_gradient_penalty(critic(x), x, weight=10, eps=0.0)


@row("stylegan2-pytorch", from_outputs)
def stylegan2_pytorch(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = real.clone().requires_grad_()
    return 10 * (norm(gradient(critic(x), x, tidy), tidy) - 1).square().mean()


SCALER = torch.amp.GradScaler("cpu", init_scale=1024.0)


def several_scaled(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    x = real.clone().requires_grad_()
    return input_gradient_penalty(critic(x), x, output_weights=(1.0, 0.5), grad_scale=SCALER, weight=10, eps=0.0)


@row("GigaGAN, GradScaler", several_scaled, critic=Several)
def gigagan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = real.clone().requires_grad_()
    outputs = [SCALER.scale(output) for output in critic(x)]
    ones = [torch.full_like(output, weight) for output, weight in zip(outputs, (1.0, 0.5), strict=True)]
    (gradients,) = torch.autograd.grad(outputs, x, ones, create_graph=True)
    gradients = gradients.flatten(1) * (1 / SCALER.get_scale())
    return 10 * (norm(gradients, tidy) - 1).square().mean()


@row(
    "CTGAN",
    lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, group_size=PAC, weight=10, eps=0.0),
    critic=Packed,
)
def ctgan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    real, fake = (x.view(BATCH // PAC, PAC, *x.shape[1:]) for x in (real, fake))
    alpha = torch.rand(BATCH // PAC, *[1] * (real.ndim - 1), device=real.device)
    x = torch.lerp(real, fake, alpha) if tidy else alpha * fake + (1 - alpha) * real
    x = x.flatten(0, 1).requires_grad_()
    gradients = gradient(critic(x), x, tidy).view(BATCH // PAC, -1)
    return 10 * (norm(gradients, tidy) - 1).square().mean()


@row(
    "CycleGAN",
    lambda critic, real, fake: fused_gradient_penalty(critic, real, fake, weight=10, eps=0.0, return_norms=True)[0],
    critic=lambda size: mlp(2, outputs=9) if size == "tiny" else patches(),
)
def cyclegan(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    x = points(real, fake, tidy)
    norms = norm(gradient(critic(x), x, tidy), tidy)
    norms.detach()  # returned, too
    return 10 * (norms - 1).square().mean()


@row(
    "graphs, two inputs",
    lambda critic, real, fake: fused_gradient_penalty(
        lambda graph: critic(*graph), (real, fake), (fake, real), weight=10
    ),
    critic=Graph,
)
def graphs(critic: nn.Module, real: Tensor, fake: Tensor, tidy: bool) -> Tensor:
    alpha = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device)
    if tidy:
        bonds, atoms = torch.lerp(real, fake, alpha).requires_grad_(), torch.lerp(fake, real, alpha).requires_grad_()
    else:
        bonds = (alpha * fake + (1 - alpha) * real).requires_grad_()
        atoms = (alpha * real + (1 - alpha) * fake).requires_grad_()
    scores = critic(bonds, atoms)
    gradients = torch.autograd.grad(scores, (bonds, atoms), torch.ones_like(scores), create_graph=True)
    square = gradients[0].flatten(1).square().sum(1) + gradients[1].flatten(1).square().sum(1)
    return 10 * ((square + 1e-12).sqrt() - 1).square().mean()


def measure(case: Row, size: str, device: str, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each; median and quartiles of the ratio, theirs / ours, for each peer."""
    torch.manual_seed(0)
    real, fake = (torch.randn(SHAPES[size], device=device) for _ in range(2))
    critic = case.critic(size).to(device)
    weights = list(critic.parameters())
    contestants = {"ours": case.ours, "usual": case.usual, "tidy": case.tidy}

    def step(penalty: Penalty) -> tuple[Tensor, ...]:
        value = penalty(critic, real, fake)
        return (value, *torch.autograd.grad(value, weights, materialize_grads=True))

    def seeded(penalty: Penalty) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return step(penalty)

    wanted = seeded(case.usual)
    for name in ("ours", "tidy"):
        for one, two in zip(seeded(contestants[name]), wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)

    order = random.Random(0)
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            times[name].append(timing.seconds(partial(step, contestants[name]), device, TURN[size]))
    return {
        "system": case.name, "size": size, "shape": list(SHAPES[size]), "rounds": rounds,
        **{f"{name}_ms": 1e3 * statistics.median(times[name]) for name in contestants},
        **{
            f"{peer}_{key}": value
            for peer in PEERS
            for key, value in timing.ratio(times[peer], times["ours"]).items()
        },
    }  # fmt: skip


def every_row(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table("system", "size", "ours, ms", "usual, ms", "tidy, ms", "usual / ours", "tidy / ours", title=title)
    for found in rows:
        milliseconds = [f"{found[f'{name}_ms']:.3f}" for name in ("ours", *PEERS)]
        ratios = [
            f"{found[f'{peer}_ratio']:.2f} ({found[f'{peer}_ratio_low']:.2f} to {found[f'{peer}_ratio_high']:.2f})"
            for peer in PEERS
        ]
        table.add_row(found["system"], found["size"], *milliseconds, *ratios)
    return table


def from_least_to_most(rows: list[dict[str, Any]]) -> Table:
    """The README's table: of the systems' ratios, each the median of its rounds."""
    table = Table("", *PEERS.values(), title="theirs / ours, round by round: the medians, from the least to the most")
    for size, words in IN_WORDS.items():
        found = [row for row in rows if row["size"] == size]
        if found:
            spans = [[row[f"{peer}_ratio"] for row in found] for peer in PEERS]
            table.add_row(words, *(f"{min(span):.2f} to {max(span):.2f}" for span in spans))
    return table


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, help="rounds per case (default: 200 tiny, 120 large)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--size", choices=SHAPES, help="one of the sizes")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    check_rounds(parser, options.rounds)
    check_device(parser, options.device)
    cases = [
        (case, size)
        for size in ([options.size] if options.size else SHAPES)
        for case in ROWS
        if options.only in case.name
    ]
    if not cases:
        parser.error(f"--only: no system has {options.only!r} in its name: {'; '.join(case.name for case in ROWS)}")
    about = provenance.provenance(options.device)
    jobs = [(f"{case.name}, {size}", (case, size)) for case, size in cases]
    results = [
        measure(case, size, options.device, options.rounds or ROUNDS[size]) | about
        for case, size in terminal.track(jobs)
    ]

    threads = torch.get_num_threads()
    title = f"a penalty step, fp32 on {options.device}, torch {torch.__version__}, {threads} threads"
    console = Console()
    console.width = max(console.width, 120)
    for table in (every_row(results, title), from_least_to_most(results)):
        console.print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"title": title, "results": results}, indent=1))


if __name__ == "__main__":
    main()
