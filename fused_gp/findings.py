"""What has been found out about a critic, kept while it lives, so that looking once is enough."""

import contextlib
import dis
import functools
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


class Findings:
    """About one critic. Nothing in here may hold the critic itself: it is to live no longer for being known."""

    def __init__(self, modules: list[tuple[str, Module]]) -> None:
        self.modules = [ref(module) for _, module in modules]
        parts = [(_joined(path, name), part) for path, module in modules for name, part in module.named_modules()]
        # The batch normalisations that may still have to be warned of.
        self.batch_norms = [(name, ref(part)) for name, part in parts if isinstance(part, _BatchNorm)]
        self.sharded = any(is_sharded(part) for _, part in parts)
        self.replicas = [ref(part) for _, part in parts if is_replicated(part)]
        self.chosen: dict[Any, str] = {}  # what "auto" chose, by mode
        self.runs_once: set[Any] = set()  # the modes in which no checkpoint runs a part with buffers again
        self.twice: set[Any] = set()  # the modes in which its graph can be differentiated twice
        self.runs: dict[Any, Run] = {}  # what one run showed, by all that may make another run another
        self.separate: set[Any] = set()  # the makes whose samples do not see one another, all parameters known
        # Parameters that DDP waits for in vain, by the kind of penalty.
        self.unreached: dict[str, list[ReferenceType[torch.Tensor]]] = {}
        self.compiled: dict[Any, Any] = {}

    def alive(self) -> list[Module]:
        return [module for module in (found() for found in self.modules) if module is not None]

    def mode(self, device: torch.device) -> Any:
        """In training or evaluation, under which autocast, with which attention: operations may differ in another."""
        cuda = torch.backends.cuda  # the flags are those of CPUs too
        attention = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return autocast, attention, *[module.training for module in self.alive()]

    def make(self, arguments: Any) -> Any:
        """Of which parts the critic is made, of which types, and which words and flags it is given: all that may make
        it another while it lives."""
        modules = self.alive()
        parts = [(type(part), part.training) for module in modules for part in module.modules()]
        words = [t for t in tree_leaves(arguments) if isinstance(t, (str, bool))]
        return tuple(parts), frozenset(p.dtype for module in modules for p in module.parameters()), tuple(words)


@dataclass
class Run:
    """What one run of the critic showed of how it computes."""

    kink: str | None  # an operation whose derivative jumps
    spacing: float  # between 1 and the next number of the coarsest type on the way
    step: float = 0.0  # of a difference, found by trial
    calls: int = 0  # that took this step
    separate: bool = False  # each score is of one sample


# By the critic, or by the first module that it calls; then by how it is called.
_known: WeakKeyDictionary[Any, dict[Any, Findings]] = WeakKeyDictionary()
# Of critics that nobody has named: by a parameter of theirs.
_known_by_parameter: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def findings_of(critic: Any) -> Findings:
    """Later calls cost a look-up."""
    if isinstance(critic, Module):
        known = _known.get(critic)
        found = None if known is None else known.get(None)
        if found is None:
            found = _known.setdefault(critic, {})[None] = Findings([("", critic)])
        return found
    # A lambda is often made anew at every step. What it calls, and its code, stay.
    modules, others = _behind(critic)
    owner = modules[0][1] if modules else critic
    try:
        key = (*[ref(m) for _, m in modules], *[_weak(thing) for thing in others])
        known = _known.setdefault(owner, {})
        found = known.get(key)
    except TypeError:  # of a kind that cannot be remembered
        return Findings(modules)
    if found is None:
        if len(known) > 100:  # made of other things each time
            known.clear()
        found = known[key] = Findings(modules)
    return found


def findings_by(parameter: torch.Tensor) -> Findings:
    """About the critic that has this parameter, where the critic itself is not at hand."""
    return _known_by_parameter.setdefault(parameter, Findings([]))


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def is_replicated(module: Any) -> bool:
    return isinstance(module, DistributedDataParallel)


