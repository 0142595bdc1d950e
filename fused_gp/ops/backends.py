"""The one place that decides which backend computes an op, by the `backend` argument and the tensor's device."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .. import reference
from . import torch_ops

TRITON_DEVICES = ("cuda", "xpu")  # ROCm tensors are of type "cuda"


def backend_for(backend: str, tensor: torch.Tensor) -> Any:
    """The module with the functions on rows: `fused_gp.ops.torch_ops` or `fused_gp.kernels`.

    "auto" is Triton on CUDA, ROCm and XPU tensors where Triton is installed, and plain torch elsewhere and for tensors
    without memory (FakeTensor). While torch.compile traces, or torch.func or forward-mode autograd runs, it is
    `fused_gp.reference`: differentiable operations that a transform can trace, and that a compiler fuses itself.
    """
    if traced():
        if backend not in ("auto", "torch"):
            raise ValueError(
                "backend must be 'auto' or 'torch' under torch.compile, torch.func and forward-mode autograd, which "
                f"cannot trace a kernel, got {backend!r}"
            )
        return reference
    if backend == "torch" or (backend == "auto" and tensor.is_cpu):
        return torch_ops
    if backend == "auto":
        takes_kernels = tensor.device.type in TRITON_DEVICES and not isinstance(tensor, FakeTensor)
        return _kernels() if takes_kernels and triton_installed() else torch_ops
    if backend != "triton":
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    if not triton_installed():
        raise ValueError("backend='triton' needs the package triton, which is not installed")
    if isinstance(tensor, FakeTensor):  # its address is zero
        raise ValueError(
            "backend='triton' cannot run on a FakeTensor, which has no memory: use backend='auto' or 'torch'"
        )
    kernels = _kernels()
    if tensor.device.type not in TRITON_DEVICES and not (tensor.device.type == "cpu" and kernels.take_cpu_tensors()):
        raise ValueError(
            f"backend='triton' cannot run on {tensor.device.type} tensors: use backend='auto' or 'torch', or, to run "
            "the kernels on CPU tensors under Triton's interpreter, set TRITON_INTERPRET=1 before they are imported"
        )
    return kernels


def traced() -> bool:
    """Whether torch.compile traces, or torch.func or forward-mode autograd runs."""
    if torch.compiler.is_dynamo_compiling() or _are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0  # a kernel would silently drop the tangent


@cache
def triton_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _kernels() -> Any:
    return import_module("fused_gp.kernels")  # here, because importing fused_gp must not load Triton
