"""Launches on tensors without memory: which elements of which tensor every program reads and writes.

The launchers get tensors without storage (FakeTensor), which may be larger than any machine's memory; their launches
are recorded with grid and arguments. Programs of that grid then run in Triton's interpreter, by the kernel's own code
but on made-up addresses: a load gives zeros, a store changes nothing, and both record the elements that they access.
"""

from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import interpreter

from fused_gp.kernels import norm_penalty

# Argument i begins in the middle of region i of 2^45 bytes, so that a wrong address still tells its tensor.
REGION_BITS = 45


@contextmanager
def virtual_memory():
    """Inside, new tensors have no storage and kernels are not run; yields the list of launches."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        launches.append(Launch(self.rewrite(), grid[0], values))

    with (
        FakeTensorMode(),
        mock.patch.object(interpreter.InterpretedFunction, "run", run),
        mock.patch.object(norm_penalty, "arrival_counter", side_effect=lambda _: torch.zeros(1, dtype=torch.int32)),
    ):
        yield launches


class Launch:
    """A recorded launch. After `run`, the elements that programs accessed are in `read`, `written` and `counted` (by an
    atomic): under the argument's name, numbers from 0, row by row, each as often as it was accessed.
    """

    def __init__(self, fn, programs, values):
        self.fn, self.name, self.programs, self.values = fn, fn.__name__, programs, values
        self.tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        self.read, self.written, self.counted = defaultdict(list), defaultdict(list), defaultdict(list)

    def run(self, program):
        """One program, as if programs finished in the order of their numbers: the last one finds all others done."""
        constexprs = interpreter.GridExecutor(self.fn, list(self.values), None).constexprs
        args = {
            name: value if name in constexprs else interpreter._implicit_cvt(self._pointer(name, value))
            for name, value in self.values.items()
        }
        builder = interpreter.interpreter_builder
        scope = interpreter._patch_lang(self.fn)
        try:
            with mock.patch.multiple(
                builder,
                create_masked_load=self._load,
                create_masked_store=self._store,
                create_atomic_rmw=lambda op, ptr, val, mask, sem, scope: self._count(program, ptr, val, mask),
            ):
                builder.set_grid_dim(self.programs, 1, 1)
                builder.set_grid_idx(program, 0, 0)
                self.fn(**args)
        finally:
            scope.restore()

    def _pointer(self, name, value):
        if name not in self.tensors:
            return value
        address = self._base(list(self.tensors).index(name))
        return SimpleNamespace(dtype=value.dtype, data_ptr=lambda: address)

    @staticmethod
    def _base(index):
        return (index << REGION_BITS) + (1 << REGION_BITS - 1)

    def _load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        self._access(self.read, ptrs, mask)
        dtype = ptrs.get_element_ty()
        return interpreter.TensorHandle(np.zeros(ptrs.data.shape, interpreter._get_np_dtype(dtype)), dtype)

    def _store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        self._access(self.written, ptrs, mask)

    def _count(self, program, ptrs, value, mask):
        self._access(self.counted, ptrs, mask)
        return interpreter.TensorHandle(np.full_like(value.data, program), value.dtype.scalar)

    def _access(self, accessed, ptrs, mask):
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.int64)
        if not addresses.size:
            return
        index = addresses[0] >> REGION_BITS
        assert (addresses >> REGION_BITS == index).all(), f"{self.name} accesses an address outside of all its tensors"
        assert 0 <= index < len(self.tensors), f"{self.name} accesses an address outside of all its tensors"
        name, tensor = list(self.tensors.items())[index]
        distance, rest = np.divmod(addresses - self._base(index), tensor.element_size())
        assert not rest.any(), f"{self.name} accesses an address between two elements of {name}"
        accessed[name].append(self._elements(name, distance, tensor))

    def _elements(self, name, distance, tensor):
        """The elements at these distances from the first one; each must be an element of the tensor."""
        rows, width = tensor.shape if tensor.ndim == 2 else (tensor.numel(), 1)
        stride = tensor.stride(0) if tensor.ndim and rows > 1 else 0
        row = distance // stride if stride else np.zeros_like(distance)
        col = distance - row * stride
        inside = (row >= 0) & (row < rows) & (col >= 0) & (col < width)
        assert inside.all(), f"{self.name} accesses {distance[~inside][:3]}, outside of {name}, {rows} rows of {width}"
        return row * width + col
