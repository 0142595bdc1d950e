"""Argument validation. Every error names the argument, what was given and what was expected."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from .form import METHODS, Method, PenaltyForm, accumulation_type

# A batch is a tensor, or a tuple, list or dict of tensors. Here it is the list of its tensors and their structure: None
# for a tensor by itself, the type for a tuple or list of tensors alone, a TreeSpec for everything else.
Structure = TreeSpec | type | None

R = TypeVar("R")
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def samples(name: str, value: Any) -> tuple[list[Tensor], Structure]:
    """A tensor with the batch in front, or tensors of one batch size on one device in a tuple, list or dict."""
    if isinstance(value, Tensor):
        if not _is_valid(value):
            raise _invalid(name, value)
        return [value], None
    leaves, structure = _flattened(value)
    if len(leaves) == 1 and leaves[0] is value:
        raise TypeError(f"{name} must be a torch.Tensor, or a tuple, list or dict of them, got {type(value).__name__}")
    if not leaves:
        raise ValueError(f"{name} must hold at least one tensor, got an empty {type(value).__name__}")
    for index, tensor in enumerate(leaves):
        if not _is_valid(tensor):
            raise _invalid(leaf_name(name, value, index), tensor)
        if tensor.shape[0] != leaves[0].shape[0] or tensor.device != leaves[0].device:
            raise ValueError(
                f"{name} must hold tensors of one batch size on one device, got {_shape(leaves[0])} on "
                f"{leaves[0].device} and, as {leaf_name(name, value, index)}, {_shape(tensor)} on {tensor.device}"
            )
    return leaves, structure


def real_and_fake(real: Any, fake: Any) -> tuple[list[Tensor], list[Tensor], Structure]:
    """Two batches of samples of one structure, shape, dtype and device: nothing is broadcast, promoted or moved."""
    if _is_valid(real) and isinstance(fake, Tensor) and _are_alike(real, fake):  # the usual case
        return [real], [fake], None
    reals, structure = samples("real", real)
    fakes, fake_structure = samples("fake", fake)
    if structure is not None or fake_structure is not None:
        fakes = matching_leaves(reals, structure, "real", real, "fake", fake)
    for index, (x, y) in enumerate(zip(reals, fakes, strict=True)):
        if _are_alike(x, y):
            continue
        names = " and ".join(leaf_name(name, real, index) for name in ("real", "fake"))
        if x.shape != y.shape:
            raise ValueError(f"{names} must have one shape, got {_shape(x)} and {_shape(y)}")
        if x.dtype != y.dtype:
            raise TypeError(
                f"{names} must have one dtype, got {x.dtype} and {y.dtype}: convert one, fake.to(real.dtype)"
            )
        raise ValueError(f"{names} must be on one device, got {x.device} and {y.device}")
    return reals, fakes, structure


def matching_leaves(
    model: list[Tensor], structure: Structure, model_name: str, model_value: Any, name: str, value: Any
) -> list[Any]:
    """The parts of `value`, one for each tensor of `model`, dicts matched by their keys."""
    parts = [value]
    fits = True
    if isinstance(structure, type):
        parts = list(value) if isinstance(value, (tuple, list)) and type(value) is structure else []
        fits = len(parts) == len(model)
    elif structure is not None:
        try:
            parts = structure.flatten_up_to(value)
        except (ValueError, TypeError):
            fits = False
    if not fits or not all(isinstance(part, (Tensor, Real)) for part in parts):
        raise ValueError(
            f"{model_name} and {name} must have one structure, got {_structure(model_value)} and {_structure(value)}"
        )
    return parts


def rebuild(tensors: list[Tensor], structure: Structure) -> Any:
    """The caller's structure, with these tensors in it."""
    if structure is None:
        return tensors[0]
    return structure(tensors) if isinstance(structure, type) else tree_unflatten(tensors, structure)


def _flattened(value: Any) -> tuple[list[Any], Structure]:
    if type(value) in (tuple, list) and value and all([isinstance(part, Tensor) for part in value]):
        return list(value), type(value)
    return tree_flatten(value)


