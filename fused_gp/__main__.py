"""`python -m fused_gp`: what a bug report needs. `python -m fused_gp inspect`: what the kernels are compiled to."""

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions

import torch

import fused_gp

from .ops.backends import backend_for, triton_installed

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser("python -m fused_gp", description=report.__doc__)
    command = parser.add_subparsers(dest="command").add_parser(
        "inspect",
        help="compile every kernel for GPUs that need not be present, and print what they cost",
        description="Compile every kernel for each target, without a GPU, and print what it costs. "
        "fused_gp/inspection.py explains the columns.",
    )
    command.add_argument("--target", nargs="+", default=DEFAULT_TARGETS, help="GPUs, such as sm_90 or gfx942")
    command.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    given = parser.parse_args()
    if given.command is None:
        return report()
    if not triton_installed():
        command.error("needs the package triton, which is not installed")
    from .inspection import PROCESSORS, inspect, kernels, table  # here, because it imports Triton

    if kernels.INTERPRETED:
        command.error("compiles the kernels, but TRITON_INTERPRET=1 has them interpreted: unset it")
    unknown = [target for target in given.target if target not in PROCESSORS]
    if unknown:
        command.error(f"argument --target: must be among {', '.join(PROCESSORS)}; got {', '.join(unknown)}")
    with ProcessPoolExecutor() as pool:
        rows = [row for found in pool.map(inspect, dict.fromkeys(given.target)) for row in found]
    print(json.dumps([row._asdict() for row in rows], indent=1) if given.json else table(rows))
    return 0


def report() -> int:
    """Versions, devices with the backend each would get, and a parity check on each; 1 if one fails."""
    print("fused_gp  ", fused_gp.__version__)
    print("python    ", platform.python_version(), "on", platform.platform())
    installed = {found.name: found.version for found in distributions()}
    for package in ("torch", "triton", "numpy"):
        print(f"{package:<10}", installed.get(package, "not installed"))
    print("CUDA / HIP", torch.version.cuda, "/", torch.version.hip)
    print()

    failed = 0
    for device in _devices():
        name = torch.get_device_module(device).get_device_name(device) if device.type in ("cuda", "xpu") else ""
        backend = backend_for("auto", torch.empty(1, device=device)).__name__.rpartition(".")[2]
        try:
            error = _parity(device)
            passed = error < 1e-5
            verdict = f"{'passed' if passed else 'FAILED'}, weight gradients {error:.1e} from fp64 plain autograd"
        except Exception as problem:  # a report shows every fault instead of stopping at the first
            passed, verdict = False, f"FAILED, {type(problem).__name__}: {problem}"
        failed += not passed
        print(f"{device!s:<8} {name}  backend: {'Triton' if backend == 'kernels' else 'plain torch'}; parity {verdict}")
    if not triton_installed():
        print("Triton is not installed: every device uses plain torch.")
    return 1 if failed else 0


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        found += [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    return found


def _parity(device: torch.device) -> float:
    """The largest relative difference between our weight gradients in fp32 and those of plain autograd in fp64."""
    draw = torch.Generator().manual_seed(0)
    weight, last = torch.randn(48, 32, generator=draw), torch.randn(32, generator=draw)
    real, fake = torch.randn(16, 3, 4, 4, generator=draw), torch.randn(16, 3, 4, 4, generator=draw)
    alpha = torch.rand(16, generator=draw)

    def gradients(penalty, device, dtype):  # type: ignore[no-untyped-def]
        w, v = (t.to(device, dtype).requires_grad_() for t in (weight, last))
        samples = [t.to(device, dtype) for t in (real, fake)]
        value = penalty(lambda x: torch.tanh(x.flatten(1) @ w) @ v, *samples, alpha=alpha.to(device))
        return [g.cpu().double() for g in torch.autograd.grad(value, (w, v))]

    ours = gradients(fused_gp.fused_gradient_penalty, device, torch.float32)
    truth = gradients(fused_gp.reference.fused_gradient_penalty, torch.device("cpu"), torch.float64)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, truth, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
