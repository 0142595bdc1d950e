"""The last launches of kernels, for the report of a test that failed on a device which may be gone when it is read."""

import inspect
from collections import deque
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
import triton


class LastLaunches:
    """Which kernels were launched, with which settings. Nothing of the tensors is kept but their types and layouts."""

    def __init__(self, most=24):
        self._kept = deque(maxlen=most)
        self._count = 0

    @contextmanager
    def recorded(self):
        """Inside, every launch of the package's kernels is recorded."""
        from fused_gp.kernels import interpolation, norm_penalty

        with pytest.MonkeyPatch.context() as patch:
            for module in (interpolation, norm_penalty):
                patch.setattr(module, "launch", self._recording(module.launch))
            yield

    def _recording(self, launch):
        def recording(kernel, programs, tensors, *numbers):
            self._count += 1
            self._kept.append((kernel, programs, [_layout(tensor) for tensor in tensors], numbers))
            return launch(kernel, programs, tensors, *numbers)

        return recording

    def __str__(self):
        """A line for each launch, the last one at the end."""
        versions = f"torch {torch.__version__}, Triton {triton.__version__}"
        head = f"{versions}; the last {len(self._kept)} of {self._count} launches:"
        return "\n".join([head, *[_line(*launch) for launch in self._kept]])


def _layout(tensor):
    if tensor is None:
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    aligned = "" if tensor.data_ptr() % 16 == 0 else " misaligned"
    return f"{dtype} {tuple(tensor.shape)} by {tensor.stride()}{aligned}"


def _line(kernel, programs, layouts, numbers):
    names = inspect.signature(kernel.fn).parameters
    arguments = [f"{name}={value}" for name, value in zip(names, chain(layouts, *numbers), strict=True)]
    return f"{kernel.fn.__name__}, {programs} programs: {', '.join(arguments)}"
