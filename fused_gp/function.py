"""torch.autograd.Function without the part of its call that costs more than a small penalty."""

from typing import Any

from torch._C import _are_functorch_transforms_active
from torch.autograd import Function


class FusedFunction(Function):
    """A Function whose forward takes all its arguments by position, none left out.

    `Function.apply` inspects the signature of a forward that has its own setup_context, at every call, to fill in
    defaults: 70 of the call's 100 microseconds on a slow CPU core. Ours have none to fill in. Under functorch
    transforms (torch.func) the call goes the usual way.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if _are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*args)  # type: ignore[misc]
