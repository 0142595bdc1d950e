"""Method by kind of critic: each cell gives plain autograd's gradient, or says in exact words why it cannot."""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from fused_gp import fused_gradient_penalty, reference
from tests.support.compiling import COMPILES
from tests.test_critics import MinibatchStd, Recurrent

pytestmark = pytest.mark.usefixtures("one_thread")

# What the relative error of all weight gradients together may be, in fp64: exact ways, and a difference whose step is
# 2e-6 of the points' norm. Off by half is what it is across a kink.
EXACT, DIFFERENCE = 1e-11, 1e-8

METHODS: dict[str, dict[str, Any]] = {
    "double_backward": {},
    "compiled": {"method": "compiled"},
    "directional": {"method": "directional"},
    "auto": {"method": "auto"},
    "double_backward, chunks": {"chunk_size": 2},
    "directional, chunks": {"method": "directional", "chunk_size": 2},
}

BATCH = 5  # the last chunk is a short one


def batch(*shape):
    return torch.randn(BATCH, *shape, dtype=torch.float64)


def rows():
    return batch(6), batch(6)


def images():
    return batch(2, 8, 8), batch(2, 8, 8)


def mlp(activation=nn.SiLU, width=6):
    return nn.Sequential(nn.Linear(width, 7), activation(), nn.Linear(7, 1))


def conv(*middle):
    return nn.Sequential(nn.Conv2d(2, 4, 3), *middle, nn.SiLU(), nn.Conv2d(4, 1, 2))


class ViT(nn.Module):
    """Four patches, one block. On CPUs too, attention is the flash kernel where nobody forbids it."""

    def __init__(self):
        super().__init__()
        self.patches, self.qkv, self.head = nn.Conv2d(2, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 1)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.gelu(tokens + attended).mean(1))


class MathAttention(nn.Module):
    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        with sdpa_kernel(SDPBackend.MATH):
            return self.critic(x)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.embed, self.head = nn.Linear(6, 5), nn.Embedding(3, 5), nn.Linear(5, 1)

    def forward(self, x, labels, *, strength):
        features = torch.tanh(self.body(x))
        return self.head(features).squeeze(1) + strength * (features * self.embed(labels)).sum(1)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.row = nn.Conv2d(2, 3, 3), mlp()

    def forward(self, x):
        return torch.tanh(self.image(x["image"])).mean((1, 2, 3)) + self.row(x["row"]).squeeze(1)


class FusedTanh(torch.autograd.Function):
    """As a fused kernel: its backward has no derivative."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return upstream * (1 - ctx.saved_tensors[0] ** 2)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Checkpointed(nn.Module):
    def __init__(self, critic, use_reentrant):
        super().__init__()
        self.critic, self.use_reentrant = critic, use_reentrant

    def forward(self, x):
        return checkpoint(self.critic, x, use_reentrant=self.use_reentrant)


class Branching(nn.Module):
    """What it does depends on a number that only the device knows."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        return self.critic(x) * (1.0 if x.sum().item() > 1e9 else 2.0) / 2.0


def fused_tanh(critic):
    first, _, last = critic
    return nn.Sequential(first, Apply(FusedTanh.apply), last)


def compiled(critic):
    torch._dynamo.reset()  # or the limit on how often one class is compiled leaves this one as it is
    return torch.compile(critic, backend="aot_eager")


ONCE = "method='double_backward' must differentiate the critic twice, and found {}. Use {}."
SMOOTH = "method='directional' where the critic is smooth"
KINK = (
    "method='directional' needs a smooth critic, and found {}: a difference across its kink is off by half at any "
    "step. Use method='double_backward', or a smooth activation such as SiLU; allow_kinks=True insists."
)
FLASH = (
    'an operation of which autograd says "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is '
    'not implemented"',
    f"{SMOOTH}, or attention that autograd sees: torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
)
FUSED = "the autograd Function FusedTanh, whose backward is once_differentiable", SMOOTH
COMPILED = (
    "a part that torch.compile compiled",
    "method='compiled', or, where the critic is smooth, method='directional'",
)
REENTRANT = (
    "critic must let its input gradient be taken, and has reentrant checkpointing. Use "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)
