"""method="directional": a central difference along the penalty's own gradient, of first-order passes only.

With V_i = a_i kappa^2 w(n_i) g_i, the gradient of the penalty P with respect to g, held fixed,

    dP/dtheta = d/dtheta d/dtau S(tau V) at tau = 0,        S(tau V) = sum D(x_hat + tau V)
              ~ d/dtheta m [S(h U) - S(-h U)] / (2h),       m = max_i |V_i|,  U = V / m,

off by O(h^2). The direction is one for all samples, so this is right for critics whose samples see one another. The
value of the penalty is exact; its gradient alone is that of the difference.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.nn import Module

from . import data_parallel, graph, torch_ops
from .evaluations import Evaluations
from .findings import Findings, Run
from .form import PenaltyForm
from .input_gradient import add_up, cotangent, gradient_of_first, input_gradients
from .question import Answer, Question, unrelated
from .rows import Order, from_rows, storage_order, to_rows

# Truncation grows as h^2, rounding as spacing / h: the best step is a multiple of the cube root of the spacing of the
# type that the critic computes in. Which multiple, the critic decides: the best one was 1/8 for the ViT of the
# benchmarks and 2 for its conv net, and at 1/8 the conv net is off by ten times as much. So it is found by trial.
SPACING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
LADDER = [4.0 * 0.5**k for k in range(8)]
TRIAL_EVERY = 1000  # calls: a critic in training changes, slowly


class Kinked(ValueError):
    """The critic's derivative jumps, and a difference across a jump is no derivative."""


class Difference(NamedTuple):
    """Where to evaluate, and what the difference of the scores there is to be multiplied by."""

    plus: list[Tensor]
    minus: list[Tensor]
    factor: Tensor  # m / (2h)
    terms: Tensor  # <g_i, V_i>, what the difference of row i should come to


def penalise(
    question: Question, points: Sequence[Tensor], findings: Findings, step: float | None, allow_kinks: bool
) -> Answer:
    """Run the critic three times; the gradient reaches its parameters, and the points where they are attached."""
    evaluations = Evaluations(findings, points[0].device)
    penalty, norms, difference = _direction(question, points, findings, evaluations, step, allow_kinks)
    mode = findings.mode(points[0].device)
    if evaluations.buffers.kept and mode not in findings.runs_once:
        _refuse_checkpointed_buffers(evaluations.again(question), points, findings)
        findings.runs_once.add(mode)
    dtype = norms.dtype
    again = evaluations.again(question)
    plus, minus = again.scores(difference.plus).to(dtype), again.scores(difference.minus).to(dtype)
    differences = _row_sums(plus - minus, question.form) * difference.factor
    error = _error(differences.detach(), difference.terms)
    if not differences.requires_grad:
        return Answer(penalty, norms, error)
    penalty = data_parallel.reach_all(Surrogate.apply(penalty, differences), plus, findings)
    return Answer(penalty, norms, error)


def differentiate(
    question: Question,
    points: Sequence[Tensor],
    inputs: Sequence[Tensor],
    upstream: float | Tensor,
    findings: Findings,
    step: float | None,
    allow_kinks: bool,
) -> tuple[Answer, list[Tensor | None]]:
    """The penalty, and upstream times its gradient with respect to leaves: one end after the other, so that only one
    graph is alive at a time."""
    evaluations = Evaluations(findings, points[0].device)
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in points]
    penalty, norms, difference = _direction(question, leaves, findings, evaluations, step, allow_kinks)
    wanted = [*inputs, *[x for x in leaves if x.requires_grad]]
    sums: list[Tensor | None] = [None] * len(wanted)
    measured = norms.new_zeros(())
    again = evaluations.again(question)
    for sign, ends in ((1, difference.plus), (-1, difference.minus)):
        scores = again.scores(ends)
        measured = measured + sign * scores.detach().sum(dtype=norms.dtype)
        ones = (torch.ones_like(scores) * (difference.factor * (sign * upstream))).to(scores.dtype)
        with evaluations.buffers.as_before():
            add_up(sums, input_gradients((scores,), (ones,), wanted, False, False))
        del scores
    # What arrived at the points goes on to what they are made of.
    attached = [x for x in points if x.requires_grad]
    arrived = [(x, g) for x, g in zip(attached, sums[len(inputs) :], strict=True) if g is not None]
    sums = sums[: len(inputs)]
    if arrived:
        outputs, cotangents = zip(*arrived, strict=True)
        add_up(sums, input_gradients(outputs, cotangents, inputs, False, False))
    return Answer(penalty, norms, _error(measured * difference.factor, difference.terms)), sums


