"""A critic, recognised from call to call, and watched while it runs for the first time."""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.distributed import is_available, is_initialized
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .callables import Contents
from .kinds import has_compiled_parts
from .profile import Bounded, CriticProfile
from .state import Buffers, RandomState

# By the first module that runs in the critic (by the code of the critic, where none does), then by what it is
# recognised by. A module is recognised as itself: None.
_profiles: WeakKeyDictionary[Any, dict[Hashable, CriticProfile]] = WeakKeyDictionary()
_recognised: dict[Hashable, ref[CriticProfile]] = Bounded()  # callables, by their contents
_by_parameter: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Critic:
    """What one call of the package knows of its critic.

    function    the callable itself
    known       whether there is a profile: of a callable that was not seen before there is one once it has run
    trusted     whether the profile need not be checked by watching another run
    """

    profile: CriticProfile

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.buffers: Buffers | None = None  # where a watched run keeps the modules' buffers, as they were before it
        self._watched = False
        if isinstance(function, Module):
            self._contents = None
            self.profile = _profile_of_module(function)
            self.known, self.trusted = True, self.profile.watched
        else:
            self._contents = Contents(function)
            reference = _recognised.get(self._contents.key())
            profile = None if reference is None else reference()
            self.known = profile is not None
            if profile is not None:
                self.profile = profile
            # What it is recognised by may hold deeper down, or choose by number, what is another critic by now. Among
            # several processes that would be a gradient that nobody reduces.
            self.trusted = self.known and not (is_available() and is_initialized())

    def modules(self) -> Iterator[Module]:
        """Those that run in it, as far as known, and those that it holds, whose own buffers a method may write."""
        if self.known:
            yield from self.profile.modules()
        if self._contents is not None:
            yield from (module for _, module in self._contents.modules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, and watch it if this is the first time in this call."""
        if self._watched:
            return self.function(*args, **kwargs)
        if self._has_compiled_parts():
            self.look(*args, **kwargs)
            return self.function(*args, **kwargs)
        with self._watching(Buffers() if self.buffers is None else self.buffers):
            return self.function(*args, **kwargs)

    def look(self, *args: Any, **kwargs: Any) -> Any:
        """Watch a run of which nothing stays: the buffers and the random state are put back.

        What torch.compile has compiled runs eagerly, and so the hook is not compiled with it.
        """
        device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        random_state, buffers = RandomState(device), Buffers(self.modules())
        try:
            with _eager(self._has_compiled_parts()), buffers.restored(), self._watching(buffers):
                return self.function(*args, **kwargs)
        finally:
            random_state.restore()

    def _has_compiled_parts(self) -> bool:
        contents = self._contents
        return contents is not None and (
            contents.compiled or any(has_compiled_parts(module) for _, module in contents.modules)
        )

    @contextmanager
    def _watching(self, buffers: Buffers) -> Iterator[None]:
        """See which modules run, outermost first, and keep their buffers as they are before they do."""
        roots: list[Module] = []
        seen = set() if self._contents is not None else {id(part) for part in self.profile.modules()}
        thread = get_ident()

        def see(module: Module, _: Any) -> None:
            if torch.compiler.is_compiling() or get_ident() != thread or id(module) in seen:
                return
            parts = {id(part): part for part in module.modules()}
            roots[:] = [root for root in roots if id(root) not in parts] + [module]
            seen.update(parts)
            buffers.keep(parts.values())

        handle = register_module_forward_pre_hook(see)
        try:
            yield
        finally:
            handle.remove()
        self._learn(roots)

    def _learn(self, roots: list[Module]) -> None:
        self._watched = True
        if self._contents is None:
            self.profile.add(roots)  # modules of no module's own
            self.profile.watched = True
            return
        signature, held = self._contents.key()
        key = signature, (tuple(map(ref, roots)) or held)
        owner = roots[0] if roots else getattr(self.function, "__code__", self.function)
        try:
            profiles = _profiles.setdefault(owner, Bounded())
        except TypeError:  # of a type that has no weak references, or no hash
            profiles = {}
        if key not in profiles:
            profiles[key] = CriticProfile(roots, self._contents.modules)
        self.profile, self.known = profiles[key], True
        _recognised[signature, held] = ref(self.profile)


def profile_by_parameter(parameter: Tensor) -> CriticProfile:
    """Of the critic that has this parameter, where the critic itself is not at hand."""
    profile: CriticProfile = _by_parameter.setdefault(parameter, CriticProfile([]))
    return profile


def _profile_of_module(module: Module) -> CriticProfile:
    known = _profiles.get(module)
    profile = None if known is None else known.get(None)
    if profile is None:
        profile = CriticProfile([module])
        profile.watched = has_compiled_parts(module)  # they would be compiled with the hook, or without calling it
        _profiles.setdefault(module, Bounded())[None] = profile
    return profile


@contextmanager
def _eager(compiled_parts: bool) -> Iterator[None]:
    if not compiled_parts:
        yield
        return
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are global hooks", UserWarning)
        yield
