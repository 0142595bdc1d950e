"""chunk_size: the penalty and its gradient, some samples at a time, so that memory does not grow with the batch.

The penalty is a scalar, so its gradient is known up to one factor when it is called: each chunk's is taken at once,
added up, and its graph freed. The backward then multiplies. Exact where the method is, at no extra work.
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

from . import data_parallel, double_backward, graph
from .directional import refuse_higher_order
from .evaluations import Buffers, Evaluations
from .findings import Findings
from .form import accumulation_type
from .input_gradient import add_up, gradient_of_first
from .question import Answer, Question

# (question, points, leaves, upstream) -> the answer, and upstream times the penalty's gradient with respect to leaves
Differentiate = Callable[[Question, list[Tensor], list[Tensor], Any], tuple[Answer, Sequence[Tensor | None]]]


class Batch:
    """The samples (and alpha) that points are made of, and the critic's further arguments, to be cut row by row."""

    def __init__(self, question: Question, sources: Sequence[Tensor], points_of: Callable[..., list[Tensor]]) -> None:
        self.question, self.sources, self.points_of = question, sources, points_of
        self.rows = question.form.rows
        self.group = len(sources[0]) // self.rows
        others, self.tree = tree_flatten((question.args, question.kwargs))
        lengths = (self.rows, len(sources[0]))
        self.is_cut = [isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] in lengths for t in others]
        self.arrays = [t for t in others if isinstance(t, ndarray) and t.ndim > 0 and len(t) in lengths]
        self.cut = [*sources, *compress(others, self.is_cut)]
        # Those without the batch in front that want a gradient. What they come from is none of the chunks' business.
        attached = [
            isinstance(t, Tensor) and t.requires_grad and not cut for t, cut in zip(others, self.is_cut, strict=True)
        ]
        self.shared = list(compress(others, attached))
        self.others = [t.detach().requires_grad_() if own else t for t, own in zip(others, attached, strict=True)]
        self.shared_leaves = list(compress(self.others, attached))

    def parts(self, chunk_size: int) -> Iterator[tuple[Question, list[Tensor], list[Tensor]]]:
        """One after the other, so that each can be forgotten before the next is made."""
        if chunk_size % self.group:
            raise ValueError(
                f"chunk_size must be a multiple of group_size, got {chunk_size} for groups of {self.group}"
            )
        if self.arrays and chunk_size // self.group < self.rows:
            raise ValueError(
                "critic_args and critic_kwargs must have what is of one sample each in tensors with chunk_size, which "
                f"cuts them, got a NumPy array of {len(self.arrays[0])}"
            )
        for start in range(0, self.rows, chunk_size // self.group):
            yield self.part(start, min(start + chunk_size // self.group, self.rows))

    def part(self, start: int, stop: int) -> tuple[Question, list[Tensor], list[Tensor]]:
        """The question about some rows, their points, and what was cut for them, each piece a leaf."""
        pieces = []
        for tensor in self.cut:
            each = len(tensor) // self.rows
            pieces.append(tensor.detach()[start * each : stop * each].requires_grad_(tensor.requires_grad))
        sources = pieces[: len(self.sources)]
        rest = iter(pieces[len(self.sources) :])
        others = [next(rest) if cut else t for t, cut in zip(self.others, self.is_cut, strict=True)]
        args, kwargs = tree_unflatten(others, self.tree)
        form = self.question.form._replace(rows=stop - start)
        question = self.question._replace(args=args, kwargs=kwargs, form=form)
        return question, self.points_of(sources, question.ops), pieces


def penalise(
    question: Question,
    sources: Sequence[Tensor],
    points_of: Callable[..., list[Tensor]],
    chunk_size: int,
    findings: Findings,
    differentiate: Differentiate,
) -> Answer:
    """`sources` are what `points_of` makes the points of: the samples, and alpha."""
    critic = _with_known_parameters(question, findings)
    form, batch = question.form, Batch(question, sources, points_of)
    if not form.reduce:
        raise ValueError("reduction must be 'mean' or 'sum' with chunk_size, which needs one number, got 'none'")
    parameters = [p for p in critic.parameters() if p.requires_grad]
    whole = [*parameters, *batch.shared_leaves]
    attached = [*parameters, *batch.shared, *[t for t in batch.cut if t.requires_grad]]
    if not attached:
        return value(question, sources, points_of, chunk_size, findings)
    make = findings.make((question.args, question.kwargs))
    if batch.rows > 1 and make not in findings.separate:
        rows = min(max(2, chunk_size // batch.group), batch.rows)
        if _check_separate(batch, rows, whole, findings):
            if len(findings.separate) > 100:  # words that change from call to call
                findings.separate.clear()
            findings.separate.add(make)

    # Scores are scaled in the chunks' backward too: an fp16 critic's small gradients would vanish in it.
    upstream = 1.0 if question.grad_scale is None else question.grad_scale
    answers: list[Answer] = []
    sums: list[Tensor | None] = [None] * len(whole)
    pieces_grads: list[list[Tensor | None]] = []
    buffers = Buffers(findings)
    for part, points, pieces in batch.parts(chunk_size):
        wanted = [*whole, *[piece for piece in pieces if piece.requires_grad]]
        # One call is one step of a spectral norm's power iteration, however many chunks it takes.
        with buffers.as_before() if answers else nullcontext(), _without_hooks(whole):
            answer, found = differentiate(part, points, wanted, upstream)
        answers.append(answer._replace(penalty=answer.penalty.detach()))
        add_up(sums, (None if g is None else _precise(g) for g in found[: len(whole)]))
        pieces_grads.append([
            torch.zeros_like(x) if g is None else g
            for x, g in zip(wanted[len(whole) :], found[len(whole) :], strict=True)
        ])  # fmt: skip
        del answer, found  # or a graph and one more set of gradients would live beside the next chunk's
    whole_answer = _joined(answers, form.reduce)

    if data_parallel.finds_unused(findings):
        reached = [g is not None for g in sums]
        sums = list(compress(sums, reached))
        attached = [*compress(attached, reached), *attached[len(whole) :]]
    known = [*sums, *[torch.cat(grads) for grads in zip(*pieces_grads, strict=True)]]
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(attached, known, strict=True)]
    if form.kappa is not None:
        gradients = [g * form.kappa for g in gradients]
    return whole_answer._replace(penalty=Known.apply(whole_answer.penalty, gradients, *attached))


def _precise(gradient: Tensor) -> Tensor:
    """As it is added up: sums of many small ones would be lost in half types."""
    return gradient if gradient.is_complex() else gradient.to(accumulation_type(gradient.dtype))


def value(
    question: Question,
    sources: Sequence[Tensor],
    points_of: Callable[..., list[Tensor]],
    chunk_size: int,
    findings: Findings,
) -> Answer:
    """Without gradients."""
    buffers = Buffers(findings)
    answers: list[Answer] = []
    for part, points, _ in Batch(question, sources, points_of).parts(chunk_size):
        with buffers.as_before() if answers else nullcontext():
            answers.append(double_backward.penalise(part, points, findings, create_graph=False))
    return _joined(answers, question.form.reduce)


def _joined(answers: Sequence[Answer], reduce: bool) -> Answer:
    penalties = [answer.penalty for answer in answers]
    penalty = torch.stack(penalties).sum() if reduce else torch.cat(penalties)
    norms = torch.cat([answer.norms for answer in answers])
    error = torch.stack([torch.as_tensor(answer.error) for answer in answers]).max()
    return Answer(penalty, norms, error)


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """A hook on a parameter is for its gradient, which is the sum of the chunks': it runs in the backward of that."""
    hooked = [t._backward_hooks for t in leaves if t._backward_hooks]
    hooks = [dict(each) for each in hooked]
    for each in hooked:
        each.clear()
    try:
        yield
    finally:
        for each, kept in zip(hooked, hooks, strict=True):
            each.update(kept)


class Known(torch.autograd.Function):
    """A number whose gradients, up to the upstream factor, are here already."""

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


def _with_known_parameters(question: Question, findings: Findings) -> Module:
    if not isinstance(question.critic, Module):
        raise ValueError(
            "critic must be an nn.Module with chunk_size, whose parameters are to be known, got "
            f"{type(question.critic).__name__}: hand the module itself, and labels and the like in critic_args"
        )
    if findings.sharded:
        raise ValueError(
            "chunk_size must be None under FSDP, whose hooks run in the critic's own backward, got one: use "
            "method='directional' without it"
        )
    return question.critic


def _check_separate(batch: Batch, rows: int, whole: Sequence[Tensor], findings: Findings) -> bool:
    """Once per critic and mode: its samples do not see one another, and every parameter it reaches is known.

    False where its scores have no gradient yet, as with a last layer of zeros: then there is nothing to see.
    """
    question, points, pieces = batch.part(0, rows)
    leaves = [x.detach().requires_grad_() for x in points]
    with Evaluations(findings, leaves[0].device) as evaluations, torch.enable_grad():
        scores = evaluations.again(question).scores(leaves)
    graph.refuse_reentrant(graph.nodes([scores]))
    known = {id(t) for t in (*whole, *pieces, *leaves)}
    for leaf in graph.leaves_reached([scores]):
        if id(leaf) not in known:
            raise ValueError(
                f"critic must reach no parameters but its own with chunk_size, got one that reaches another, of shape "
                f"{tuple(leaf.shape)}: make it a part of the critic, or hand it in critic_args"
            )
    if scores.numel() % rows:
        raise ValueError(
            f"critic must return as many scores for each sample with chunk_size, got {tuple(scores.shape)} for {rows}"
        )
    with evaluations.buffers.as_before():  # for checkpoints, which run their part again
        own, others = gradient_of_first(scores, leaves, rows, False)
    if others:
        raise ValueError(
            "critic must judge each sample by itself with chunk_size, got one whose first score depends on the "
            "second sample (batch normalisation, minibatch statistics, or scores that do not lie sample by sample)"
        )
    return own