def _direction(
    question: Question,
    points: Sequence[Tensor],
    findings: Findings,
    evaluations: Evaluations,
    step: float | None,
    allow_kinks: bool,
) -> tuple[Tensor, Tensor, Difference]:
    """The first run: penalty and norms, exact, and the ends of the difference that has the gradient."""
    form = question.form
    leaves = [x.detach().requires_grad_() for x in points]
    scores = question.scores(leaves)
    make = findings.make((question.args, question.kwargs))
    like = (findings.mode(scores.device), make, tuple(x.dtype for x in points))
    run = findings.runs.get(like)
    if run is None or run.calls == TRIAL_EVERY:
        run = findings.runs[like] = _look(question, leaves, scores, evaluations)
    if run.kink and not allow_kinks:
        raise Kinked(
            f"method='directional' needs a smooth critic, and found {run.kink}: a difference across its kink is off by "
            "half at any step. Use method='double_backward', or a smooth activation such as SiLU; allow_kinks=True "
            "insists."
        )
    if not form.reduce and not run.separate:
        run.separate = _check_separate(scores, leaves, form.rows)
    with evaluations.buffers.as_before():  # for checkpoints, which run their part again
        gradients = input_gradients((scores,), (cotangent(scores, question.grad_scale),), leaves, False, False)
    if all(g is None for g in gradients):
        raise unrelated()
    del scores

    orders = [storage_order(x) for x in points]
    rows = [to_rows(x, order, form.rows) for x, order in zip(leaves, orders, strict=True)]
    slopes = [None if g is None else to_rows(g, o, form.rows) for g, o in zip(gradients, orders, strict=True)]
    penalty, norms = question.ops.penalty_forward([g for g in slopes if g is not None], form)
    _, sizes = question.ops.penalty_forward([x.detach() for x in rows], SIZE._replace(rows=form.rows))

    # V_i, where kappa g_i is the gradient of the unscaled scores: w(n_i) of it.
    weight = torch_ops.row_weight(norms, norms.new_ones(()), form._replace(kappa=None))
    lengths = norms if form.squared else (norms * norms - form.eps).clamp(min=0).sqrt()
    sizes_of_v = (weight.reshape(-1) * lengths).abs()
    largest = sizes_of_v.max()
    largest = torch.where(largest == 0, 1.0, largest)  # all samples on the target: no direction, and no gradient
    mean_size = sizes.mean()
    unit = torch.where(mean_size == 0, 1.0, mean_size)
    difference = Stencil(points, rows, orders, slopes, question.ops)
    kappa = 1.0 if form.kappa is None else form.kappa
    if step is None:
        if run.calls == 0:
            again, longest = evaluations.again(question), lengths.max()
            along = unit * kappa / torch.where(longest == 0, 1.0, longest)
            run.step = _trial(again, difference, along, run.spacing)
        run.calls += math.isfinite(run.step)
        step = run.step
    h = step * unit
    plus, minus = difference.ends(weight * (h * kappa / largest), attached=True)
    terms = weight.reshape(-1) * lengths * lengths
    return penalty, norms, Difference(plus, minus, largest / (2 * h), terms.expand(form.rows))


class Stencil(NamedTuple):
    """Points, as the critic takes them and as rows, and the gradients of the scores at them; None is zero."""

    points: Sequence[Tensor]
    rows: Sequence[Tensor]
    orders: Sequence[Order | None]
    gradients: Sequence[Tensor | None]
    ops: Any

    def ends(self, column: Tensor, attached: bool) -> tuple[list[Tensor], list[Tensor]]:
        """x + c g and x - c g: with a gradient to what the points are made of, or without."""
        column = column.expand(len(self.rows[0]), 1).contiguous()
        plus, minus = [], []
        for x, row, order, gradient in zip(self.points, self.rows, self.orders, self.gradients, strict=True):
            if gradient is None:
                plus.append(x)
                minus.append(x)
                continue
            if attached and x.requires_grad:
                up, down = Perturb.apply(to_rows(x, order, len(row)), gradient, column, self.ops)
            else:
                up, down = self.ops.perturb(row.detach(), gradient, column)
            plus.append(from_rows(up, order, x))
            minus.append(from_rows(down, order, x))
        return plus, minus


