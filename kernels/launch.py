"""How every kernel here is launched, on which device, and what the row reductions count arrivals in."""

from contextlib import nullcontext
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from .tiles import NUM_WARPS


def launch(kernel: Any, programs: int, tensor: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Run `kernel` on a grid of `programs`, on the device that holds `tensor`."""
    # Triton launches on the current device, which need not be the tensor's. FMA contraction is asked for by name
    # because Triton's default changes between versions.
    with _current(tensor.device):
        kernel[(programs,)](*args, **constants, num_warps=NUM_WARPS, enable_fp_fusion=True)


def is_interpreted(kernel: Any) -> bool:
    """Whether TRITON_INTERPRET=1 was set when the kernel was defined, so that it runs on CPU tensors."""
    return isinstance(kernel, InterpretedFunction)


def _current(device: torch.device) -> Any:
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)


# One memset serves so many launches. Its counters are 16 bytes apart: all aligned alike, as Triton asks of pointers.
_LAUNCHES = 256
_zeroed: dict[tuple[torch.device, int], list[torch.Tensor]] = {}


def arrivals(device: torch.device) -> torch.Tensor:
    """A zeroed int32 in which the programs of one launch count themselves, and which no other launch ever gets.

    So nobody sets it back, a launch that was aborted half-way spoils no other, and neither streams nor threads share
    one. The zeros are made on the stream that will launch, many at a time: there the memset comes before the launches
    and, as torch reuses freed memory on its own stream only, whatever comes into their place comes after them.
    """
    with _current(device):
        if _is_capturing(device):  # the memset is captured too: each replay begins at zero, whatever stream it is on
            return torch.zeros(1, dtype=torch.int32, device=device)
        stream = 0 if device.type == "cpu" else driver.active.get_current_stream(device.index)
        try:
            return _zeroed[device, stream].pop()  # atomic: threads that launch on one stream get different ones
        except (KeyError, IndexError):
            counter, *rest = torch.zeros(_LAUNCHES, 4, dtype=torch.int32, device=device).unbind()
            _zeroed[device, stream] = rest
            return counter


def _is_capturing(device: torch.device) -> bool:
    module = torch.get_device_module(device)  # CPUs have no graphs, nor has XPU in older versions of torch
    return hasattr(module, "is_current_stream_capturing") and module.is_current_stream_capturing()
