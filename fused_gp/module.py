"""A penalty with its options as an nn.Module, computed at every step or lazily at every k-th."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from . import arguments
from .penalties import fused_gradient_penalty


class GradientPenalty(torch.nn.Module):
    r"""A gradient penalty with its options, for training loops that build their losses as modules.

    ::

        gradient_penalty = GradientPenalty(weight=10)                                  # WGAN-GP
        gradient_penalty = GradientPenalty(r1_penalty, weight=gamma, every=16)         # StyleGAN2, lazy

        loss = fake_score.mean() - real_score.mean() + gradient_penalty(critic, real, fake)

    Lazily (``every=k``), the first call of k computes the penalty, multiplied by k so that its gradient is on average
    that of every step (``compensate=False`` leaves the factor out); the other calls run no critic and return a zero
    whose backward reaches nothing. Calls are counted in training mode only, and the count is part of ``state_dict()``.
    In evaluation mode every call computes the penalty, without the factor. A compiled training step cannot count: call
    this outside of it, with a penalty that is compiled, ``torch.compile(r1_penalty)``.

    For an optimizer with running averages StyleGAN2 also adjusts the learning rate, times c, and the betas, to the
    power of c, with c = k / (k + 1).

    Args:
        penalty: the function to call: `fused_gradient_penalty`, `dragan_penalty`, `r1_penalty`, `r2_penalty`,
            `input_gradient_penalty`, or a function of your own like these.
        every: k, the number of calls for each penalty.
        compensate: multiply by k.
        options: keyword arguments of the penalty.

    `forward` takes what the penalty takes (critic, real, fake), and further options for that call. It returns what the
    penalty returns; a skipped call returns a scalar zero in fp32, and None for norms and error, if asked for.

    Raises:
        TypeError: penalty is not callable or does not know an option, every is not an int, compensate not a bool.
        ValueError: every is less than 1.

    Lazy regularisation is from Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020.
    """

    def __init__(
        self,
        penalty: Callable[..., Any] = fused_gradient_penalty,
        *,
        every: int = 1,
        compensate: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if not callable(penalty):
            raise TypeError(f"penalty must be callable, got {type(penalty).__name__}")
        parameters = inspect.signature(penalty).parameters.values()
        known = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
        unknown = [name for name in options if name not in known]
        if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
            raise TypeError(f"options must be of {_name(penalty)}: {', '.join(known)}; got {', '.join(unknown)}")
        self.penalty = penalty
        self.every = arguments.positive_int("every", every)
        arguments.flag("compensate", compensate)
        self.compensate = compensate
        self.options = options
        self.calls = 0  # in training mode; a Python number, so that skipping does not synchronise with the device

    def forward(self, *inputs: Any, **options: Any) -> Any:
        options = self.options | options
        if not self.training or self.every == 1:
            return self.penalty(*inputs, **options)
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(
                f"GradientPenalty(every={self.every}) counts its calls, for each of which torch.compile would compile "
                "anew: call it outside the compiled function, and compile the penalty in it, "
                f"GradientPenalty(torch.compile({_name(self.penalty)}), every={self.every})"
            )
        if self.calls % self.every:
            self.calls += 1
            return self._skipped(inputs, options)
        result = self.penalty(*inputs, **options)
        self.calls += 1  # here, so that a call that raised does not count
        if not self.compensate:
            return result
        if isinstance(result, tuple):
            return (result[0] * self.every, *result[1:])
        return result * self.every

    def _skipped(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Zero on the device of the samples, which can be added to a loss, or be the loss."""
        device = next((t.device for t in tree_leaves((inputs, options)) if isinstance(t, torch.Tensor)), None)
        zero = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        others = [None for name in ("return_norms", "return_error") if options.get(name)]
        return (zero, *others) if others else zero

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{_name(self.penalty)}, every={self.every}, compensate={self.compensate}{options}"


def _name(penalty: Callable[..., Any]) -> str:
    return getattr(penalty, "__name__", type(penalty).__name__)
