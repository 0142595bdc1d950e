"""A critic, recognised from call to call, and watched while it runs for the first time."""

import sys
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, distributed
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .callables import Contents
from .profile import Bounded, CriticProfile, is_compiled
from .state import Buffers, CriticState

DYNAMO = "torch._dynamo.eval_frame"  # loaded once something is compiled

# By the first module that runs in the critic (where none does, by the critic's code), then by what it is recognised by.
_profiles: WeakKeyDictionary[Any, dict[Hashable, CriticProfile]] = WeakKeyDictionary()
_recognised: dict[Hashable, ref[CriticProfile]] = Bounded()  # callables, by their contents
_by_parameter: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Critic:
    """A critic in one call of the package, and what is known of it."""

    profile: CriticProfile
    known = True  # whether there is a profile; of a callable that is new there is one once it has run
    trusted: bool  # whether a run need not be watched by methods that use nothing of the critic but its graph
    _contents: Contents | None = None
    _buffers: Buffers | None = None  # in which a watched run keeps the buffers, as they were before it
    _was_watched = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        if isinstance(function, Module):
            self.profile = _profile_of_module(function)
            self.trusted = self.profile.watched
        else:
            self._contents = Contents(function)
            reference = _recognised.get(self._contents.key)
            profile = None if reference is None else reference()
            self.known = profile is not None
            if profile is not None:
                self.profile = profile
            # A number, an argument or an object deeper down may have chosen another critic. Among several processes
            # its gradients might then not be reduced.
            self.trusted = self.known and not (distributed.is_available() and distributed.is_initialized())

    def modules(self) -> Iterator[Module]:
        """Those that run in it, as far as known, and those that a callable holds, whose buffers it may write itself."""
        if self.known:
            yield from self.profile.modules()
        if self._contents is not None:
            yield from (part for _, module in self._contents.modules for part in module.modules())

    def state(self, device: torch.device) -> CriticState:
        """From which it is about to run. A watched run adds the buffers of modules that were not known."""
        state = CriticState(self.modules(), device)
        self._buffers = state.buffers
        return state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, and watch it if this is its first run in this call."""
        if self._was_watched:
            return self.function(*args, **kwargs)
        # What is new may be compiled somewhere; only a run from a state that is kept needs to know before.
        if self._is_compiled() or (DYNAMO in sys.modules and not self.known and self._buffers is not None):
            self.look(*args, **kwargs)
            if self._buffers is not None:
                self._buffers.keep(self.profile.modules())
            return self.function(*args, **kwargs)
        with self._watching(Buffers() if self._buffers is None else self._buffers):
            return self.function(*args, **kwargs)

    def look(self, *args: Any, **kwargs: Any) -> Any:
        """Watch a run that changes neither buffers nor generators."""
        device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        state = CriticState(self.modules(), device)
        with state, state.buffers.restored(), self.eagerly(), self._watching(state.buffers):
            return self.function(*args, **kwargs)

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """What torch.compile has compiled runs eagerly inside, so that hooks are called, and not compiled."""
        if DYNAMO not in sys.modules:
            yield
            return
        unwarned = r"Using `torch.compile\(module\)` when there are global hooks"
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.filterwarnings("ignore", unwarned, UserWarning)
            yield

    def _is_compiled(self) -> bool:
        """Whether torch.compile has compiled something that the critic is or holds."""
        compiled = self._contents is not None and self._contents.compiled
        return DYNAMO in sys.modules and (compiled or any(map(is_compiled, self.modules())))

    @contextmanager
    def _watching(self, buffers: Buffers) -> Iterator[None]:
        """See the outermost modules that run, and keep the buffers of each, and of all in it, before it does."""
        roots: list[ref[Module]] = []  # weak, since a module that is made for one run is no part of the critic
        seen = WeakSet(() if self._contents is not None else self.profile.modules())
        thread = get_ident()

        def see(module: Module, _: Any) -> None:
            if torch.compiler.is_compiling() or get_ident() != thread or module in seen:
                return
            parts = set(module.modules())
            roots[:] = [root for root in roots if root() not in parts] + [ref(module)]
            seen.update(parts)
            buffers.keep(parts)

        handle = register_module_forward_pre_hook(see)
        try:
            yield
        finally:
            handle.remove()
        self._learn([module for root in roots if (module := root()) is not None])

    def _learn(self, roots: list[Module]) -> None:
        self._was_watched = True
        if self._contents is None:
            self.profile.add(roots)  # they are not among the critic's own modules
            self.profile.watched = True
            return
        signature, held = self._contents.key
        owner = roots[0] if roots else getattr(self.function, "__code__", type(self.function))
        profiles = _profiles.setdefault(owner, Bounded())
        key = signature, tuple(map(ref, roots)) or held
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
        _profiles.setdefault(module, Bounded())[None] = profile
    return profile
