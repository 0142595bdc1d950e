"""Method by kind of critic: each pair gives plain autograd's gradient, or raises an error that says why it cannot."""

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from fused_gp import fused_gradient_penalty, reference
from tests.support.compiling import COMPILES
from tests.support.critics import (
    Apply,
    Checkpointed,
    Conditional,
    FusedTanh,
    MathAttention,
    MinibatchStd,
    Recurrent,
    ViT,
    conv,
    mlp,
)
from tests.support.gradients import gradient, relative_error
from tests.support.messages import (
    BUFFER_CHANGED,
    COMPILED,
    COUPLED_SAMPLES,
    FLASH,
    FUSED,
    NOT_A_MODULE,
    NOT_COMPILED_WHOLE,
    NOT_SMOOTH,
    NOT_TWICE_DIFFERENTIABLE,
    NOT_TWICE_DIFFERENTIABLE_COMPILED,
    REENTRANT,
    SAVED_TENSOR_HOOKS,
    exactly,
)
from tests.support.processes import ROOT
from tests.support.samples import doubles, images, vectors

pytestmark = pytest.mark.usefixtures("one_thread")

# Largest relative error of all weight gradients together, in fp64: of exact methods, and of a difference whose step is
# 2e-6 of the norm of the points. Across a kink it would be about a half.
EXACT, DIFFERENCE = 1e-11, 1e-8

METHODS: dict[str, dict[str, Any]] = {
    "double_backward": {},
    "compiled": {"method": "compiled"},
    "directional": {"method": "directional"},
    "auto": {"method": "auto"},
    "double_backward, chunks": {"chunk_size": 2},
    "directional, chunks": {"method": "directional", "chunk_size": 2},
}

BATCH = 5  # so the last chunk is a shorter one


def batch(*shape):
    return doubles(BATCH, *shape)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.row = nn.Conv2d(2, 3, 3), mlp()

    def forward(self, x):
        return torch.tanh(self.image(x["image"])).mean((1, 2, 3)) + self.row(x["row"]).squeeze(1)


