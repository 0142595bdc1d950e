"""How every kernel here is launched, on which device, and what the row reductions count arrivals in."""

from contextlib import nullcontext
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver, jit
from triton.runtime.interpreter import InterpretedFunction

from .tiles import NUM_WARPS

# The releases in which `JITFunction.run` was read: what it specialises a kernel on, and how it calls the one compiled.
DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 8)

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, programs: int, tensor: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Run `kernel` on a grid of `programs`, on the device that holds `tensor`. Constants come in the kernel's order.

    A kernel that was launched before is found by a key of our own and called as Triton would call it: at a GAN's sizes,
    `kernel[grid]` takes longer than the kernel. For each argument the key holds what Triton itself specialises on (its
    type; whether it is None, 1, a multiple of 16, aligned), by Triton's own function, so it is never coarser.
    """
    if not DIRECT or isinstance(kernel, InterpretedFunction) or _watched():
        with _current(tensor.device):
            _launch_by_triton(kernel, programs, args, constants)
        return
    device = driver.active.get_current_device()
    holder = tensor.get_device()
    if holder != device and holder >= 0 and device >= 0:  # Triton launches on the current one. Below zero: null devices
        with _current(tensor.device):
            return launch(kernel, programs, tensor, *args, **constants)
    backend = kernel.device_caches[device][3]
    specialize = jit.native_specialize_impl
    values = constants.values()
    key = (kernel.fn, device, *values, *[specialize(backend, arg, False, True, True) for arg in args])
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = _launch_by_triton(kernel, programs, args, constants)
    else:
        stream = driver.active.get_current_stream(device)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *values
        )


def _launch_by_triton(kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    # FMA contraction is asked for by name because Triton's default changes between versions.
    return kernel[(programs,)](*args, **constants, num_warps=NUM_WARPS, enable_fp_fusion=True)


def _watched() -> bool:
    """Whether a profiler or a debugger is to see each launch, or has kernels compiled in its own way."""
    runtime = knobs.runtime
    return bool(
        runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


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