def _trial(question: Question, stencil: Stencil, along: Tensor, spacing: float) -> float:
    """The step at which the quotients [D(h) - D(-h)] / 2h of the scores change least, of those on the ladder.

    From one quotient to the next, at half the step, truncation changes by 3/4 of itself, rounding by about twice. One
    pair may agree by luck, so three in a row have to, and the step is the middle one. NaN where no quotient is finite,
    as with infinities in the samples.
    """
    steps = [share * spacing ** (1 / 3) for share in LADDER]
    quotients = []
    with torch.no_grad():
        for step in steps:
            plus, minus = (question.scores(end) for end in stencil.ends(along * step, attached=False))
            quotients.append((plus.to(along.dtype) - minus.to(along.dtype)) / (2 * step))
        changes = torch.stack([(a - b).norm() for a, b in pairwise(quotients)])
        both = torch.maximum(changes[1:], changes[:-1]).nan_to_num(math.inf, math.inf).tolist()
    least = min(both)
    return steps[both.index(least) + 1] if least < math.inf else math.nan


# The norm of each sample itself.
SIZE = PenaltyForm(1, 0.0, False, True, 0.0, None, 1.0, True)


class Perturb(torch.autograd.Function):
    """Differentiable in the points alone, the direction being held fixed: both ends move as they do."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, gradients: Tensor, column: Tensor, ops: Any) -> tuple[Tensor, Tensor]:
        return ops.perturb(points, gradients, column)

    @staticmethod
    def backward(ctx: Any, plus: Tensor, minus: Tensor) -> Any:
        return plus + minus, None, None, None


class Surrogate(torch.autograd.Function):
    """The value of the penalty with the gradient of the difference."""

    @staticmethod
    def forward(ctx: Any, penalty: Tensor, differences: Tensor) -> Tensor:
        return penalty.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        refuse_higher_order("method='directional'")
        return None, upstream


def refuse_higher_order(what: str) -> None:
    """In a backward: what it is about to return is right, its derivative would not be."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} gives the penalty's first derivative alone, and this backward is one with create_graph=True: use "
            "method='double_backward', without chunk_size"
        )


def _row_sums(differences: Tensor, form: PenaltyForm) -> Tensor:
    """Of each row where each has its own penalty, of all where there is one."""
    return differences.sum() if form.reduce else differences.reshape(form.rows, -1).sum(1)


def _check_separate(scores: Tensor, leaves: Sequence[Tensor], rows: int) -> bool:
    """Each sample's own difference is needed, so the scores must be of one each. False where that does not show yet."""
    own, others = False, True
    if scores.numel() % rows == 0:
        own, others = gradient_of_first(scores, leaves, rows, True)
    if others:
        raise ValueError(
            "critic must judge each sample by itself, with the samples in front, for reduction='none' with "
            f"method='directional', got scores of shape {tuple(scores.shape)} for {rows} of them that do not"
        )
    return own


def _refuse_checkpointed_buffers(question: Question, points: Sequence[Tensor], findings: Findings) -> None:
    """A checkpoint runs its part again in the backward, where nobody sets the buffers back for each end."""
    outside = _top_saved_tensors_default_hooks(True)
    found = []

    def look(part: Module, _: Any) -> None:
        if _top_saved_tensors_default_hooks(True) is not outside:
            found.append(type(part).__name__)

    parts = [part for module in findings.alive() for part in module.modules() if part.training and part._buffers]
    handles = [part.register_forward_pre_hook(look) for part in parts]
    try:
        question.scores([x.detach() for x in points])
    finally:
        for handle in handles:
            handle.remove()
    if found:
        raise ValueError(
            f"method='directional' runs the critic from one state of its buffers, and found {found[0]}, which has "
            "some, under checkpointing (or other hooks on saved tensors), where it would run again from another: use "
            "chunk_size, whose backward is inside the call, or leave that part out of the checkpoint"
        )


def _error(measured: Tensor, terms: Tensor) -> Tensor:
    """How far the measured derivative of the scores is from <g, V>, relative to the sum of what its terms are."""
    total = terms.abs().sum()
    return (measured.sum() - terms.sum()).abs() / torch.where(total == 0, 1.0, total)


def _look(question: Question, leaves: Sequence[Tensor], scores: Tensor, evaluations: Evaluations) -> Run:
    """How the critic computes: once, not at each step."""
    between = graph.nodes_between([scores], leaves)
    graph.refuse_reentrant(between)
    if any(node.name() == graph.COMPILED for node in between):
        # A compiled part is one node. What is in it shows when it runs as it was before.
        with torch.compiler.set_stance("force_eager"):
            between = graph.nodes_between([evaluations.again(question).scores(leaves)], leaves)
    types = graph.types(between) | {scores.dtype} | {x.dtype for x in leaves}
    return Run(graph.kink(between), max(SPACING[dtype] for dtype in types if dtype in SPACING))