class Branching(nn.Module):
    """Takes a branch by a number in the data."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        return self.critic(x) * (1.0 if x.sum().item() > 1e9 else 2.0) / 2.0


def with_fused_tanh(critic):
    first, _, last = critic
    return nn.Sequential(first, Apply(FusedTanh.apply), last)


def under_compile(critic):
    torch._dynamo.reset()  # or this critic would not be compiled beyond the limit of compilations of one class
    return torch.compile(critic, backend="aot_eager")


class Kind(NamedTuple):
    """A row of the matrix.

    build     makes the plain critic, for plain autograd
    given     makes of it, with the same weights, the critic that the penalty gets
    errors    by method; ... stands for any text of the compiler
    """

    build: Callable[[], nn.Module]
    samples: Callable[[], tuple[Any, Any]] = vectors
    given: Callable[[nn.Module], Any] = lambda critic: critic
    options: Mapping[str, Any] = {}
    errors: Mapping[str, str] = {}


def in_chunks(text):
    return {"double_backward, chunks": text, "directional, chunks": text}


def by_difference(text):
    return {"directional": text, "directional, chunks": text}


def by_double_backward(text):
    return {"double_backward": text, "double_backward, chunks": text}


def not_twice_differentiable(found):
    return by_double_backward(NOT_TWICE_DIFFERENTIABLE.format(*found)) | {
        "compiled": NOT_TWICE_DIFFERENTIABLE_COMPILED.format(*found)
    }


KINDS = {
    "MLP or conv net, smooth (SiLU, GELU, tanh)": Kind(lambda: conv(nn.GroupNorm(2, 4)), images),
    "MLP or conv net, ReLU or LeakyReLU": Kind(
        lambda: mlp(activation=lambda: nn.LeakyReLU(0.2)), errors=by_difference(NOT_SMOOTH.format("LeakyRelu"))
    ),
    "max-pooling": Kind(
        lambda: conv(nn.MaxPool2d(2)), images, errors=by_difference(NOT_SMOOTH.format("MaxPool2DWithIndices"))
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
        TwoInputs, lambda: tuple({"image": batch(2, 4, 4), "row": batch(6)} for _ in range(2))
    ),
    "any callable, such as a lambda": Kind(
        mlp, given=lambda critic: lambda x: 2 * critic(x) / 2, errors=in_chunks(NOT_A_MODULE)
    ),
    "LSTM": Kind(
        Recurrent, lambda: (batch(4, 3), batch(4, 3)),
        errors={"compiled": NOT_COMPILED_WHOLE.format("Attempted to wrap RNN, GRU, or LSTM ...")},
    ),
    "attention, math": Kind(ViT, images, MathAttention),
    "attention, flash or memory-efficient": Kind(
        ViT, images,
        errors=not_twice_differentiable(FLASH),
    ),
    "fused kernel, differentiable once": Kind(
        lambda: mlp(activation=nn.Tanh), given=with_fused_tanh,
        errors=not_twice_differentiable(FUSED),
    ),
    "critic under torch.compile, smooth": Kind(
        mlp, given=under_compile, errors=by_double_backward(NOT_TWICE_DIFFERENTIABLE.format(*COMPILED))
    ),
    "critic under torch.compile, ReLU": Kind(
        lambda: mlp(activation=nn.ReLU), given=under_compile,
        errors=by_double_backward(NOT_TWICE_DIFFERENTIABLE.format(*COMPILED)) | by_difference(NOT_SMOOTH.format("Relu"))
        | {"auto": f"{NOT_TWICE_DIFFERENTIABLE.format(*COMPILED)} But {NOT_SMOOTH.format('Relu')}"},
    ),
    "checkpointing": Kind(
        mlp, given=lambda critic: Checkpointed(critic), errors={"compiled": SAVED_TENSOR_HOOKS}
    ),
    "checkpointing, reentrant": Kind(
        mlp, given=lambda critic: Checkpointed(critic, use_reentrant=True),
        errors=dict.fromkeys(METHODS, REENTRANT) | {"compiled": SAVED_TENSOR_HOOKS},
    ),
    "minibatch statistics": Kind(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), MinibatchStd(), mlp()), errors=in_chunks(COUPLED_SAMPLES)
    ),
    "batch norm in training (a warning)": Kind(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)),
        errors=in_chunks(COUPLED_SAMPLES) | {"compiled": BUFFER_CHANGED},
    ),
    "a branch on a number in the data": Kind(
        mlp, given=Branching, errors={"compiled": NOT_COMPILED_WHOLE.format("...data-dependent...")}
    ),
}  # fmt: skip


def expected_value_and_gradient(critic, real, fake, chunk_size, **options):
    """By plain autograd, from the same seed. Dropout draws chunk by chunk, so the reference runs in chunks then."""
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
    return penalty.detach(), gradient(penalty, critic)


BY_METHOD = [pytest.param(name, marks=COMPILES if name == "compiled" else ()) for name in METHODS]
# The critics that "auto" takes by double backward.
TWICE_DIFFERENTIABLE = [kind for kind, row in KINDS.items() if "double_backward" not in row.errors]


@pytest.mark.parametrize("method", BY_METHOD)
@pytest.mark.parametrize("kind", KINDS)
def test_each_method_gives_the_gradient_or_its_error(kind, method):
    """The value, the weight gradients, and the random state that one run leaves."""
    how, options = METHODS[method], {"alpha": torch.rand(BATCH, dtype=torch.float64), **KINDS[kind].options}
    critic = KINDS[kind].build().double()
    real, fake = KINDS[kind].samples()
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    value, expected = expected_value_and_gradient(critic, real, fake, how.get("chunk_size"), **options)
    next_numbers = torch.rand(3)
    buffers = [buffer.clone() for buffer in critic.buffers()]
    critic.load_state_dict(before)

    given = KINDS[kind].given(critic)
    message = KINDS[kind].errors.get(method)
    with contextlib.ExitStack() as stack:
        # Eager and compiled dropout draw the same numbers only when the compiler is told to.
        stack.enter_context(torch._inductor.config.patch(fallback_random=True))
        if "batch norm" in kind:
            stack.enter_context(pytest.warns(UserWarning, match="batch normalisation in training mode"))
        if message is not None:
            with pytest.raises(ValueError, match=exactly(message).replace(re.escape("..."), ".*")):
                fused_gradient_penalty(given, real, fake, **options, **how)
            return
        torch.manual_seed(3)
        penalty = fused_gradient_penalty(given, real, fake, **options, **how)
    assert torch.rand(3).equal(next_numbers), "the random state is not that after one run"
    torch.testing.assert_close(penalty.detach(), value, rtol=1e-11, atol=0)
    error = relative_error(gradient(penalty, critic), expected)
    exact = "directional" not in method and not (method == "auto" and kind not in TWICE_DIFFERENTIABLE)
    assert error <= (EXACT if exact else DIFFERENCE), f"relative error {error:.1e}"
    if not exact:
        assert error > 0, "not a difference"
    for buffer, expected_buffer in zip(critic.buffers(), buffers, strict=True):
        torch.testing.assert_close(buffer, expected_buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["double_backward", "auto"])
@pytest.mark.parametrize("kind", ["cuDNN", "attention"])
def test_gpu_kernels_without_a_second_derivative_are_named(kind, method):
    """At the call; "auto" takes the central difference instead."""
    critic = (Recurrent() if kind == "cuDNN" else ViT()).cuda()
    real, fake = (x.float().cuda() for x in ((batch(4, 3), batch(4, 3)) if kind == "cuDNN" else images()))
    if method == "auto":
        fused_gradient_penalty(critic, real, fake, method=method).backward()
        assert all(p.grad.isfinite().all() for p in critic.parameters() if p.grad is not None)
        return
    words = "_cudnn_rnn_backward" if kind == "cuDNN" else "attention"
    with pytest.raises(ValueError, match=f"must differentiate the critic twice, and found .*{words}"):
        fused_gradient_penalty(critic, real, fake, method=method)


def test_another_attention_kernel_is_examined_again():
    critic, samples = ViT(), [x.float() for x in images()]
    with sdpa_kernel(SDPBackend.MATH):
        for method in ("double_backward", "auto"):
            fused_gradient_penalty(critic, *samples, method=method).backward()
    with pytest.raises(ValueError, match=exactly(NOT_TWICE_DIFFERENTIABLE.format(*FLASH))):
        fused_gradient_penalty(critic, *samples)
    penalty = fused_gradient_penalty(critic, *samples, alpha=0.3, method="auto")
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradient(reference.fused_gradient_penalty(critic, *samples, alpha=0.3), critic)
    assert relative_error(gradient(penalty, critic), expected) < 1e-3


def test_the_readme_shows_this_matrix():
    """With the same rows and cells."""
    lines = (ROOT / "README.md").read_text().splitlines()
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
        auto = "double_backward" if kind in TWICE_DIFFERENTIABLE else "directional"
        cells.append("error" if "auto" in row.errors else auto)
        merged = {("yes", "yes"): "yes", ("error", "error"): "error"}
        chunk_cells = tuple("error" if name in row.errors else "yes" for name in columns[4:])
        cells.append(merged.get(chunk_cells, "with double_backward" if chunk_cells[0] == "yes" else "with directional"))
        assert shown.pop(kind) == cells
    assert shown == {  # tested in tests/distributed/test_ddp_and_fsdp.py
        "DDP, smooth": ["yes", "error", "yes", "double_backward", "yes"],
        "FSDP2 (`fully_shard`), smooth": ["error", "error", "yes", "directional", "error"],
        "FSDP2 (`fully_shard`), ReLU": ["error"] * 5,
    }