TOGETHER = (
    "critic must judge each sample by itself with chunk_size, got one whose first score depends on the second sample "
    "(batch normalisation, minibatch statistics, or scores that do not lie sample by sample)"
)
NOT_WHOLE = (
    "method='compiled' needs a critic that torch.compile can compile whole, and it says: {} Use "
    "method='double_backward', or, where the critic is smooth, method='directional'."
)
CHANGING = (
    "method='compiled' needs a critic that changes no buffer on the way from points to scores, as batch normalisation "
    "does in training mode, got one that does. Use method='double_backward', or, where the critic is smooth, "
    "method='directional'."
)
HOOKS = (
    "method='compiled' cannot see through activation checkpointing, save_on_cpu and other hooks on saved tensors: "
    "leave them out, since the compiler itself decides what to keep, or use method='double_backward', or, where the "
    "critic is smooth, method='directional'"
)
UNKNOWN = (
    "critic must be an nn.Module with chunk_size, whose parameters are to be known, got function: hand the module "
    "itself, and labels and the like in critic_args"
)


class Kind(NamedTuple):
    """`build` makes a critic of the plainest kind, whose gradient plain autograd knows; `given` makes of it, with the
    same weights, the one that the penalty gets. `errors`: the words of the methods that do not work for it, with ...
    for the compiler's own."""

    build: Callable[[], nn.Module]
    samples: Callable[[], tuple[Any, Any]] = rows
    given: Callable[[nn.Module], Any] = lambda critic: critic
    options: Mapping[str, Any] = {}
    errors: Mapping[str, str] = {}


def chunked(text):
    return {"double_backward, chunks": text, "directional, chunks": text}


def difference(text):
    return {"directional": text, "directional, chunks": text}


def twice(text):
    return {"double_backward": text, "double_backward, chunks": text}


KINDS = {
    "MLP or conv net, smooth (SiLU, GELU, tanh)": Kind(lambda: conv(nn.GroupNorm(2, 4)), images),
    "MLP or conv net, ReLU or LeakyReLU": Kind(
        lambda: mlp(lambda: nn.LeakyReLU(0.2)), errors=difference(KINK.format("LeakyRelu"))
    ),
    "max-pooling": Kind(
        lambda: conv(nn.MaxPool2d(2)), images, errors=difference(KINK.format("MaxPool2DWithIndices"))
    ),
    "spectral norm": Kind(
        lambda: nn.Sequential(spectral_norm(nn.Linear(6, 5)), nn.Tanh(), spectral_norm(nn.Linear(5, 1)))
    ),
    "dropout": Kind(lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 1))),
    "patch outputs": Kind(lambda: conv(), images),
    "labels": Kind(
        Conditional,
        options={"critic_args": (torch.tensor([0, 2, 1, 2, 0]),), "critic_kwargs": {"strength": 0.5}},
    ),
    "several inputs": Kind(
        Pair, lambda: tuple({"image": batch(2, 4, 4), "row": batch(6)} for _ in range(2))
    ),
    "any callable, such as a lambda": Kind(
        mlp, given=lambda critic: lambda x: 2 * critic(x) / 2, errors=chunked(UNKNOWN)
    ),
    "LSTM": Kind(
        Recurrent, lambda: (batch(4, 3), batch(4, 3)),
        errors={"compiled": NOT_WHOLE.format("Attempted to wrap RNN, GRU, or LSTM ...")},
    ),
    "attention, math": Kind(ViT, images, MathAttention),
    "attention, flash or memory-efficient": Kind(
        ViT, images,
        errors=twice(ONCE.format(*FLASH)) | {"compiled": ONCE.replace("double_backward", "compiled").format(*FLASH)},
    ),
    "fused kernel, differentiable once": Kind(
        lambda: mlp(nn.Tanh), given=fused_tanh,
        errors=twice(ONCE.format(*FUSED)) | {"compiled": ONCE.replace("double_backward", "compiled").format(*FUSED)},
    ),
    "critic under torch.compile, smooth": Kind(mlp, given=compiled, errors=twice(ONCE.format(*COMPILED))),
    "critic under torch.compile, ReLU": Kind(
        lambda: mlp(nn.ReLU), given=compiled,
        errors=twice(ONCE.format(*COMPILED)) | difference(KINK.format("Relu"))
        | {"auto": f"{ONCE.format(*COMPILED)} But {KINK.format('Relu')}"},
    ),
    "checkpointing": Kind(
        mlp, given=lambda critic: Checkpointed(critic, use_reentrant=False), errors={"compiled": HOOKS}
    ),
    "checkpointing, reentrant": Kind(
        mlp, given=lambda critic: Checkpointed(critic, use_reentrant=True),
        errors=dict.fromkeys(METHODS, REENTRANT) | {"compiled": HOOKS},
    ),
    "minibatch statistics": Kind(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), MinibatchStd(), mlp()), errors=chunked(TOGETHER)
    ),
    "batch norm in training (a warning)": Kind(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)),
        errors=chunked(TOGETHER) | {"compiled": CHANGING},
    ),
    "a branch on a number in the data": Kind(
        mlp, given=Branching, errors={"compiled": NOT_WHOLE.format("...data-dependent...")}
    ),
}  # fmt: skip


