"""The one warning: batch normalisation in training mode, where the samples of a batch see one another."""

import functools
import inspect
import sys
import warnings
from types import FunctionType, MethodType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

# For each critic, the batch normalisations that may still have to be warned of. Found once: walking through a critic's
# modules at every call would cost more than a small penalty. Weak, so that a critic lives no longer for it.
_suspects: WeakKeyDictionary[Any, list[tuple[str, ReferenceType[_BatchNorm]]]] = WeakKeyDictionary()


def warn_of_batch_norm(critic: Any) -> None:
    """Once per critic. Later calls cost a look-up."""
    while isinstance(critic, functools.partial):
        critic = critic.func
    if isinstance(critic, MethodType):
        critic = critic.__self__
    if isinstance(critic, Module):
        key: Any = critic
    elif isinstance(critic, FunctionType):
        key = critic.__code__  # a lambda is made anew for each step; its code is not
    else:
        return
    suspects = _suspects.get(key)
    if suspects is None:
        suspects = _suspects[key] = [
            (name or type(module).__name__, ref(module))
            for part in _modules_of(critic)
            for name, module in part.named_modules()
            if isinstance(module, _BatchNorm)
        ]
    if not suspects:
        return
    training = [name for name, module in suspects if _sees_the_batch(module())]
    if not training:  # in evaluation mode, from which it may come back
        return
    _suspects[key] = []
    warnings.warn(
        f"critic has batch normalisation in training mode ({', '.join(training)}): its samples see one another, "
        "so their gradient norms are not those of single samples. Use LayerNorm, GroupNorm or none, as the "
        "WGAN-GP paper does.",
        stacklevel=_frames_to_the_caller(),
    )


def _modules_of(critic: Any) -> list[Module]:
    """The critic, or what a function has in its closure and names among its globals."""
    if isinstance(critic, Module):
        return [critic]
    try:
        named = inspect.getclosurevars(critic)
    except ValueError:  # it names what has no value yet
        return []
    return [thing for thing in (*named.nonlocals.values(), *named.globals.values()) if isinstance(thing, Module)]


def _sees_the_batch(module: _BatchNorm | None) -> bool:
    return module is not None and (module.training or not module.track_running_stats)


def _frames_to_the_caller() -> int:
    """How far up the first frame lies that is neither ours nor torch's, so that the warning points there."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fused_gp", "torch"):
        level, frame = level + 1, frame.f_back
    return level
