"""method="compiled": the penalty of one critic and its gradient, compiled as one graph that is kept. Exact."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, EmbeddingBag
from torch.utils._pytree import tree_map_only

from .. import reference
from ..critics import autograd_graph
from ..critics.critic import Critic
from ..critics.data_parallel import refuse_inside_graph
from ..form import accumulation_type
from .critic_call import CriticCall, PenaltyResult, independent_scores_error, refuse_higher_order
from .double_backward import checked_input_gradients
from .input_gradients import cotangent
from .traced import penalty_by_torch_func


class CompiledPenalty:
    """One penalty at samples of one shape: a static graph for the first batch size, a dynamic one for all others."""

    def __init__(self, batch: int, scaled: bool) -> None:
        from .partition import GradientInForward  # a part of the compiler, which is imported when it is used

        self.batch = batch
        options: dict[str, Any] = {"custom_partitioner_fn": GradientInForward(scaled)}
        self.fixed = torch.compile(_with_own_code(_penalty_and_norms), fullgraph=True, dynamic=False, options=options)
        self.variable = torch.compile(_with_own_code(_penalty_and_norms), fullgraph=True, options=options)


@torch.utils.hooks.unserializable_hook
def _refuse_create_graph(_: Tensor) -> None:
    """A hook on the penalty."""
    refuse_higher_order("method='compiled'")


_INSTEAD = "Use method='double_backward', or, where the critic is smooth, method='directional'."


def compute_penalty(call: CriticCall, points: Sequence[Tensor], critic: Critic) -> PenaltyResult:
    """Exact, and differentiable once."""
    profile = critic.profile
    refuse_inside_graph(profile.sharded or bool(profile.replicas()))
    form, batch, scale = call.form, points[0].shape[0], call.grad_scale
    # Weight and grad_scale may change from step to step: they are applied outside, or are tensor inputs.
    plain = form._replace(rows=1, scale=1.0, kappa=None)
    group = batch // form.rows
    key = (plain, group, scale is None, call.structure, tuple((x.shape[1:], x.dtype) for x in points))
    compiled = profile.compiled.get(key)
    if compiled is None:
        with _hooks_refused():
            _check(call, points, critic)
        compiled = profile.compiled[key] = CompiledPenalty(batch, scale is not None)
    args, kwargs = call.args, call.kwargs
    if batch == compiled.batch:
        run = compiled.fixed
    else:
        run = compiled.variable
        points, args, kwargs = tree_map_only(Tensor, lambda t: _of_any_batch(t, batch), (list(points), args, kwargs))
    if scale is not None and not isinstance(scale, Tensor):  # exact in bf16; filled on the device, without a copy
        scale = torch.full((), scale, dtype=torch.bfloat16, device=points[0].device)
    # The gradient is taken inside, where small ones would vanish in fp16: so it is that of the scaled penalty. The
    # factor has one dimension: without any, torch takes it for a Python number, and compiles twice.
    dtype = accumulation_type(*[x.dtype for x in points])
    upstream = None if scale is None else form.scale * scale.to(dtype).reshape(1)
    try:
        with _hooks_refused(), _everything_kept(), _parameters_checked():
            plain_call = call._replace(
                critic=critic.function, args=args, kwargs=kwargs, grad_scale=scale, form=plain, ops=reference
            )
            penalty, norms = run(plain_call, points, upstream, group)
    except torch._dynamo.exc.TorchDynamoException as error:
        if "would mutate a captured Tensor" in str(error):  # in another place of the text in each version
            raise ValueError(
                "method='compiled' needs a critic that changes no buffer on the way from points to scores, as batch "
                f"normalisation does in training mode, got one that does. {_INSTEAD}"
            ) from error
        words = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        sizes = "" if run is compiled.fixed else f", for other batch sizes than the first, {compiled.batch}, as well"
        raise ValueError(
            f"method='compiled' needs a critic that torch.compile can compile whole{sizes}, and it says: {words} "
            f"{_INSTEAD}"
        ) from error
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise ValueError(
            f"method='compiled' needs a critic that does not change, got one that was compiled "
            f"{torch._dynamo.config.recompile_limit} times and has changed again: numbers that change from call to "
            "call belong in tensors, such as buffers"
        ) from error
    penalty = penalty * (form.scale if form.kappa is None else form.kappa)
    if penalty.requires_grad:  # the graph has the gradient as numbers, whose own derivative would silently be lost
        penalty.register_hook(_refuse_create_graph)
    return PenaltyResult(penalty, norms)


def _penalty_and_norms(call: CriticCall, points: list[Tensor], upstream: Any, group: int) -> tuple[Tensor, Tensor]:
    """What is compiled."""
    scale: Any = call.grad_scale
    kappa = None if scale is None else 1 / scale.to(accumulation_type(*[x.dtype for x in points]))
    form = call.form._replace(rows=len(points[0]) // group, kappa=kappa)
    penalty, norms, _ = penalty_by_torch_func(call._replace(form=form), points)
    return penalty if upstream is None else penalty * upstream.squeeze(), norms


def _with_own_code(function: Any) -> FunctionType:
    """The same function with a code object of its own: torch.compile allows each code only a few graphs."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _of_any_batch(tensor: Tensor, batch: int) -> Tensor:
    """The tensor, or where the batch is in front a view of it that is marked for the compiler as of any size."""
    if tensor.ndim == 0 or tensor.shape[0] != batch:
        return tensor
    tensor = tensor.view_as(tensor)
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


