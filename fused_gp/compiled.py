"""method="compiled": the penalty of one critic and its gradient, compiled whole and kept for the next call. Exact."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, EmbeddingBag
from torch.utils._pytree import tree_map_only

from . import functional, graph, reference
from .directional import refuse_higher_order
from .evaluations import Evaluations
from .findings import Findings
from .form import PenaltyForm, accumulation_type
from .input_gradient import cotangent, input_gradients
from .question import Answer, Question, unrelated


class Kept:
    """One penalty at samples of one shape. The batch size that came first has a graph of its own, at static speed, all
    others share one in which it is a variable."""

    def __init__(self, batch: int, scaled: bool) -> None:
        from .partition import AllInForward  # a part of the compiler, which is imported when it is used

        self.batch = batch
        options: dict[str, Any] = {"custom_partitioner_fn": AllInForward(scaled)}
        self.fixed = torch.compile(_fresh(_penalise), fullgraph=True, dynamic=False, options=options)
        self.variable = torch.compile(_fresh(_penalise), fullgraph=True, options=options)


@torch.utils.hooks.unserializable_hook
def _once(_: Tensor) -> None:
    """A hook on the penalty."""
    refuse_higher_order("method='compiled'")


_INSTEAD = "Use method='double_backward', or, where the critic is smooth, method='directional'."


def penalise(question: Question, points: Sequence[Tensor], findings: Findings) -> Answer:
    """Exact, and differentiable once."""
    refuse_hooks(bool(findings.sharded or findings.replicas))
    form, batch, scale = question.form, points[0].shape[0], question.grad_scale
    # Weight and grad_scale may change from step to step, and stay outside, or come in as a tensor.
    plain = form._replace(rows=1, scale=1.0, kappa=None)
    group = batch // form.rows
    key = (plain, group, scale is None, question.structure, tuple((x.shape[1:], x.dtype) for x in points))
    kept = findings.compiled.get(key)
    if kept is None:
        with _hooks_refused():
            _check(question, points, findings)
        kept = findings.compiled[key] = Kept(batch, scale is not None)
    args, kwargs = question.args, question.kwargs
    if batch == kept.batch:
        run = kept.fixed
    else:
        run = kept.variable
        points, args, kwargs = tree_map_only(Tensor, lambda t: _of_any_batch(t, batch), (list(points), args, kwargs))
    if scale is not None and not isinstance(scale, Tensor):  # in bf16 it is exact; filled in there, nobody waits for it
        scale = torch.full((), scale, dtype=torch.bfloat16, device=points[0].device)
    # The gradient is taken inside, and small ones would vanish in fp16: so it is that of the scaled penalty. In one
    # dimension, since of none torch takes it for a number of Python's, and compiles twice.
    dtype = accumulation_type(*[x.dtype for x in points])
    upstream = None if scale is None else form.scale * scale.to(dtype).reshape(1)
    try:
        with _hooks_refused(), _everything_kept():
            penalty, norms = run(
                question.critic, points, question.structure, args, kwargs, scale, upstream, plain, group
            )
    except torch._dynamo.exc.TorchDynamoException as error:
        if "would mutate a captured Tensor" in str(error):  # far down, and in another place in each version
            raise ValueError(
                "method='compiled' needs a critic that changes no buffer on the way from points to scores, as batch "
                f"normalisation does in training mode, got one that does. {_INSTEAD}"
            ) from error
        words = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        sizes = "" if run is kept.fixed else f", for batches of other sizes than the first, {kept.batch}, as well"
        raise ValueError(
            f"method='compiled' needs a critic that torch.compile can compile whole{sizes}, and it says: {words} "
            f"{_INSTEAD}"
        ) from error
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise ValueError(
            f"method='compiled' needs a critic that stays as it is, got one that was compiled "
            f"{torch._dynamo.config.recompile_limit} times and has changed again: numbers that change from call to "
            "call belong in tensors, such as buffers"
        ) from error
    penalty = penalty * (form.scale if form.kappa is None else form.kappa)
    if penalty.requires_grad:  # the graph knows the gradient as numbers, whose own derivative would be lost in silence
        penalty.register_hook(_once)
    return Answer(penalty, norms)


def refuse_hooks(distributed: bool) -> None:
    """Whoever compiles, we or the caller."""
    if distributed:
        raise ValueError(
            "method='compiled' cannot reach the hooks of DDP and FSDP from inside its graph, got such a critic: use "
            "method='directional', or 'double_backward' under DDP, and leave the call out of torch.compile"
        )


def _penalise(
    critic: Any,
    points: list[Tensor],
    structure: Any,
    args: Any,
    kwargs: Any,
    grad_scale: Tensor | None,
    upstream: Tensor | None,
    form: PenaltyForm,
    group: int,
) -> tuple[Tensor, Tensor]:
    form = form._replace(
        rows=len(points[0]) // group,
        kappa=None if grad_scale is None else 1 / grad_scale.to(accumulation_type(*[x.dtype for x in points])),
    )
    answer = functional.penalise(Question(critic, structure, args, kwargs, grad_scale, form, reference), points)
    return answer.penalty if upstream is None else answer.penalty * upstream.squeeze(), answer.norms


def _fresh(function: Any) -> FunctionType:
    """The same function with code of its own: torch.compile keeps what it compiled with the code, so that one critic's
    graphs do not count against another's."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _of_any_batch(tensor: Tensor, batch: int) -> Tensor:
    """The tensor, or where the batch is in front a view of it, on which the compiler finds that noted."""
    if tensor.ndim == 0 or tensor.shape[0] != batch:
        return tensor
    tensor = tensor.view_as(tensor)
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