def gradient_of(penalty, critic):
    grads = torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def truth_of(critic, real, fake, chunk_size, **options):
    """Value and gradient by plain autograd, from the same seed. Dropout draws chunk by chunk, so chunks it is then."""
    if chunk_size is None or not any(isinstance(part, nn.Dropout) for part in critic.modules()):
        chunk_size = BATCH
    alpha = options.pop("alpha")
    torch.manual_seed(3)
    with sdpa_kernel(SDPBackend.MATH):
        penalties = [
            reference.fused_gradient_penalty(
                critic, real[start : start + chunk_size], fake[start : start + chunk_size],
                alpha=alpha[start : start + chunk_size], reduction="sum", **options,
            )
            for start in range(0, BATCH, chunk_size)
        ] if chunk_size < BATCH else [
            reference.fused_gradient_penalty(critic, real, fake, alpha=alpha, reduction="sum", **options)
        ]  # fmt: skip
    penalty = sum(penalties) / BATCH
    return penalty.detach(), gradient_of(penalty, critic)


WAYS = [pytest.param(name, marks=COMPILES if name == "compiled" else ()) for name in METHODS]


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_cell(kind, method):
    """The right value and weight gradients, and the random state that one run leaves; or the error."""
    how, options = METHODS[method], {"alpha": torch.rand(BATCH, dtype=torch.float64), **KINDS[kind].options}
    critic = KINDS[kind].build().double()
    real, fake = KINDS[kind].samples()
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    value, gradient = truth_of(critic, real, fake, how.get("chunk_size"), **options)
    after_truth = torch.rand(3)
    buffers = [buffer.clone() for buffer in critic.buffers()]
    critic.load_state_dict(before)

    given = KINDS[kind].given(critic)
    wanted = KINDS[kind].errors.get(method)
    with contextlib.ExitStack() as stack:
        # Eager and compiled dropout draw the same numbers only when the compiler is told to.
        stack.enter_context(torch._inductor.config.patch(fallback_random=True))
        if "batch norm" in kind:
            stack.enter_context(pytest.warns(UserWarning, match="batch normalisation in training mode"))
        if wanted is not None:
            with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$".replace(re.escape("..."), ".*")):
                fused_gradient_penalty(given, real, fake, **options, **how)
            return
        torch.manual_seed(3)
        penalty = fused_gradient_penalty(given, real, fake, **options, **how)
    assert torch.rand(3).equal(after_truth), "the random state is not the one that a run leaves"
    torch.testing.assert_close(penalty.detach(), value, rtol=1e-11, atol=0)
    ours = gradient_of(penalty, critic)
    error = ((ours - gradient).norm() / gradient.norm()).item()
    exact = "directional" not in method and not (method == "auto" and kind not in TWICE)
    assert error <= (EXACT if exact else DIFFERENCE), f"{error:.1e} off"
    if not exact:
        assert error > 0, "a difference that is exact is none"
    for ours, theirs in zip(critic.buffers(), buffers, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["double_backward", "auto"])