def _check(call: CriticCall, points: Sequence[Tensor], critic: Critic) -> None:
    """Eagerly, before compiling: a compiled function cannot tell a zero gradient from none, and the compiler's own
    errors are pages long."""
    for part in critic.profile.modules():
        if isinstance(part, (Embedding, EmbeddingBag)) and part.sparse and part.weight.requires_grad:
            raise ValueError(
                "method='compiled' needs dense gradients, got a critic with "
                f"{type(part).__name__}(sparse=True). {_INSTEAD}"
            )
    leaves = [x.detach().requires_grad_() for x in points]
    # Parts that are compiled already are traced again with the rest, so they are run eagerly here.
    with critic.state(points[0].device) as state, torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        scores = call.again(state).scores(leaves)
        between = autograd_graph.nodes_between([scores], leaves)
        if not between:
            raise independent_scores_error()
        if any(node.name() == autograd_graph.REENTRANT for node in between):
            raise _hooked()
        try:
            checked_input_gradients((scores,), (cotangent(scores, None),), leaves)
        except autograd_graph.NotTwiceDifferentiable as error:
            raise ValueError(
                f"method='compiled' must differentiate the critic twice, and found {error.culprit}. Use {error.remedy}."
            ) from None


def _everything_kept() -> Any:
    """For graphs that the compiler splits itself: with a smaller memory budget it draws dropout masks anew, and reads
    the vectors of spectral norm after their update, and the gradients are silently wrong."""
    config = torch._functorch.config
    return nullcontext() if config.activation_memory_budget == 1 else config.patch(activation_memory_budget=1.0)


_CHECKS_PARAMETERS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def _parameters_checked() -> Any:
    """Before 2.12 torch uses a graph again as long as the modules hold the same parameters, also where these have been
    frozen or thawed since: the thawed ones would silently be left without a gradient."""
    if _CHECKS_PARAMETERS:
        return nullcontext()
    return torch._dynamo.config.patch(skip_tensor_guards_with_matching_dict_tags=False)


_HOOKED = "method='compiled' refuses hooks on saved tensors"


@contextmanager
def _hooks_refused() -> Iterator[None]:
    """torch.func does not support them. Where it meets them in tracing, torch leaves all hooks disabled afterwards."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKED):
            yield
    except RuntimeError as error:
        if str(error) != _HOOKED:
            raise
        raise _hooked() from None


def _hooked() -> ValueError:
    return ValueError(
        "method='compiled' cannot trace activation checkpointing, save_on_cpu and other hooks on saved tensors: "
        "leave them out, since the compiler itself decides what to keep, or use method='double_backward', or, where "
        "the critic is smooth, method='directional'"
    )