def positive_int(name: str, value: Any) -> int:
    """An integer from 1 on."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def alpha(value: Any, rows: int, reals: Sequence[Tensor]) -> Tensor:
    """alpha as a column, (rows, 1), in the accumulation type of all of real."""
    dtype, device = accumulation_type(*[x.dtype for x in reals]), reals[0].device
    if not isinstance(value, Tensor):
        fraction = number("alpha", value)
        if not 0 <= fraction <= 1:
            raise ValueError(
                f"alpha, the position between real (0) and fake (1), must be in [0, 1], got {value!r}; "
                "the coefficient of the penalty is `weight`"
            )
        return torch.full((rows, 1), fraction, dtype=dtype, device=device)
    if value.dtype not in FLOATING:
        raise TypeError(f"alpha must be a floating tensor, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"alpha must be on the device of real, {device}, got {value.device}")
    if value.ndim and (value.shape[0] != rows or value.numel() != rows):
        raise ValueError(
            f"alpha must be one number per sample or group, of shape ({rows},) or ({rows}, 1, ..., 1), or one number "
            f"for all, got {_shape(value)}"
        )
    column = value if value.ndim == 2 else value.reshape(rows, 1) if value.ndim else value.expand(rows, 1)
    if column.dtype != dtype or not column.is_contiguous():  # the check is cheaper than a conversion that does nothing
        column = column.to(dtype).contiguous()
    return column.resolve_neg()


def generator(value: Any, device: torch.device) -> None:
    """A generator that can draw on this device."""
    if torch.compiler.is_dynamo_compiling():
        raise ValueError("generator cannot be traced by torch.compile: draw alpha from it outside, and give alpha")
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(value).__name__}")
    if value.device.type != device.type:
        raise ValueError(f"generator must be on the device of real, {device}, got {value.device}")


def critic(value: Any, args: Any, kwargs: Any) -> None:
    """A callable, and its further arguments."""
    if not callable(value):
        raise TypeError(f"critic must be callable, got {type(value).__name__}")
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"critic_args must be a tuple or list of arguments, got {type(args).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"critic_kwargs must be a dict of arguments, got {type(kwargs).__name__}")


def scores(value: Any, rows: int) -> None:
    """One floating tensor with at least one score per sample, or per group of them."""
    if not isinstance(value, Tensor):
        container = f"a {type(value).__name__}"
        if isinstance(value, Mapping):
            example = f'{container} with {list(value)}: wrap it to pick one, lambda x: critic(x)["scores"]'
        elif isinstance(value, Sequence):
            example = f"{container} of {len(value)}: wrap it to pick one, lambda x: critic(x)[0]"
        else:
            example = type(value).__name__
        raise TypeError(f"critic must return one tensor of scores, got {example}")
    if not value.is_floating_point():
        raise TypeError(f"critic must return floating scores, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"critic must return a dense tensor of scores, got layout {value.layout}")
    if value.numel() < rows:
        raise ValueError(
            f"critic must return at least one score per sample or group, got {_shape(value)} for {rows} of them: "
            "a mean over the batch would shrink every gradient"
        )


def outputs(value: Any) -> tuple[list[Tensor], Structure]:
    """What a critic returned: floating tensors of any shapes."""
    leaves, structure = ([value], None) if isinstance(value, Tensor) else _flattened(value)
    for index, output in enumerate(leaves):
        if not isinstance(output, Tensor):
            raise TypeError(f"{leaf_name('outputs', value, index)} must be a torch.Tensor, got {type(output).__name__}")
        if not output.is_floating_point():
            raise TypeError(f"{leaf_name('outputs', value, index)} must be a floating tensor, got {output.dtype}")
    if not leaves:
        raise ValueError(f"outputs must hold at least one tensor, got an empty {type(value).__name__}")
    return leaves, structure


def output_weights(value: Any, outputs: Any, tensors: list[Tensor], structure: Structure) -> list[Any]:
    """One weight per output: a number, or a tensor of the output's shape."""
    factors = matching_leaves(tensors, structure, "outputs", outputs, "output_weights", value)
    for index, (factor, output) in enumerate(zip(factors, tensors, strict=True)):
        if not isinstance(factor, Tensor):
            factors[index] = number("output_weights", factor)
        elif factor.shape not in (output.shape, ()) or factor.device != output.device or factor.dtype not in FLOATING:
            raise ValueError(
                f"{leaf_name('output_weights', outputs, index)} must be a number or a floating tensor of the output's "
                f"{_shape(output)} on {output.device}, got {_shape(factor)} of {factor.dtype} on {factor.device}"
            )
    return factors


def _remembered(validate: Callable[..., R]) -> Callable[..., R]:
    """Training passes the same options at every step, and validating them again costs as much as three operations on a
    GPU. Typed, because 1 is not a flag but equals True."""
    remembered = lru_cache(maxsize=256, typed=True)(validate)

    def validated(*options: Any, **more: Any) -> R:
        if torch.compiler.is_dynamo_compiling():
            return validate(*options, **more)
        try:
            return remembered(*options, **more)
        except TypeError:  # an option of a wrong type, or one that cannot be hashed
            return validate(*options, **more)

    return validated


@_remembered
def penalty_form(
    batch: int,
    target: Any,
    one_sided: Any,
    eps: Any,
    weight: Any,
    reduction: Any,
    return_norms: Any,
    group_size: Any = 1,
    squared: Any = False,
) -> PenaltyForm:
    """The penalty that these options mean for a batch of this size, with nothing scaled."""
    target = number("target", target, minimum=0)
    eps = number("eps", eps, minimum=0)
    weight = number("weight", weight)
    flag("one_sided", one_sided)
    flag("squared", squared)
    flag("return_norms", return_norms)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    group_size = positive_int("group_size", group_size)
    if batch % group_size:
        raise ValueError(f"group_size must divide the batch, got {group_size} for {batch} samples")
    rows = batch // group_size
    squared = squared or target == 0  # with t = 0 the two forms with a root are the squared one, which has none
    scale = weight / rows if reduction == "mean" else weight
    return PenaltyForm(rows, target, one_sided, squared, eps, None, scale, reduction != "none")