def is_sharded(module: Any) -> bool:
    # Imported by whoever shards; importing it ourselves takes longer than importing torch.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def _behind(critic: Any) -> tuple[list[tuple[str, Module]], list[Any]]:
    """The modules that a partial, a function, a method or a callable object calls, with their paths in their owner, and
    what else its doings may depend on.

    Of an owner, such as a trainer that has the generator too, those parts alone that the code names.
    """
    modules: list[tuple[str, Module]] = []
    others: list[Any] = []
    seen: set[int] = set()

    def visit(thing: Any, names: set[str]) -> None:
        if id(thing) in seen or isinstance(thing, torch.Tensor):
            return
        seen.add(id(thing))
        if isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                visit(part, names)
        elif isinstance(thing, MethodType):
            others_take = _modules_of_other_methods(thing.__self__, thing.__func__)
            visit(thing.__self__, names | _names(thing.__func__) | others_take)
            visit(thing.__func__, names)
        elif isinstance(thing, FunctionType):
            if not _of_torch(thing):
                visit_function(thing)
            others.append(thing.__code__)
        elif isinstance(thing, Module):
            named = [(name, part) for name, part in thing._modules.items() if part is not None and name in names]
            modules.extend(named or [("", thing)])
        elif isinstance(thing, (dict, list, tuple)):
            if len(thing) <= 100:  # more are data
                items = thing.items() if isinstance(thing, dict) else enumerate(thing)
                visit_parts(items, names, all_of_it=True)
        else:
            others.append(thing)
            if not isinstance(thing, (type, ModuleType)):
                visit_parts(_attributes(thing).items(), names, all_of_it=False)

    def visit_parts(items: Iterable[tuple[Any, Any]], names: set[str], all_of_it: bool) -> None:
        parts = list(items)
        named = [(name, part) for name, part in parts if name in names]
        for name, part in named or (parts if all_of_it else []):
            if isinstance(part, Module) and not isinstance(part, torch.nn.ModuleDict):
                modules.append((str(name), part))
            else:
                visit(part, names)

    def visit_function(function: FunctionType) -> None:
        names, known = _names(function), function.__globals__
        things = [known[name] for name in sorted(_names_in(function.__code__, words=False)) if name in known]
        things += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # a name that has no value yet
                things.append(cell.cell_contents)
        for thing in things:
            visit(thing, names)

    if not isinstance(critic, (FunctionType, MethodType, functools.partial)):
        critic = getattr(critic, "__call__", critic)  # noqa: B004  # the bound method of a callable object
    visit(critic, set())
    return modules, others


def _attributes(thing: Any) -> dict[str, Any]:
    """With their values, those in slots and a module's parts too."""
    found = {**getattr(thing, "__dict__", {}), **(thing._modules if isinstance(thing, Module) else {})}
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{kind.__name__.lstrip('_')}{name}"
            if name in kind.__dict__:
                with contextlib.suppress(AttributeError):  # it has no value yet
                    found[name] = kind.__dict__[name].__get__(thing, kind)
    return found


# By the class of the owner, then by the code of its method.
_taken_by_others: WeakKeyDictionary[type, dict[CodeType, frozenset[str]]] = WeakKeyDictionary()


def _modules_of_other_methods(owner: Any, method: Any) -> set[str]:
    """The names of the modules that an owner's other methods and properties take from it, as far as a method of its
    calls them, and they one another."""
    if not isinstance(method, FunctionType):
        return set()
    known = _taken_by_others.setdefault(type(owner), {})
    taken = known.get(method.__code__)
    if taken is None:
        taken = known[method.__code__] = _other_methods_take(type(owner), method)
    if not taken:
        return set()
    return {name for name, part in _attributes(owner).items() if name in taken and isinstance(part, Module)}


def _other_methods_take(kind: type, method: FunctionType) -> frozenset[str]:
    functions = [method]
    for function in functions:
        for name in _taken_from_self(function.__code__):
            found = inspect.getattr_static(kind, name, None)  # runs none of their code
            if isinstance(found, property):
                found = found.fget
            elif isinstance(found, functools.cached_property):
                found = found.func
            elif isinstance(found, (classmethod, staticmethod)):
                found = found.__func__
            if isinstance(found, FunctionType) and not _of_torch(found) and found not in functions:
                functions.append(found)
    return frozenset().union(*[_taken_from_self(function.__code__) for function in functions[1:]])


@functools.lru_cache(maxsize=256)
def _taken_from_self(code: CodeType, itself: str | None = None) -> frozenset[str]:
    """The attributes that a method takes from its first argument, in functions inside it too."""
    itself = itself or next(iter(code.co_varnames[: code.co_argcount]), None)
    names: set[str] = set()
    loaded = None
    for instruction in dis.get_instructions(code):
        if loaded == itself is not None and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names.add(instruction.argval)
        loads = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
        loaded = instruction.argval if loads else None
        if isinstance(loaded, tuple):  # two at once
            loaded = loaded[-1]
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return frozenset(names).union(*[_taken_from_self(each, itself) for each in inner if itself])


def _of_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


def _names(function: Any) -> set[str]:
    """The attributes and keys that a function's code speaks of."""
    return _names_in(function.__code__, words=True) if isinstance(function, FunctionType) else set()


@functools.lru_cache(maxsize=256)
def _names_in(code: CodeType, words: bool) -> set[str]:
    """Those of functions inside it too; with `words`, which may be keys, of strings as well."""
    names = {*code.co_names, *[const for const in code.co_consts if words and isinstance(const, str)]}
    return names.union(*[_names_in(const, words) for const in code.co_consts if isinstance(const, CodeType)])


def _weak(thing: Any) -> Any:
    """As a part of a key that keeps nothing alive but words. Of numbers, which may be others at each step, the type."""
    if isinstance(thing, (str, bool, type(None), CodeType)):
        return thing
    try:
        key = ref(thing)
        hash(key)
    except TypeError:
        return type(thing)
    return key
