"""The one warning: batch normalisation in training mode, where the samples of a batch see one another."""

import contextlib
import functools
import sys
import warnings
from types import FunctionType, MethodType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

# For each module, the batch normalisations in it that may still have to be warned of. Found once: walking through a
# critic's modules at every call would cost more than a small penalty. Weak, so that a critic lives no longer for it.
_suspects: WeakKeyDictionary[Module, list[tuple[str, ReferenceType[_BatchNorm]]]] = WeakKeyDictionary()


def warn_of_batch_norm(critic: Any) -> None:
    """Once per critic. Later calls cost a look-up."""
    for path, module in (("", critic),) if isinstance(critic, Module) else _modules_behind(critic):
        suspects = _suspects.get(module)
        if suspects is None:
            norms = [(name, part) for name, part in module.named_modules() if isinstance(part, _BatchNorm)]
            suspects = _suspects[module] = [(name, ref(part)) for name, part in norms]
        if suspects:
            _warn_if_training(path, module, suspects)


def _warn_if_training(path: str, module: Module, suspects: list[tuple[str, ReferenceType[_BatchNorm]]]) -> None:
    training = [".".join(filter(None, (path, name))) for name, suspect in suspects if _sees_the_batch(suspect())]
    if not training:  # in evaluation mode, from which it may come back
        return
    _suspects[module] = []
    names = ", ".join(name or type(module).__name__ for name in training)
    warnings.warn(
        f"critic has batch normalisation in training mode ({names}): its samples see one another, so their gradient "
        "norms are not those of single samples. Use LayerNorm, GroupNorm or none, as the WGAN-GP paper does.",
        stacklevel=_frames_to_the_caller(),
    )


def _modules_behind(critic: Any) -> list[tuple[str, Module]]:
    """The modules that a partial, a function, a method or a callable object calls, with their paths in their owner.

    Of an owner, such as a trainer that has the generator too, those parts alone that the code names.
    """
    while isinstance(critic, functools.partial):
        critic = critic.func
    if not isinstance(critic, (FunctionType, MethodType)):
        critic = getattr(critic, "__call__", None)  # noqa: B004  # the bound method of a callable object
    owners = []
    if isinstance(critic, MethodType):
        owners.append(critic.__self__)
        critic = critic.__func__
    if not isinstance(critic, FunctionType):
        return []
    names, known = critic.__code__.co_names, critic.__globals__
    owners += [known[name] for name in names if name in known]
    for cell in critic.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that has no value yet
            owners.append(cell.cell_contents)
    found: list[tuple[str, Module]] = []
    for owner in owners:
        parts = owner._modules if isinstance(owner, Module) else getattr(owner, "__dict__", {})
        named = [(name, part) for name, part in ((name, parts.get(name)) for name in names) if isinstance(part, Module)]
        found += named or ([("", owner)] if isinstance(owner, Module) else [])
    return found


def _sees_the_batch(module: _BatchNorm | None) -> bool:
    return module is not None and (module.training or not module.track_running_stats)


def _frames_to_the_caller() -> int:
    """How far up the first frame lies that is neither ours nor torch's, so that the warning points there."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fused_gp", "torch"):
        level, frame = level + 1, frame.f_back
    return level