@_remembered
def method(name: Any, step: Any, chunk_size: Any, allow_kinks: Any, return_error: Any) -> Method:
    """How the penalty's gradient is to be computed."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {name!r}")
    if step is not None:
        if name not in ("directional", "auto"):
            raise ValueError(f"step is an option of method='directional', got method={name!r}")
        step = number("step", step, above=0)
    if chunk_size is not None:
        chunk_size = positive_int("chunk_size", chunk_size)
    flag("allow_kinks", allow_kinks)
    flag("return_error", return_error)
    return Method(name, step, chunk_size, allow_kinks)


def score_scale(form: PenaltyForm, value: Any, tensors: Sequence[Tensor]) -> tuple[PenaltyForm, float | Tensor]:
    """The form with the factor on the scores, and the factor itself, rounded to 8 bits.

    Every floating type then holds it exactly, so that it is divided out just as it was multiplied in.
    """
    scale = _grad_scale(value, tensors[0].device)
    if isinstance(scale, Tensor):
        scale = scale.to(torch.bfloat16)
    else:
        scale = torch.tensor(scale, dtype=torch.bfloat16, device="cpu").item()
        if not 0 < scale < math.inf:
            raise ValueError(f"grad_scale must be a number that bf16 can hold, got {value!r}")
    return _unscaled(form, scale, tensors), scale


def gradient_scale(form: PenaltyForm, value: Any, tensors: Sequence[Tensor]) -> PenaltyForm:
    """The form with the factor that these gradients already have."""
    return _unscaled(form, _grad_scale(value, tensors[0].device), tensors)


def _grad_scale(value: Any, device: torch.device) -> float | Tensor:
    """The factor on the scores: a number, or a tensor of no dimensions, which is not read from the device."""
    if isinstance(value, torch.amp.GradScaler):
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(
                "grad_scale must be a number or a tensor under torch.compile, which cannot trace a GradScaler: give "
                "what scaler.scale(torch.ones(())) is, called outside"
            )
        return value.scale(torch.ones((), device=device))  # its public interface, without a synchronisation
    if not isinstance(value, Tensor):
        if isinstance(value, Real):
            return number("grad_scale", value, above=0)
        raise TypeError(f"grad_scale must be a number, a tensor or a GradScaler, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"grad_scale must be a floating tensor, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"grad_scale must have one element, got {_shape(value)}")
    if value.device != device:
        raise ValueError(f"grad_scale must be on the device of the samples, {device}, got {value.device}")
    return value.detach().reshape(())


def _unscaled(form: PenaltyForm, scale: float | Tensor, tensors: Sequence[Tensor]) -> PenaltyForm:
    if isinstance(scale, Tensor):  # inverted in the accumulation type: in fp16 the inverse of a large one is zero
        scale = scale.to(accumulation_type(scale.dtype, *[x.dtype for x in tensors]))
    return form._replace(kappa=1 / scale)


def number(name: str, value: Any, minimum: float = -math.inf, above: float = -math.inf) -> float:
    """A finite real number of Python or NumPy."""
    if type(value) is float and minimum <= value < math.inf and value > above:
        return value  # the usual case
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
    """True or False itself, nothing that is only truthy."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def leaf_name(name: str, value: Any, index: int) -> str:
    """How the caller would write that tensor: real, real[0], real['image']."""
    return name + keystr(tree_flatten_with_path(value)[0][index][0])


def _is_valid(value: Any) -> bool:
    """A non-empty, dense, floating tensor with the batch in front."""
    return (
        isinstance(value, Tensor)
        and value.dtype in FLOATING
        and value.layout == torch.strided
        and not value.is_nested
        and value.ndim > 0
        and value.numel() > 0
    )


def _invalid(name: str, value: Any) -> Exception:
    """The error for a tensor that is not valid."""
    if not isinstance(value, Tensor):
        return TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        return TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {value.dtype}: convert it with .float()")
    if value.layout != torch.strided or value.is_nested:
        return TypeError(
            f"{name} must be a dense tensor, got {'a nested one' if value.is_nested else f'layout {value.layout}'}"
        )
    if value.ndim == 0:
        return ValueError(f"{name} must have the batch as its first dimension, got a tensor of shape ()")
    return ValueError(f"{name} must hold at least one sample of at least one element, got {_shape(value)}")


def _are_alike(valid: Tensor, other: Tensor) -> bool:
    """If so, the other is valid as well."""
    return (
        not other.is_nested
        and other.layout == torch.strided
        and valid.shape == other.shape
        and valid.dtype == other.dtype
        and valid.device == other.device
    )


def _structure(value: Any) -> str:
    """(Tensor, [Tensor, Tensor]), with quotes."""
    return str(tree_map(lambda leaf: type(leaf).__name__, value))


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
