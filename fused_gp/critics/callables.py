"""How a callable that is no module is recognised: a lambda may be made anew at every step, but what it holds stays."""

import functools
from contextlib import suppress
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType, NoneType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Module

MAX_ELEMENTS = 100  # longer containers are data
COMPILED = "_torchdynamo_orig_callable"  # an attribute of functions that torch.compile has made
NUMBERS = (int, float)
ATOMS = frozenset((*NUMBERS, bool, str, NoneType, Tensor, torch.device, torch.dtype))


class Contents:
    """What a callable holds: in its closure, defaults and globals, in its owner, in the arguments of a partial."""

    def __init__(self, critic: Any) -> None:
        self.signature: list[Any] = []  # code, callables, bools and strings; of everything else the type
        self.held: list[Any] = []  # weak references to modules, and to objects that may hold others
        self.modules: list[tuple[str, Module]] = []  # each with its path in what the callable holds
        self.compiled = False  # whether torch.compile made one of the functions
        self._seen: set[int] = set()
        self._add(critic)
        # What the callable is recognised by. It keeps nothing alive but code, types and strings.
        self.key = tuple(self.signature), tuple(self.held)

    def _add(self, thing: Any, path: str = "") -> None:
        kind = type(thing)
        if kind in (str, bool, NoneType):
            self.signature.append(thing)
        elif kind in NUMBERS or kind is ModuleType:
            self.signature.append(kind)  # numbers may change at every step
        elif id(thing) not in self._seen:
            self._seen.add(id(thing))
            if isinstance(thing, Module):
                self.modules.append((path, thing))
                self.held.append(ref(thing))
                self.held += [ref(part) for part in thing._modules.values() if part is not None]
            elif kind is FunctionType:
                self._add_function(thing)
            elif kind is MethodType:
                self._add(thing.__func__)
                self._add(thing.__self__)
            elif isinstance(thing, functools.partial):
                for part in (thing.func, *thing.args, *thing.keywords.values()):
                    self._add(part)
            elif kind in (list, tuple, dict):
                self.signature.append(kind)
                for name, part in _parts(thing):
                    if type(part) in NUMBERS:  # without a call for each: configurations hold many
                        self.signature.append(type(part))
                    else:
                        self._add(part, str(name))
            elif isinstance(thing, Tensor):
                self.signature.append(thing.dtype)
            else:
                self._add_object(thing)

    def _add_function(self, function: FunctionType, with_globals: bool = True) -> None:
        self.signature.append(function.__code__)
        self.compiled |= hasattr(function, COMPILED)
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # a name without a value yet
                self._add(cell.cell_contents)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._add(default)
        known = function.__globals__
        if not with_globals or str(known.get("__name__")).partition(".")[0] == "torch":
            return
        for name in _global_names(function.__code__):
            thing = known.get(name)
            if type(thing) is FunctionType and thing.__globals__ is not known:
                self._add_function(thing, with_globals=False)  # of another file
            elif thing is not None:
                self._add(thing)

    def _add_object(self, thing: Any) -> None:
        self.signature.append(type(thing))
        (self.signature if callable(thing) else self.held).append(_reference(thing))
        self._add_modules_in(thing, True)

    def _add_modules_in(self, owner: Any, deep: bool) -> None:
        """A trainer's critic may be exchanged for another, or be an attribute of an attribute."""
        for name, part in _parts(owner):
            if type(part) in ATOMS:
                continue
            if isinstance(part, Module):
                self._add(part, str(name))
            elif type(part) is FunctionType:
                self.compiled |= hasattr(part, COMPILED)
            elif deep:
                self._add_modules_in(part, False)


def _reference(thing: Any) -> Any:
    """A weak reference; the type, of what has none or cannot be a key."""
    try:
        hash(reference := ref(thing))
    except Exception:  # whatever a __hash__ raises
        return type(thing)
    return reference


def _parts(thing: Any) -> list[tuple[Any, Any]]:
    """Elements of a container, or attributes with their values, those in slots too. Runs no code of the object's."""
    kind: Any = type(thing)
    if kind in (list, tuple, dict):
        return list(thing.items() if kind is dict else enumerate(thing)) if len(thing) <= MAX_ELEMENTS else []
    found = [] if isinstance(thing, type) else list(getattr(thing, "__dict__", {}).items())
    for name, slot in _slots(kind):
        with suppress(AttributeError):  # a slot without a value yet
            found.append((name, slot.__get__(thing)))
    return found


@functools.lru_cache(maxsize=256)
def _slots(kind: type) -> list[tuple[str, MemberDescriptorType]]:
    found = [item for base in kind.__mro__ for item in vars(base).items()]
    return [(name, slot) for name, slot in found if isinstance(slot, MemberDescriptorType)]


@functools.lru_cache(maxsize=256)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a function may take from its globals, functions inside it included."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *[name for each in inner for name in _global_names(each)]]))
