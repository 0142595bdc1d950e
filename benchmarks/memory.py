"""Peak memory of a step, above what the process held before it. Measure in a process of its own."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

# Set these before Python starts: allocations above 64 kB are then given back when they are freed, so that the resident
# set follows what is alive.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak(step: Callable[[], object], device: str) -> int:
    """Bytes. On a CPU of the resident set (Linux), on a GPU of torch's allocator."""
    gc.collect()
    if device != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        step()
        module.synchronize()
        return module.max_memory_allocated() - before
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise RuntimeError(f"start the process with {', '.join(missing)} set")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
