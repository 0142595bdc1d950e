"""chunk_size: the penalty and its gradient, some samples at a time, so that memory does not grow with the batch.

The penalty is a scalar, so its gradient is known up to one factor in the call itself: each chunk's is taken at once and
added up, and the chunk's graph freed. The backward multiplies. As exact as the method, at no extra work.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import compress
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..critics import data_parallel
from ..critics.autograd_graph import nodes, reached_leaves, refuse_reentrant
from ..critics.critic import Critic
from ..critics.state import Buffers
from ..form import Method, accumulation_type
from . import double_backward
from .critic_call import CriticCall, PenaltyPoints, PenaltyResult, refuse_higher_order
from .input_gradients import accumulate, first_row_dependence

# (call, points, leaves, upstream, critic, method) -> the penalty, and upstream times its gradient at the leaves
PenaltyAndGradients = Callable[..., tuple[PenaltyResult, Sequence[Tensor | None]]]


class Batch:
    """The tensors with the batch in front, to be cut: those of the points, and those among the further arguments."""

    def __init__(self, call: CriticCall, points: PenaltyPoints) -> None:
        self.call, self.points = call, points
        self.rows = call.form.rows
        samples = len(points.batch[0])
        self.group = samples // self.rows
        others, self.tree = tree_flatten((call.args, call.kwargs))
        lengths = (self.rows, samples)
        self.is_cut = [isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] in lengths for t in others]
        self.arrays = [t for t in others if isinstance(t, ndarray) and t.ndim > 0 and len(t) in lengths]
        self.cut = [*points.batch, *compress(others, self.is_cut)]
        # Arguments that are not cut and need a gradient, taken at leaves of our own instead of the graph behind them.
        own = [isinstance(t, Tensor) and t.requires_grad and not c for t, c in zip(others, self.is_cut, strict=True)]
        self.shared = list(compress(others, own))
        self.others = [t.detach().requires_grad_() if is_own else t for t, is_own in zip(others, own, strict=True)]
        self.shared_leaves = list(compress(self.others, own))

    def chunks(self, chunk_size: int) -> Iterator[tuple[CriticCall, list[Tensor], list[Tensor]]]:
        """One after the other, so that each can be freed before the next is built."""
        if chunk_size % self.group:
            raise ValueError(f"chunk_size must be a multiple of group_size, {self.group}, got {chunk_size}")
        if self.arrays and chunk_size // self.group < self.rows:
            raise ValueError(
                "critic_args and critic_kwargs must have per-sample values in tensors with chunk_size, which cuts "
                f"them, got a NumPy array of {len(self.arrays[0])}"
            )
        for start in range(0, self.rows, chunk_size // self.group):
            yield self.chunk(start, min(start + chunk_size // self.group, self.rows))

    def chunk(self, start: int, stop: int) -> tuple[CriticCall, list[Tensor], list[Tensor]]:
        """The call for some rows, their points, and what was cut for them, each piece a leaf."""
        pieces = []
        for tensor in self.cut:
            each = len(tensor) // self.rows
            pieces.append(tensor.detach()[start * each : stop * each].requires_grad_(tensor.requires_grad))
        count = len(self.points.batch)
        rest = iter(pieces[count:])
        others = [next(rest) if cut else t for t, cut in zip(self.others, self.is_cut, strict=True)]
        args, kwargs = tree_unflatten(others, self.tree)
        form = self.call.form._replace(rows=stop - start)
        call = self.call._replace(args=args, kwargs=kwargs, form=form)
        return call, self.points.build(pieces[:count], call.ops), pieces


def compute_penalty(
    call: CriticCall, points: PenaltyPoints, method: Method, critic: Critic, penalty_and_gradients: PenaltyAndGradients
) -> PenaltyResult:
    """The penalty, whose backward multiplies the sums of the chunks' gradients."""
    parameters = [p for p in _module_of(critic).parameters() if p.requires_grad]
    form, batch, chunk_size = call.form, Batch(call, points), method.chunk_size
    assert chunk_size is not None
    if not form.reduce:
        raise ValueError("reduction must be 'mean' or 'sum' with chunk_size, which needs one number, got 'none'")
    whole = [*parameters, *batch.shared_leaves]
    attached = [*parameters, *batch.shared, *[t for t in batch.cut if t.requires_grad]]
    if not attached:
        return compute_value(call, points, chunk_size, critic)
    composition, independent = critic.profile.composition((call.args, call.kwargs)), critic.profile.independent_samples
    if batch.rows > 1 and composition not in independent:
        rows = min(max(2, chunk_size // batch.group), batch.rows)
        if _check_independent(batch, rows, whole, critic):
            independent[composition] = True

    # Scores are scaled in the chunks' backward too, where an fp16 critic's small gradients would vanish.
    upstream = 1.0 if call.grad_scale is None else call.grad_scale
    results: list[PenaltyResult] = []
    count = len(whole)
    sums: list[Tensor | None] = [None] * count
    pieces_gradients: list[list[Tensor | None]] = []
    buffers = Buffers(critic.modules())
    for chunk, chunk_points, pieces in batch.chunks(chunk_size):
        wanted = [*whole, *[piece for piece in pieces if piece.requires_grad]]
        # One call is one step of a spectral norm's power iteration, whatever the number of chunks.
        with buffers.restored() if results else nullcontext(), _without_hooks(whole):
            result, found = penalty_and_gradients(chunk, chunk_points, wanted, upstream, critic, method)
        results.append(result._replace(penalty=result.penalty.detach()))
        # Not in half types, where the sum of many small gradients would be lost.
        terms = [g if g is None or g.is_complex() else g.to(accumulation_type(g.dtype)) for g in found[:count]]
        accumulate(sums, terms)
        pieces_gradients.append([
            torch.zeros_like(x) if g is None else g
            for x, g in zip(wanted[count:], found[count:], strict=True)
        ])  # fmt: skip
        del result, found, terms  # or a graph and one more set of gradients would be alive during the next chunk
    combined = _combined(results, form.reduce)

    if data_parallel.finds_unused_parameters(critic.profile):
        reached = [g is not None for g in sums]
        sums = list(compress(sums, reached))
        attached = [*compress(attached, reached), *attached[count:]]
    known = [*sums, *[torch.cat(gradients) for gradients in zip(*pieces_gradients, strict=True)]]
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(attached, known, strict=True)]
    if form.kappa is not None:
        gradients = [g * form.kappa for g in gradients]
    return combined._replace(penalty=PrecomputedGradients.apply(combined.penalty, gradients, *attached))


def compute_value(call: CriticCall, points: PenaltyPoints, chunk_size: int, critic: Critic) -> PenaltyResult:
    """Without gradients."""
    buffers = Buffers(critic.modules())
    results: list[PenaltyResult] = []
    for chunk, chunk_points, _ in Batch(call, points).chunks(chunk_size):
        with buffers.restored() if results else nullcontext():
            results.append(double_backward.compute_penalty(chunk, chunk_points, critic, create_graph=False))
    return _combined(results, call.form.reduce)


def _combined(results: Sequence[PenaltyResult], reduce: bool) -> PenaltyResult:
    penalties = [result.penalty for result in results]
    penalty = torch.stack(penalties).sum() if reduce else torch.cat(penalties)
    norms = torch.cat([result.norms for result in results])
    error = torch.stack([torch.as_tensor(result.error) for result in results]).max()
    return PenaltyResult(penalty, norms, error)


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """A hook on a parameter takes the whole gradient, the sum over the chunks: it runs in the backward of that."""
    hooked = [t._backward_hooks for t in leaves if t._backward_hooks]
    hooks = [dict(each) for each in hooked]
    for each in hooked:
        each.clear()
    try:
        yield
    finally:
        for each, kept in zip(hooked, hooks, strict=True):
            each.update(kept)


class PrecomputedGradients(torch.autograd.Function):
    """A scalar whose gradients are known up to the upstream factor."""

    @staticmethod
    def forward(ctx: Any, penalty: Tensor, gradients: list[Tensor], *attached: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [t.dtype for t in attached]
        return penalty.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        refuse_higher_order("chunk_size")
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *[(upstream * g).to(dtype) for g, dtype in gradients]


def _module_of(critic: Critic) -> Module:
    if not isinstance(critic.function, Module):
        raise ValueError(
            "critic must be an nn.Module with chunk_size, whose parameters are to be known, got "
            f"{type(critic.function).__name__}: pass the module itself, with labels and other arguments in critic_args"
        )
    if critic.profile.sharded:
        raise ValueError(
            "chunk_size must be None under FSDP, whose hooks run in the critic's own backward, got a number: use "
            "method='directional' without it"
        )
    return critic.function


def _check_independent(batch: Batch, rows: int, whole: Sequence[Tensor], critic: Critic) -> bool:
    """Once per composition of the critic: no sample's score depends on another, and every parameter reached is known.

    False where the scores have no gradient yet, as with a last layer of zeros: then nothing can be seen.
    """
    call, points, pieces = batch.chunk(0, rows)
    leaves = [x.detach().requires_grad_() for x in points]
    with critic.state(leaves[0].device) as state, torch.enable_grad():
        scores = call.again(state).scores(leaves)
    refuse_reentrant(nodes([scores]))
    known = {id(t) for t in (*whole, *pieces, *leaves)}
    for leaf in reached_leaves([scores]):
        if id(leaf) not in known:
            raise ValueError(
                f"critic must reach no parameters but its own with chunk_size, got one that reaches another, of shape "
                f"{tuple(leaf.shape)}: make it a part of the critic, or pass it in critic_args"
            )
    if scores.numel() % rows:
        raise ValueError(
            f"critic must return as many scores for every sample with chunk_size, got {tuple(scores.shape)} for {rows}"
        )
    with state.buffers.restored():  # for checkpoints, which run their part again
        own, others = first_row_dependence(scores, leaves, rows, False)
    if others:
        raise ValueError(
            "critic must score each sample by itself with chunk_size, got one whose first score depends on the "
            "second sample (batch normalisation, minibatch statistics, or scores in another order)"
        )
    return own
