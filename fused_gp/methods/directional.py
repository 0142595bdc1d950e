"""method="directional": a central difference along the penalty's own gradient, by first-order passes only.

With V_i = a_i kappa^2 w(n_i) g_i, the gradient of the penalty P with respect to g, held fixed,

    dP/dtheta = d/dtheta d/dtau S(tau V) at tau = 0,        S(tau V) = sum D(x_hat + tau V)
              ~ d/dtheta m [S(h U) - S(-h U)] / (2h),       m = max_i |V_i|,  U = V / m,

up to O(h^2). The direction is one for all samples, so this is right where a score depends on several samples. The
value of the penalty is exact; only its gradient is that of the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.nn import Module

from ..critics import autograd_graph, data_parallel
from ..critics.critic import Critic
from ..critics.state import CriticState
from ..form import Method, PenaltyForm
from ..ops import torch_ops
from ..ops.rows import Order, from_rows, storage_order, to_rows
from .critic_call import CriticCall, PenaltyResult, independent_scores_error, refuse_higher_order
from .input_gradients import accumulate, cotangent, first_row_dependence, input_gradients

# Truncation grows as h^2, rounding as spacing / h: the best step is a multiple of the cube root of the spacing of the
# type that the critic computes in. The multiple depends on the critic: the best one was 1/8 for the ViT of the
# benchmarks and 2 for its conv net, and at 1/8 the conv net is off by ten times as much. So it is found by trial.
SPACING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
STEP_LADDER = [4.0 * 0.5**k for k in range(8)]
TRIAL_EVERY = 1000  # calls: a critic in training changes slowly


class NotSmooth(ValueError):
    """The critic's derivative is discontinuous, and a difference across a jump is not a derivative."""


@dataclass
class Smoothness:
    """What a run of the critic showed of its operations, and the step that was chosen for it."""

    kink: str | None  # an operation whose derivative is discontinuous
    spacing: float  # between 1 and the next number of the coarsest type on the way
    step: float = 0.0  # of the difference, found by trial
    calls: int = 0  # with this step
    independent: bool = False  # each score depends on one sample


class CentralDifference(NamedTuple):
    """Where to evaluate, and the factor on the difference of the scores there."""

    plus: list[Tensor]
    minus: list[Tensor]
    factor: Tensor  # m / (2h)
    terms: Tensor  # <g_i, V_i>, the expected difference of row i


def compute_penalty(call: CriticCall, points: Sequence[Tensor], critic: Critic, method: Method) -> PenaltyResult:
    """Run the critic three times; the gradient reaches its parameters, and the points where they are attached."""
    state = critic.state(points[0].device)
    penalty, norms, difference = _central_difference(call, points, critic, state, method)
    profile = critic.profile
    mode = profile.mode(points[0].device)
    again = call.again(state)
    if state.buffers.kept and mode not in profile.no_buffers_in_checkpoints:
        _refuse_buffers_in_checkpoints(again, points, critic)
        profile.no_buffers_in_checkpoints[mode] = True
    dtype = norms.dtype
    plus, minus = again.scores(difference.plus).to(dtype), again.scores(difference.minus).to(dtype)
    change = plus - minus
    change = change.sum() if call.form.reduce else change.reshape(call.form.rows, -1).sum(1)
    differences = change * difference.factor
    error = _relative_error(differences.detach(), difference.terms)
    if not differences.requires_grad:
        return PenaltyResult(penalty, norms, error)
    penalty = data_parallel.with_all_parameters(Surrogate.apply(penalty, differences), plus, profile)
    return PenaltyResult(penalty, norms, error)


def penalty_and_gradients(
    call: CriticCall, points: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Any, critic: Critic, method: Method
) -> tuple[PenaltyResult, list[Tensor | None]]:
    """The penalty, and upstream times its gradient at the inputs. One graph is alive at a time: each end is
    differentiated before the next is computed."""
    state = critic.state(points[0].device)
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in points]
    penalty, norms, difference = _central_difference(call, leaves, critic, state, method)
    wanted = [*inputs, *[x for x in leaves if x.requires_grad]]
    sums: list[Tensor | None] = [None] * len(wanted)
    measured = norms.new_zeros(())
    again = call.again(state)
    for sign, ends in ((1, difference.plus), (-1, difference.minus)):
        scores = again.scores(ends)
        measured = measured + sign * scores.detach().sum(dtype=norms.dtype)
        ones = (torch.ones_like(scores) * (difference.factor * (sign * upstream))).to(scores.dtype)
        with state.buffers.restored():
            accumulate(sums, input_gradients((scores,), (ones,), wanted, False, False))
        del scores
    # The gradient at the points goes on to what they are built from.
    attached = [x for x in points if x.requires_grad]
    arrived = [(x, g) for x, g in zip(attached, sums[len(inputs) :], strict=True) if g is not None]
    sums = sums[: len(inputs)]
    if arrived:
        outputs, cotangents = zip(*arrived, strict=True)
        accumulate(sums, input_gradients(outputs, cotangents, inputs, False, False))
    error = _relative_error(measured * difference.factor, difference.terms)
    return PenaltyResult(penalty, norms, error), sums


