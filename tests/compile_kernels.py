"""Compile every kernel for one GPU on a machine without any, as the launchers would; print one JSON line a kernel.

Run by test_compile_only.py in a process of its own, where the kernels are not interpreted:

    python compile_kernels.py cuda 90 32
"""

import json
import re
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from fused_gp import arguments, kernels
from fused_gp.kernels import interpolation, norm_penalty
from fused_gp.kernels.tiles import NUM_WARPS

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Split rows, and several rows in one tile; both aligned, so that 16-byte accesses are possible.
ALIGNED = ((4, 8192), (64, 64))

# Sizes of 1 become constants of the kernel when it is compiled (not when it is interpreted); odd ones are unaligned.
OTHER = ((4, 1), (1, 1), (1, 5), (3, 9001))


def main(backend: str, arch: str, warp_size: str) -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    interpolation.launch = norm_penalty.launch = compile_instead
    for dtype in DTYPES:
        for shape in ALIGNED:
            call_all(torch.zeros(shape, dtype=dtype), thorough=dtype == torch.float32)
    for shape in OTHER:
        call_all(torch.zeros(shape), thorough=False)
    call_all(torch.zeros(4, 2)[:, :1], thorough=False)
    for half in (torch.float16, torch.bfloat16):
        penalty_all([torch.zeros(3, 5, dtype=half), torch.zeros(3, 5).double()], None)


def compile_instead(kernel, programs, tensor, *args, **constants):
    given = dict(zip(kernel.arg_names, args, strict=False))
    reads = [name for name in ("real", "fake", "cotangent", "gradients", "cotangents") if given.get(name) is not None]
    if kernel.__name__ == "scale_rows_kernel" and constants["SQUARED"] and "cotangents" in reads:
        reads.remove("gradients")  # w' = 0: they do not matter
    compiled = kernel.warmup(*args, **constants, num_warps=NUM_WARPS, enable_fp_fusion=True, grid=(programs,))
    asm = compiled.asm
    ptx = asm.get("ptx", "")
    print(
        json.dumps(
            {
                "kernel": kernel.__name__,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "reads": len(reads),
                "aligned": tuple(tensor.shape) in ALIGNED,
                "binary": len(asm.get("cubin") or asm.get("hsaco")),
                "loads": re.findall(r"ld\.global(?:\.[\w:]+)*", ptx),
                "stores": re.findall(r"st\.global(?:\.[\w:]+)*", ptx),
                "atomics": re.findall(r"atom\.[\w.]+", ptx),
                "local": ".local" in ptx,
                "counts_arrivals": constants.get("REDUCE", False) or constants.get("SPLITS", 1) > 1,
            }
        )
    )


def call_all(rows: torch.Tensor, thorough: bool) -> None:
    """Every launcher; thoroughly with every option that the kernels specialise on, otherwise with one of each."""
    alpha = torch.zeros(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
    kernels.interpolate(rows, rows, alpha)
    for needed in ((True, True), (True, False), (False, True))[: 3 if thorough else 1]:
        kernels.interpolate_adjoint(rows, alpha, *needed)
    forms = (False, False, "mean"), (True, False, "none"), (False, True, "mean")
    for one_sided, squared, reduction in forms[: 3 if thorough else 1]:
        for tensors, grad_scale in (([rows], None), ([rows, rows], torch.ones(())))[: 2 if thorough else 1]:
            penalty_all(tensors, grad_scale, thorough, one_sided, squared, reduction)


def penalty_all(tensors, grad_scale, thorough=False, one_sided=False, squared=False, reduction="mean"):
    form = arguments.options(tensors, 1.0, one_sided, 1e-12, 1.0, reduction, False, squared=squared)
    if grad_scale is not None:
        form = arguments.callers_scale(form, grad_scale, tensors)
    penalty, norms = kernels.penalty_forward(tensors, form)
    upstream = torch.ones_like(penalty)
    kernels.penalty_backward(tensors, norms, upstream, form)
    for upstream_needed in (True, False)[: 2 if thorough else 1]:
        kernels.penalty_double_backward(tensors, norms, upstream, tensors, form, upstream_needed)


if __name__ == "__main__":
    main(*sys.argv[1:])
