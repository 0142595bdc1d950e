"""A batch as the caller has it: one tensor, or a tuple, list or dict of tensors that make up the samples together."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten


class Samples(NamedTuple):
    """The tensors, and the structure they came in (None: a tensor by itself)."""

    tensors: list[Tensor]
    spec: TreeSpec | None

    def rebuild(self, tensors: list[Tensor]) -> Any:
        """The caller's structure, with these tensors in it."""
        return tensors[0] if self.spec is None else tree_unflatten(tensors, self.spec)
