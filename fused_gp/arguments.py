"""What a caller may hand in. Every check names the argument, what came and what was wanted."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .form import PenaltyForm, accumulation_type

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def samples(name: str, value: Any) -> None:
    """A non-empty, dense, floating tensor with the batch in front."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {value.dtype}: convert it with .float()")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got {'a nested one' if value.is_nested else f'layout {value.layout}'}"
        )
    if value.ndim == 0:
        raise ValueError(f"{name} must have the batch as its first dimension, got a tensor of shape ()")
    if value.numel() == 0:
        raise ValueError(f"{name} must hold at least one sample of at least one element, got {_shape(value)}")


def pair(real: Any, fake: Any) -> None:
    """Two batches of samples of one shape, dtype and device: nothing is broadcast, promoted or moved."""
    samples("real", real)
    samples("fake", fake)
    if fake.shape == real.shape and fake.dtype == real.dtype and fake.device == real.device:
        return
    if fake.shape != real.shape:
        raise ValueError(f"real and fake must have one shape, got {_shape(real)} and {_shape(fake)}")
    if fake.dtype != real.dtype:
        raise TypeError(
            f"real and fake must have one dtype, got {real.dtype} and {fake.dtype}: convert one, fake.to(real.dtype)"
        )
    raise ValueError(f"real and fake must be on one device, got {real.device} and {fake.device}")


def alpha(value: Any, real: Tensor) -> Tensor:
    """alpha as a column, (B, 1), in the accumulation type of `real`."""
    batch = real.shape[0]
    dtype = accumulation_type(real.dtype)
    if not isinstance(value, Tensor):
        weight = number("alpha", value)
        if not 0 <= weight <= 1:
            raise ValueError(
                f"alpha, the place between real (0) and fake (1), must be in [0, 1], got {value!r}; "
                "the coefficient of the penalty is `weight`"
            )
        return torch.full((batch, 1), weight, dtype=dtype, device=real.device)
    if value.dtype not in FLOATING:
        raise TypeError(f"alpha must be a floating tensor, got {value.dtype}")
    if value.device != real.device:
        raise ValueError(f"alpha must be on the device of real, {real.device}, got {value.device}")
    dims = value.ndim
    if dims and (value.shape[0] != batch or value.numel() != batch or (dims != 1 and dims != real.ndim)):
        raise ValueError(
            f"alpha must be one number per sample, of shape ({batch},) or ({batch}, 1, ..., 1), or one number for all, "
            f"got {_shape(value)} for real of {_shape(real)}"
        )
    if dims != 2:
        value = value.reshape(batch, 1) if dims else value.expand(batch, 1)
    return (value if value.dtype == dtype else value.to(dtype)).contiguous().resolve_neg()


def generator(value: Any, device: torch.device) -> None:
    """A generator that can draw on this device, or None."""
    if value is None:
        return
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(value).__name__}")
    if value.device.type != device.type:
        raise ValueError(f"generator must be on the device of real, {device}, got {value.device}")


def critic(value: Any, args: Any, kwargs: Any) -> None:
    """A callable, and what else it is called with."""
    if not callable(value):
        raise TypeError(f"critic must be callable, got {type(value).__name__}")
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"critic_args must be a tuple or list of arguments, got {type(args).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"critic_kwargs must be a dict of arguments, got {type(kwargs).__name__}")


def scores(value: Any, x_hat: Tensor) -> None:
    """One floating tensor with at least one score per sample."""
    if isinstance(value, (tuple, list)):
        raise TypeError(
            f"critic must return one tensor of scores, got a {type(value).__name__} of {len(value)}: "
            "wrap it to pick one, lambda x: critic(x)[0]"
        )
    if isinstance(value, Mapping):
        raise TypeError(
            f"critic must return one tensor of scores, got a {type(value).__name__} with {list(value)}: "
            'wrap it to pick one, lambda x: critic(x)["scores"]'
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"critic must return one tensor of scores, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"critic must return floating scores, got {value.dtype}")
    if value.numel() < x_hat.shape[0]:
        raise ValueError(
            f"critic must return at least one score per sample, got {_shape(value)} for {x_hat.shape[0]} samples: "
            "a mean over the batch would shrink every gradient"
        )


def form(
    target: Any,
    one_sided: Any,
    eps: Any,
    weight: Any,
    reduction: Any,
    *,
    rows: int,
    squared: Any = False,
    grad_scale: Any = None,
) -> PenaltyForm:
    """The penalty these options mean, for this many rows."""
    target = number("target", target, minimum=0)
    eps = number("eps", eps, minimum=0)
    weight = number("weight", weight)
    flag("one_sided", one_sided)
    flag("squared", squared)
    kappa = 1.0
    if grad_scale is not None:
        kappa = 1 / number("grad_scale", grad_scale, above=0)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    # With t = 0 both sided forms are the squared one: no root, so nothing to guard.
    return PenaltyForm(
        target=target,
        one_sided=one_sided,
        squared=squared or target == 0,
        eps=eps,
        kappa=kappa,
        scale=weight / rows if reduction == "mean" else weight,
        reduce=reduction != "none",
    )


def number(name: str, value: Any, minimum: float = -math.inf, above: float = -math.inf) -> float:
    """A finite real number, Python's or numpy's."""
    if type(value) is float and minimum <= value < math.inf and value > above:
        return value  # the usual case, cheaply
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        converted = float(value)
    except OverflowError:  # an integer of more than 308 digits
        converted = math.inf
    if not math.isfinite(converted) or converted < minimum or converted <= above:
        bound = f" >= {minimum}" if minimum > -math.inf else f" > {above}" if above > -math.inf else ""
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return converted


def flag(name: str, value: Any) -> None:
    """True or False, nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