def _central_difference(
    call: CriticCall, points: Sequence[Tensor], critic: Critic, state: CriticState, method: Method
) -> tuple[Tensor, Tensor, CentralDifference]:
    """The first run: penalty and norms, exact, and the difference that has the gradient."""
    form = call.form
    leaves = [x.detach().requires_grad_() for x in points]
    scores = call.scores(leaves)
    profile = critic.profile
    data_parallel.refuse_static_graph(profile)
    composition = profile.composition((call.args, call.kwargs))
    key = (profile.mode(scores.device), composition, tuple(x.dtype for x in points))
    smoothness = profile.directional.get(key)
    if smoothness is None or smoothness.calls == TRIAL_EVERY:
        smoothness = profile.directional[key] = _smoothness(call, leaves, scores, state)
    if smoothness.kink and not method.allow_kinks:
        raise NotSmooth(
            f"method='directional' needs a smooth critic, and found {smoothness.kink}: a difference across its kink is "
            "off by as much as a half at any step. Use method='double_backward', or a smooth activation such as SiLU; "
            "allow_kinks=True runs it nevertheless."
        )
    if not form.reduce and not smoothness.independent:
        smoothness.independent = _check_independent(scores, leaves, form.rows)
    with state.buffers.restored():  # for checkpoints, which run their part again
        gradients = input_gradients((scores,), (cotangent(scores, call.grad_scale),), leaves, False, False)
    if all(g is None for g in gradients):
        raise independent_scores_error()
    del scores

    orders = [storage_order(x) for x in points]
    rows = [to_rows(x, order, form.rows) for x, order in zip(leaves, orders, strict=True)]
    slopes = [None if g is None else to_rows(g, o, form.rows) for g, o in zip(gradients, orders, strict=True)]
    penalty, norms = call.ops.penalty_forward([g for g in slopes if g is not None], form)
    _, sizes = call.ops.penalty_forward([x.detach() for x in rows], SAMPLE_NORM._replace(rows=form.rows))

    # V_i = w(n_i) g_i, with the gradient g_i of the unscaled scores: kappa times that of the scaled ones.
    weight = torch_ops.row_factor(norms, norms.new_ones(()), form._replace(kappa=None))
    lengths = norms if form.squared else (norms * norms - form.eps).clamp(min=0).sqrt()
    largest = (weight.reshape(-1) * lengths).abs().max()
    largest = torch.where(largest == 0, 1.0, largest)  # all samples on the target: no direction, and no gradient
    mean_size = sizes.mean()
    unit = torch.where(mean_size == 0, 1.0, mean_size)
    stencil = Stencil(points, rows, orders, slopes, call.ops)
    kappa = 1.0 if form.kappa is None else form.kappa
    step = method.step
    if step is None:
        if smoothness.calls == 0:
            longest = lengths.max()
            along = unit * kappa / torch.where(longest == 0, 1.0, longest)
            smoothness.step = _best_step(call.again(state), stencil, along, smoothness.spacing)
        smoothness.calls += math.isfinite(smoothness.step)
        step = smoothness.step
    h = step * unit
    plus, minus = stencil.ends(weight * (h * kappa / largest), attached=True)
    terms = weight.reshape(-1) * lengths * lengths
    return penalty, norms, CentralDifference(plus, minus, largest / (2 * h), terms.expand(form.rows))


class Stencil(NamedTuple):
    """The points, as the critic takes them and as rows, and the gradients of the scores there; None is zero."""

    points: Sequence[Tensor]
    rows: Sequence[Tensor]
    orders: Sequence[Order | None]
    gradients: Sequence[Tensor | None]
    ops: Any

    def ends(self, column: Tensor, attached: bool) -> tuple[list[Tensor], list[Tensor]]:
        """x + c g and x - c g: with a gradient to what the points are built from, or without."""
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


