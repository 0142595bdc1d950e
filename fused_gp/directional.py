"""method="directional": a central difference along the penalty's own gradient, of first-order passes only.

With V_i = a_i kappa^2 w(n_i) g_i, the gradient of the penalty P with respect to g, held fixed,

    dP/dtheta = d/dtheta d/dtau S(tau V) at tau = 0,        S(tau V) = sum D(x_hat + tau V)
              ~ d/dtheta m [S(h U) - S(-h U)] / (2h),       m = max_i |V_i|,  U = V / m,

off by O(h^2). The direction is one for all samples, so this is right for critics whose samples see one another. The
value of the penalty is exact; its gradient alone is that of the difference.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import data_parallel, graph, torch_ops
from .evaluations import Evaluations
from .findings import Findings
from .form import PenaltyForm
from .input_gradient import cotangent, input_gradients
from .question import Answer, Question, unrelated
from .rows import from_rows, storage_order, to_rows

# The step, as a fraction of the mean norm of a sample: truncation, ~h^2, and rounding, ~spacing / h, are in balance
# at the cube root of the spacing of the type that the critic computes in. A third of it was best on a small ViT: in
# fp32 the error was 1.1e-4 at 1, 1.8e-5 at 1/4 and 7e-5 at 0.06.
SHARE = 1 / 3
SPACING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}


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
    evaluations = Evaluations(question.critic, points[0].device)
    penalty, norms, difference = _direction(question, points, findings, evaluations, step, allow_kinks)
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
    evaluations = Evaluations(question.critic, points[0].device)
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
        _add(sums, input_gradients((scores,), (ones,), wanted, False, True))
        del scores
    # What arrived at the points goes on to what they are made of.
    attached = [x for x in points if x.requires_grad]
    arrived = [(x, g) for x, g in zip(attached, sums[len(inputs) :], strict=True) if g is not None]
    sums = sums[: len(inputs)]
    if arrived:
        outputs, cotangents = zip(*arrived, strict=True)
        _add(sums, input_gradients(outputs, cotangents, inputs, False, False))
    return Answer(penalty, norms, _error(measured * difference.factor, difference.terms)), sums


def _add(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Not in place: autograd may have given one tensor to two parameters."""
    for index, gradient in enumerate(gradients):
        so_far = sums[index]
        if gradient is not None:
            sums[index] = gradient if so_far is None else so_far + gradient


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
    if not findings.smooth:
        _look_for_kinks(question, leaves, scores, evaluations, allow_kinks)
        findings.smooth = not allow_kinks
    if step is None:
        step = SHARE * max(SPACING[dtype] for dtype in _computed_in(points, scores)) ** (1 / 3)
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
    h = step * torch.where(mean_size == 0, 1.0, mean_size)
    column = (weight * (h / largest)).expand(form.rows, 1)
    column = column if form.kappa is None else column * form.kappa

    plus, minus = [], []
    for x, row, order, slope in zip(points, rows, orders, slopes, strict=True):
        if slope is None:
            ends = (x, x)
        else:
            attached = to_rows(x, order, form.rows) if x.requires_grad else row.detach()
            up, down = perturb(attached, slope, column, question.ops)
            ends = from_rows(up, order, x), from_rows(down, order, x)
        plus.append(ends[0])
        minus.append(ends[1])
    terms = weight.reshape(-1) * lengths * lengths
    return penalty, norms, Difference(plus, minus, largest / (2 * h), terms.expand(form.rows))


# The norm of each sample itself.
SIZE = PenaltyForm(1, 0.0, False, True, 0.0, None, 1.0, True)


def perturb(points: Tensor, gradients: Tensor, column: Tensor, ops: Any) -> tuple[Tensor, Tensor]:
    """x + c g and x - c g, row by row, in one pass."""
    if points.requires_grad:
        return Perturb.apply(points, gradients, column, ops)
    return ops.perturb(points, gradients, column)


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
    if form.reduce:
        return differences.sum()
    if differences.numel() % form.rows:
        raise ValueError(
            "critic must return scores with the samples in front for reduction='none' with method='directional', got "
            f"shape {tuple(differences.shape)} for {form.rows} of them"
        )
    return differences.reshape(form.rows, -1).sum(1)


def _error(measured: Tensor, terms: Tensor) -> Tensor:
    """How far the measured derivative of the scores is from <g, V>, relative to the sum of what its terms are."""
    total = terms.abs().sum()
    return (measured.sum() - terms.sum()).abs() / torch.where(total == 0, 1.0, total)


def _computed_in(points: Sequence[Tensor], scores: Tensor) -> list[torch.dtype]:
    """The types that numbers have on their way through the critic, as far as one can see from outside."""
    device = scores.device.type
    autocast = [torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []
    return [scores.dtype, *[x.dtype for x in points], *autocast]


def _look_for_kinks(
    question: Question, leaves: Sequence[Tensor], scores: Tensor, evaluations: Evaluations, allowed: bool
) -> None:
    between = graph.nodes_between(scores, leaves)
    if any(node.name() == graph.REENTRANT for node in between):
        culprit, remedy = graph.obstacle(between) or ("", "")
        raise ValueError(f"critic must let its input gradient be taken, and has {culprit}. Use {remedy}.")
    if not allowed and any(node.name() == graph.COMPILED for node in between):
        # A compiled part is one node. What is in it shows when it runs as it was before.
        with torch.compiler.set_stance("force_eager"):
            between = graph.nodes_between(evaluations.again(question).scores(leaves), leaves)
    if not allowed and (found := graph.kink(between)):
        raise Kinked(
            f"method='directional' needs a smooth critic, and found {found}: a difference across its kink is off by "
            "half at any step. Use method='double_backward', or a smooth activation such as SiLU; allow_kinks=True "
            "insists."
        )