@pytest.mark.parametrize("kind", ["cuDNN", "attention"])
def test_kernels_of_gpus_that_have_no_second_derivative(kind, method):
    """Named at the call; "auto" takes the difference instead."""
    critic = (Recurrent() if kind == "cuDNN" else ViT()).cuda()
    real, fake = (x.float().cuda() for x in ((batch(4, 3), batch(4, 3)) if kind == "cuDNN" else images()))
    if method == "auto":
        fused_gradient_penalty(critic, real, fake, method=method).backward()
        assert all(p.grad.isfinite().all() for p in critic.parameters() if p.grad is not None)
        return
    words = "_cudnn_rnn_backward" if kind == "cuDNN" else "attention"
    with pytest.raises(ValueError, match=f"must differentiate the critic twice, and found .*{words}"):
        fused_gradient_penalty(critic, real, fake, method=method)


def test_what_was_found_under_one_attention_says_nothing_of_another():
    critic, samples = ViT(), [x.float() for x in images()]
    with sdpa_kernel(SDPBackend.MATH):
        for method in ("double_backward", "auto"):
            fused_gradient_penalty(critic, *samples, method=method).backward()
    with pytest.raises(ValueError, match=f"^{re.escape(ONCE.format(*FLASH))}$"):
        fused_gradient_penalty(critic, *samples)
    penalty = fused_gradient_penalty(critic, *samples, alpha=0.3, method="auto")
    with sdpa_kernel(SDPBackend.MATH):
        truth = gradient_of(reference.fused_gradient_penalty(critic, *samples, alpha=0.3), critic)
    assert ((gradient_of(penalty, critic) - truth).norm() / truth.norm()).item() < 1e-3


@pytest.mark.parametrize("how", [{"method": "auto"}, {"method": "compiled"}, {"chunk_size": 2}], ids=str)
def test_a_look_that_ends_in_a_refusal_draws_no_numbers(how):
    """Whoever catches it and goes another way has the numbers that the other way alone has."""
    net = nn.Sequential(nn.Dropout(0.5), MinibatchStd(), nn.Linear(7, 1))
    critic = net if "chunk_size" in how else nn.Sequential(Detached(), net)
    real, fake = batch(6), batch(6)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="critic must"):
        fused_gradient_penalty(critic.double(), real, fake, alpha=0.3, **how)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.rand(3).equal(after)


# Where "auto" finds double backward working.
TWICE = [kind for kind, row in KINDS.items() if "double_backward" not in row.errors]


def test_the_readme_shows_this_matrix():
    """Row by row, cell by cell."""
    lines = (Path(__file__).parent.parent / "README.md").read_text().splitlines()
    heading = next(index for index, line in enumerate(lines) if line.startswith("| critic | "))
    columns = ["double_backward", "compiled", "directional", "auto", "double_backward, chunks", "directional, chunks"]
    assert lines[heading] == "| critic | " + " | ".join(f"`{name}`" for name in columns[:4]) + " | `chunk_size` |"
    shown = {}
    for line in lines[heading + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        shown[name] = cells
    for kind, row in KINDS.items():
        cells = ["error" if name in row.errors else "yes" for name in ("double_backward", "compiled", "directional")]
        auto = "double_backward" if kind in TWICE else "directional"
        cells.append("error" if "auto" in row.errors else auto)
        way = {("yes", "yes"): "yes", ("error", "error"): "error"}
        pair = tuple("error" if name in row.errors else "yes" for name in columns[4:])
        cells.append(way.get(pair, "with double_backward" if pair[0] == "yes" else "with directional"))
        assert shown.pop(kind) == cells
    assert shown == {  # tested in tests/distributed/test_ddp_and_fsdp.py
        "DDP, smooth": ["yes", "error", "yes", "double_backward", "yes"],
        "FSDP2 (`fully_shard`), smooth": ["error", "error", "yes", "directional", "error"],
        "FSDP2 (`fully_shard`), ReLU": ["error"] * 5,
    }
