"""How every kernel here is launched, on which device, and the counters of the row reductions."""

from contextlib import nullcontext
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from .tiles import NUM_WARPS

# The releases whose `JITFunction.run` was read: what it specialises a kernel on, and how it calls the compiled kernel.
DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 8)

Values = tuple[Any, ...]

# Compiled kernels, by what Triton chooses them by, and more. Cleared at a limit, though Triton itself has none.
_compiled: dict[Values, tuple[Any, int, Any]] = {}
_MOST_COMPILED = 4096


def launch(kernel: Any, programs: int, tensors: Values, integers: Values, floats: Values, constants: Values) -> None:
    """Run `kernel` on a grid of `programs`, on the device of the first tensor. Its arguments come in their order.

    A kernel that was launched before is found by a key of our own and called as Triton would call it: at a GAN's sizes,
    `kernel[grid]` takes longer than the kernel. The key is finer than Triton's, which has a tensor's type and whether
    it is aligned, and whether an integer is 1 or needs more than 32 bits. For AMD, Triton's also has whether a tensor's
    storage ends within 2^31 bytes, so that offsets fit into 32 bits, which depends on the integers alone.
    """
    if not DIRECT or isinstance(kernel, InterpretedFunction) or _has_hooks(kernel):
        with _on_device(tensors[0].device):
            _launch_by_triton(kernel, programs, *tensors, *integers, *floats, *constants)
        return
    device = driver.active.get_current_device()
    holder = tensors[0].get_device()
    if holder != device and holder >= 0 and device >= 0:  # Triton launches on the current one; null devices are < 0
        with _on_device(tensors[0].device):
            return launch(kernel, programs, tensors, integers, floats, constants)
    types = [None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
    key = (kernel.fn, device, integers, constants, *types)
    known = _compiled.get(key)
    if known is None:
        compiled = _launch_by_triton(kernel, programs, *tensors, *integers, *floats, *constants)
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled, compiled.function, compiled.packed_metadata
    else:
        compiled, function, metadata = known
        stream = driver.active.get_current_stream(device)
        compiled.run(
            programs, 1, 1, stream, function, metadata, None, None, None, *tensors, *integers, *floats, *constants
        )


def _launch_by_triton(kernel: Any, programs: int, *args: Any) -> Any:
    # FMA contraction is explicit because Triton's default changes between versions.
    return kernel[(programs,)](*args, num_warps=NUM_WARPS, enable_fp_fusion=True)


def _has_hooks(kernel: Any) -> bool:
    """Whether a profiler or a debugger observes each launch, or changes how kernels are compiled."""
    runtime = knobs.runtime
    return bool(
        kernel.pre_run_hooks
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


def is_interpreted(kernel: Any) -> bool:
    """Whether TRITON_INTERPRET=1 was set when the kernel was defined, so that it runs on CPU tensors."""
    return isinstance(kernel, InterpretedFunction)


def _on_device(device: torch.device) -> Any:
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)


# Launches per memset. Counters are 16 bytes apart: Triton specialises kernels on the alignment of pointers.
_LAUNCHES = 256
_zeroed: dict[tuple[torch.device, int], list[torch.Tensor]] = {}


def arrival_counter(device: torch.device) -> torch.Tensor:
    """A zeroed int32 in which the programs of one launch count their arrivals, and which no other launch ever uses.

    So it is never reset, an aborted launch affects no other, and neither streams nor threads share one. The zeros are
    made on the stream that launches, many at a time: the memset is ordered before the launches there and, as torch
    reuses freed memory on its own stream only, whatever reuses theirs is ordered after them.
    """
    if device.type == "cpu":  # interpreted, or on a null device, without streams and graphs
        return _counter(device, 0)
    module = torch.get_device_module(device)
    if module.current_device() != device.index:
        with module.device(device):
            return arrival_counter(device)
    # Older versions of torch lack it on XPU.
    if hasattr(module, "is_current_stream_capturing") and module.is_current_stream_capturing():
        # The memset is captured too: each replay begins at zero, on any stream.
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _counter(device, driver.active.get_current_stream(device.index))


def _counter(device: torch.device, stream: int) -> torch.Tensor:
    try:
        return _zeroed[device, stream].pop()  # atomic: threads that launch on one stream get different counters
    except (KeyError, IndexError):
        counter, *rest = torch.zeros(_LAUNCHES, 4, dtype=torch.int32, device=device).unbind()
        _zeroed[device, stream] = rest
        return counter