def _best_step(call: CriticCall, stencil: Stencil, along: Tensor, spacing: float) -> float:
    """The step at which the quotients [D(h) - D(-h)] / 2h of the scores change least, of those on the ladder.

    From one quotient to the next, at half the step, truncation changes by 3/4 of itself, rounding by about twice. Two
    may agree by chance, so three in a row have to; the step is the middle one. NaN where no quotient is finite.
    """
    steps = [share * spacing ** (1 / 3) for share in STEP_LADDER]
    quotients = []
    with torch.no_grad():
        for step in steps:
            plus, minus = (call.scores(end) for end in stencil.ends(along * step, attached=False))
            quotients.append((plus.to(along.dtype) - minus.to(along.dtype)) / (2 * step))
        changes = torch.stack([(a - b).norm() for a, b in pairwise(quotients)])
        both = torch.maximum(changes[1:], changes[:-1]).nan_to_num(math.inf, math.inf).tolist()
    least = min(both)
    return steps[both.index(least) + 1] if least < math.inf else math.nan


# The norm of each sample itself.
SAMPLE_NORM = PenaltyForm(1, 0.0, False, True, 0.0, None, 1.0, True)


class Perturb(torch.autograd.Function):
    """Differentiable in the points alone, the direction being fixed: both ends move as the points do."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, gradients: Tensor, column: Tensor, ops: Any) -> tuple[Tensor, Tensor]:
        return ops.perturb(points, gradients, column)

    @staticmethod
    def backward(ctx: Any, plus: Tensor, minus: Tensor) -> Any:
        return plus + minus, None, None, None


class Surrogate(torch.autograd.Function):
    """The value of the penalty, with the gradient of the difference."""

    @staticmethod
    def forward(ctx: Any, penalty: Tensor, differences: Tensor) -> Tensor:
        return penalty.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        refuse_higher_order("method='directional'")
        return None, upstream


def _check_independent(scores: Tensor, leaves: Sequence[Tensor], rows: int) -> bool:
    """Each score must depend on one sample, whose own difference is needed. False where that cannot be seen yet."""
    own, others = False, True
    if scores.numel() % rows == 0:
        own, others = first_row_dependence(scores, leaves, rows, True)
    if others:
        raise ValueError(
            "critic must score each sample by itself, with the samples in front, for reduction='none' with "
            f"method='directional', got scores of shape {tuple(scores.shape)} for {rows} of them that do not"
        )
    return own


def _refuse_buffers_in_checkpoints(call: CriticCall, points: Sequence[Tensor], critic: Critic) -> None:
    """A checkpoint runs its part again in the backward, where the buffers are no longer those of each end."""
    outside = _top_saved_tensors_default_hooks(True)
    found = []

    def look(part: Module, _: Any) -> None:
        if _top_saved_tensors_default_hooks(True) is not outside:
            found.append(type(part).__name__)

    parts = [part for part in critic.profile.modules() if part.training and part._buffers]
    handles = [part.register_forward_pre_hook(look) for part in parts]
    try:
        with critic.eagerly():
            call.scores([x.detach() for x in points])
    finally:
        for handle in handles:
            handle.remove()
    if found:
        raise ValueError(
            f"method='directional' runs the critic from one state of its buffers, and found {found[0]}, which has "
            "some, under checkpointing (or other hooks on saved tensors), where it would run again from another: use "
            "chunk_size, whose backward is inside the call, or leave that part out of the checkpoint"
        )


def _relative_error(measured: Tensor, terms: Tensor) -> Tensor:
    """How far the measured derivative of the scores is from <g, V>, relative to the sum of its terms' sizes."""
    total = terms.abs().sum()
    return (measured.sum() - terms.sum()).abs() / torch.where(total == 0, 1.0, total)


def _smoothness(call: CriticCall, leaves: Sequence[Tensor], scores: Tensor, state: CriticState) -> Smoothness:
    """Read off the graph of the scores: at the first call with such arguments, and at every 1000th."""
    between = autograd_graph.nodes_between([scores], leaves)
    autograd_graph.refuse_reentrant(between)
    if any(node.name() == autograd_graph.COMPILED for node in between):
        # A compiled part is one node. Run eagerly, it shows its own.
        with torch.compiler.set_stance("force_eager"):
            between = autograd_graph.nodes_between([call.again(state).scores(leaves)], leaves)
    dtypes = autograd_graph.dtypes(between) | {scores.dtype} | {x.dtype for x in leaves}
    return Smoothness(autograd_graph.kink(between), max(SPACING[dtype] for dtype in dtypes if dtype in SPACING))