def _check(question: Question, points: Sequence[Tensor], findings: Findings) -> None:
    """What the critic's own graph shows, before it is compiled: a compiled function cannot tell zero from nothing, and
    what stops its compiler is told by it in pages."""
    for part in (part for module in findings.alive() for part in module.modules()):
        if isinstance(part, (Embedding, EmbeddingBag)) and part.sparse and part.weight.requires_grad:
            raise ValueError(
                "method='compiled' needs dense gradients, got a critic with "
                f"{type(part).__name__}(sparse=True). {_INSTEAD}"
            )
    leaves = [x.detach().requires_grad_() for x in points]
    # Parts that are compiled already are traced again with the rest, so look at them as they were before.
    with (
        Evaluations(findings, points[0].device) as evaluations,
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        scores = evaluations.again(question).scores(leaves)
        between = graph.nodes_between([scores], leaves)
        if not between:
            raise unrelated()
        if any(node.name() == graph.REENTRANT for node in between):
            raise _hooked()
        found = graph.obstacle(between)
        if not found:
            gradients = input_gradients((scores,), (cotangent(scores, None),), leaves, True, True)
            found = graph.dead_end(gradients, leaves)
    if found:
        culprit, remedy = found
        raise ValueError(f"method='compiled' must differentiate the critic twice, and found {culprit}. Use {remedy}.")


def _everything_kept() -> Any:
    """While a graph is compiled, for those that the compiler splits itself. Told to keep less, it computes again what
    must not be: masks of dropout are drawn anew, and the vectors of spectral norm are read after their update.
    Gradients are then wrong, in silence."""
    config = torch._functorch.config
    return nullcontext() if config.activation_memory_budget == 1 else config.patch(activation_memory_budget=1.0)


_HOOKED = "method='compiled' refuses hooks on saved tensors"


@contextmanager
def _hooks_refused() -> Iterator[None]:
    """torch.func cannot see through them. If it meets them in tracing, torch leaves all hooks disabled ever after."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKED):
            yield
    except RuntimeError as error:
        if str(error) != _HOOKED:
            raise
        raise _hooked() from None


def _hooked() -> ValueError:
    return ValueError(
        "method='compiled' cannot see through activation checkpointing, save_on_cpu and other hooks on saved tensors: "
        "leave them out, since the compiler itself decides what to keep, or use method='double_backward', or, where "
        "the critic is smooth, method='directional'"
    )
