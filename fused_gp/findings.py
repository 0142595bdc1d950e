"""What has been found out about a critic, kept while it lives, so that looking once is enough."""

import contextlib
import functools
import sys
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary


class Findings:
    """About one critic. Nothing in here may hold the critic itself: it is to live no longer for being known."""

    def __init__(self, modules: list[tuple[str, Module]]) -> None:
        self.modules = [ref(module) for _, module in modules]
        parts = [(_joined(path, name), part) for path, module in modules for name, part in module.named_modules()]
        # The batch normalisations that may still have to be warned of.
        self.batch_norms = [(name, ref(part)) for name, part in parts if isinstance(part, _BatchNorm)]
        self.sharded = any(_is_sharded(part) for _, part in parts)
        self.replicas = [ref(part) for _, part in parts if isinstance(part, DistributedDataParallel)]
        self.chosen: str | None = None  # what "auto" chose
        self.twice = False  # its graph can be differentiated twice
        self.runs: dict[torch.dtype | None, Run] = {}  # what one run showed, by the type of autocast
        # Its samples do not see one another, and its parameters are all known: in training if True, or evaluation.
        self.separate: set[bool] = set()
        # Parameters that DDP waits for in vain, by the kind of penalty.
        self.unreached: dict[str, list[ReferenceType[torch.Tensor]]] = {}
        self.compiled: dict[Any, Any] = {}

    def alive(self) -> list[Module]:
        return [module for module in (found() for found in self.modules) if module is not None]


@dataclass
class Run:
    """What one run of the critic showed of how it computes."""

    kink: str | None  # an operation whose derivative jumps
    spacing: float  # between 1 and the next number of the coarsest type on the way
    step: float = 0.0  # of a difference, found by trial
    calls: int = 0  # that took this step


# By the critic, or by the first module that it calls; then by how it is called.
_known: WeakKeyDictionary[Any, dict[Any, Findings]] = WeakKeyDictionary()
# Of critics that nobody has named: by a parameter of theirs.
_known_by_parameter: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def findings_of(critic: Any) -> Findings:
    """Later calls cost a look-up."""
    if isinstance(critic, Module):
        found = _known.get(critic)
        if found is None:
            found = _known[critic] = {None: Findings([("", critic)])}
        return found[None]
    # A lambda is often made anew at every step. What it calls, and its code, stay.
    modules = _modules_behind(critic)
    owner, key = (modules[0][1], (_code(critic), *[ref(m) for _, m in modules])) if modules else (critic, None)
    try:
        found = _known.setdefault(owner, {})
    except TypeError:  # of a kind that cannot be remembered
        return Findings(modules)
    if key not in found:
        found[key] = Findings(modules)
    return found[key]


def findings_by(parameter: torch.Tensor) -> Findings:
    """About the critic that has this parameter, where the critic itself is not at hand."""
    return _known_by_parameter.setdefault(parameter, Findings([]))


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _is_sharded(module: Module) -> bool:
    # Imported by whoever shards; importing it ourselves takes longer than importing torch.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def _unwrapped(critic: Any) -> FunctionType | MethodType | Any:
    """The function or method that a partial or a callable object comes down to."""
    while isinstance(critic, functools.partial):
        critic = critic.func
    if not isinstance(critic, (FunctionType, MethodType)):
        critic = getattr(critic, "__call__", None)  # noqa: B004  # the bound method of a callable object
    return critic


def _code(critic: Any) -> Any:
    return getattr(_unwrapped(critic), "__code__", None)


def _modules_behind(critic: Any) -> list[tuple[str, Module]]:
    """The modules that a partial, a function, a method or a callable object calls, with their paths in their owner.

    Of an owner, such as a trainer that has the generator too, those parts alone that the code names.
    """
    owners = []
    if isinstance(critic, functools.partial):
        owners += [*critic.args, *critic.keywords.values()]
    critic = _unwrapped(critic)
    if isinstance(critic, MethodType):
        owners.append(critic.__self__)
        critic = critic.__func__
    if not isinstance(critic, FunctionType):
        return []
    names, known = critic.__code__.co_names, critic.__globals__
    owners += [known[name] for name in names if name in known]
    owners += [*(critic.__defaults__ or ()), *(critic.__kwdefaults__ or {}).values()]
    for cell in critic.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that has no value yet
            owners.append(cell.cell_contents)
    found: list[tuple[str, Module]] = []
    for owner in owners:
        parts = owner._modules if isinstance(owner, Module) else getattr(owner, "__dict__", {})
        named = [(name, part) for name, part in ((name, parts.get(name)) for name in names) if isinstance(part, Module)]
        found += named or ([("", owner)] if isinstance(owner, Module) else [])
    return found
