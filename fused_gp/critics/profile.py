"""What is known of a critic, kept while the critic lives, so that finding it out once is enough."""

import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves


class Bounded(dict[Any, Any]):
    """Forgets everything once it would hold more than 100: prompts and lengths may change at every call."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= 100 and key not in self:
            self.clear()
        super().__setitem__(key, value)


class CriticProfile:
    """What is known of one critic. It holds no strong reference to it."""

    def __init__(self, roots: Sequence[Module], named: Sequence[tuple[str, Module]] = ()) -> None:
        """Of the outermost modules that run in it, and what it holds, by paths that are used in messages."""
        self._roots: list[ref[Module]] = []
        self.batch_norms: list[tuple[str, ref[_BatchNorm]]] = []  # those that may still have to be warned of
        self.sharded = False
        self.watched = False  # whether modules that run outside of the roots are known
        self._replicas: list[ref[DistributedDataParallel]] = []
        self.add(roots, named)
        # By `mode`: what "auto" chose; whether the graph was differentiated twice, and whether no checkpoint runs a
        # module with buffers again.
        self.chosen: dict[Hashable, str] = Bounded()
        self.twice_differentiable: dict[Hashable, bool] = Bounded()
        self.no_buffers_in_checkpoints: dict[Hashable, bool] = Bounded()
        # By `composition`, and more.
        self.directional: dict[Hashable, Any] = Bounded()
        self.independent_samples: dict[Hashable, bool] = Bounded()
        self.compiled: dict[Hashable, Any] = Bounded()
        # Parameters that DDP waits for and the penalty does not reach, by the kind of penalty.
        self.unreached: dict[str, list[ref[Tensor]]] = Bounded()

    def add(self, roots: Sequence[Module], named: Sequence[tuple[str, Module]] = ()) -> None:
        paths: dict[int, str] = {}
        for path, module in named:
            for name, part in module.named_modules():
                paths.setdefault(id(part), ".".join(filter(None, (path, name))))
        for root in roots:
            self._roots.append(ref(root))
            for name, part in root.named_modules():
                if isinstance(part, _BatchNorm):
                    self.batch_norms.append((paths.get(id(part), name), ref(part)))
                if is_replicated(part):
                    self._replicas.append(ref(part))
                self.sharded |= is_sharded(part)

    def roots(self) -> list[Module]:
        return _alive(self._roots)

    def modules(self) -> Iterator[Module]:
        """The roots, and all that is in them."""
        return (part for root in self.roots() for part in root.modules())

    def replicas(self) -> list[DistributedDataParallel]:
        return _alive(self._replicas) if self._replicas else []

    def mode(self, device: torch.device) -> Hashable:
        """Training or evaluation, autocast, attention: in another mode the critic may run other operations."""
        cuda = torch.backends.cuda  # the flags are those of CPUs too
        attention = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return autocast, attention, *[root.training for root in _alive(self._roots)]

    def composition(self, arguments: Any) -> Hashable:
        """What makes it another critic: modules' types and modes, parameters' types, strings and bools it is given."""
        roots = self.roots()
        parts = [(type(part), part.training) for root in roots for part in root.modules()]
        words = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, (str, bool))]
        return tuple(parts), frozenset(p.dtype for root in roots for p in root.parameters()), tuple(words)


def is_replicated(module: Any) -> bool:
    return isinstance(module, DistributedDataParallel)


def is_sharded(module: Any) -> bool:
    # Imported already where a module is sharded; importing it ourselves takes longer than importing torch.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def is_compiled(module: Module) -> bool:
    """By torch.compile, or in place by its own `compile`."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and (isinstance(module, dynamo.OptimizedModule) or module._compiled_call_impl is not None)


def _alive(references: Iterable[ref[Any]]) -> list[Any]:
    return [thing for reference in references if (thing := reference()) is not None]
