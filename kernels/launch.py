"""How every kernel here is launched, on which device, and what the row reductions count arrivals in."""

from contextlib import nullcontext
from typing import Any

import torch
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


_arrivals: dict[tuple[torch.device, int], torch.Tensor] = {}


def arrivals(device: torch.device) -> torch.Tensor:
    """A zeroed int32 in which the programs of one launch count themselves; the last one sets it back to zero.

    Launches on one stream run one after the other and may share it; two streams may not. A graph under capture may
    be replayed on any stream, so it gets one of its own.
    """
    if device.type == "cpu":  # the interpreter: one launch at a time
        return torch.zeros(1, dtype=torch.int32, device=device)
    with _current(device):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch.get_device_module(device).current_stream(device).stream_id
    counter = _arrivals.get((device, stream))
    if counter is None:
        counter = _arrivals[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return counter
