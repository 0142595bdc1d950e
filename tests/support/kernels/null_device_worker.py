"""Launches of compiled kernels, recorded on a null device; printed as one JSON object with a member for each function.

Run by tests/kernels/test_launch.py in a process of its own, where kernels are compiled, not interpreted:

    python -m tests.support.kernels.null_device_worker
"""

import json
from contextlib import contextmanager
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from fused_gp import fused_gradient_penalty, gradient_norm_penalty, interpolate, kernels, r1_penalty
from fused_gp.kernels import interpolation, launch
from fused_gp.kernels.null_device import _Recorder, null_device

TARGET = GPUTarget("cuda", 90, 32)


def main():
    functions = (
        launches_of_ops, launches_of_penalties, reduction_memory, active_drivers, cpu_error, devices,
        real_device_tensors, current_device_and_stream, direct_launches, kernel_variants, compiled_entries,
        hooked_launches,
    )  # fmt: skip
    print(json.dumps({function.__name__: function() for function in functions}))


class LaunchesByStep:
    """The kernels launched in each step of a computation, by the step's name."""

    def __init__(self, launches):
        self.launches, self.names = launches, {}

    def __call__(self, name, result):
        self.names[name] = [launch.name.removesuffix("_kernel") for launch in self.launches]
        self.launches.clear()
        return result


def launches_of_ops():
    """Forward, backward and double backward of each op, of one tensor and of two."""
    steps = {}
    for count in (1, 2):
        x, y, u = ([torch.randn(4, 6, requires_grad=True) for _ in range(count)] for _ in range(3))
        alpha = torch.rand(4, 1)
        with null_device(TARGET) as launches:
            step = steps[f"interpolate, {count}"] = LaunchesByStep(launches)
            x_hat = step("forward", interpolate(tuple(x), tuple(y), alpha, backend="triton"))
            grads = step("backward", torch.autograd.grad(x_hat, [*x, *y], u, create_graph=True))
            step("double", torch.autograd.grad(grads, u, [torch.ones_like(g) for g in grads]))
        for form in ({}, {"one_sided": True, "reduction": "none"}, {"squared": True}):
            with null_device(TARGET) as launches:
                step = steps[f"penalty {form}, {count}"] = LaunchesByStep(launches)
                value = step("forward", gradient_norm_penalty(tuple(x), backend="triton", **form))
                a = torch.ones_like(value, requires_grad=True)
                step("backward alone", torch.autograd.grad(value, x, a, retain_graph=True))
                grads = step("backward", torch.autograd.grad(value, x, a, create_graph=True))
                step("double", torch.autograd.grad(grads, [*x, a], u))
    return {name: step.names for name, step in steps.items()}


def launches_of_penalties():
    """The whole penalty: gradients of the critic's weights, of the generator's, and a second derivative."""
    critic = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    weights = list(critic.parameters())[:-1]
    real, fake = torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    steps = {}
    with null_device(TARGET) as launches:
        step = steps["penalty"] = LaunchesByStep(launches)
        value = step("forward", fused_gradient_penalty(critic, real, fake.detach(), backend="triton"))
        step("backward", torch.autograd.grad(value, weights))
        step = steps["attached"] = LaunchesByStep(launches)
        value = step("forward", fused_gradient_penalty(critic, real, fake, backend="triton"))
        step("backward", torch.autograd.grad(value, [*weights, fake]))
        step = steps["twice"] = LaunchesByStep(launches)
        value = step("forward", fused_gradient_penalty(critic, real, fake.detach(), backend="triton"))
        grads = step("backward", torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True))
        step("double", torch.autograd.grad(sum(g.sum() for g in grads), weights, materialize_grads=True))
        step = steps["r1"] = LaunchesByStep(launches)
        value = step("forward", r1_penalty(critic, real, backend="triton"))
        step("backward", torch.autograd.grad(value, weights))
        step = steps["two inputs"] = LaunchesByStep(launches)
        value = step("forward", fused_gradient_penalty(Both(critic), (real, real), (real, real), backend="triton"))
        step("backward", torch.autograd.grad(value, weights))
    return {name: step.names for name, step in steps.items()}


class Both(torch.nn.Module):
    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, inputs):
        return self.critic(inputs[0] + 2 * inputs[1])


def reduction_memory():
    """By shape and reduction: number of programs, slots for partial sums, and whether there is an arrival counter."""
    found = {}
    for shape in ((2, 4), (64, 2), (3, 1500), (1, 9000)):
        for reduction in ("mean", "none"):
            with null_device(TARGET) as launches:
                gradient_norm_penalty(torch.randn(shape), reduction=reduction, backend="triton")
            given = launches[0].arguments
            found[f"{shape}, {reduction}"] = [
                launches[0].grid[0],
                None if given["partials"] is None else given["partials"].numel(),
                given["arrived"] is not None,
            ]
    return found


def active_drivers():
    """In null devices inside one another, and after one that ended with an error."""
    before = driver._active
    found = []
    with null_device(TARGET) as outer:
        first = driver._active
        with null_device(TARGET, 1) as inner:
            kernels.interpolate(*batch())
        found.append([len(outer), len(inner), driver._active is first, driver.active.get_current_target() == TARGET])
    try:
        with null_device(TARGET):
            raise KeyError
    except KeyError:
        found.append(driver._active is before)
    return found


def cpu_error():
    """The error for CPU tensors outside a null device."""
    try:
        interpolate(*batch(), backend="triton")
    except ValueError as error:
        return str(error)


def devices():
    """One call on two devices of one kind and on one of another; and on the first again."""
    compiled = []
    for target, index in ((TARGET, 0), (TARGET, 1), (GPUTarget("cuda", 80, 32), 0), (TARGET, 0)):
        with null_device(target, index) as launches:
            for _ in range(2):  # compiled, and found again
                kernels.interpolate(*batch())
        assert launches[0].compiled is launches[1].compiled
        compiled.append(launches[0].compiled)
    first, second, other, again = compiled
    return {
        "second": first is not second, "again": first is again,
        "arch": [each.metadata.target.arch for each in compiled], "other": other is not first,
    }  # fmt: skip


def real_device_tensors():
    """How many of two launches on tensors of a real device are recorded. The device itself is not used."""
    with null_device(TARGET) as launches, mock.patch.object(torch.Tensor, "get_device", return_value=0):
        for _ in range(2):
            kernels.interpolate(*batch())
    return len(launches)


def current_device_and_stream():
    """Of two launches, while another device than the tensors' is current; and the current device afterwards."""
    found = []

    @contextmanager
    def made_current(device):
        former, driver.active.device = driver.active.device, 1
        yield
        driver.active.device = former

    def record(self, x, y, z, stream, *_):
        found.append([driver.active.get_current_device(), stream])

    with (
        null_device(TARGET),
        mock.patch.object(driver.active, "device", 0),
        mock.patch.object(driver.active, "get_current_stream", lambda device: 70 + device),
        mock.patch.object(torch.Tensor, "get_device", return_value=1),
        mock.patch.object(launch, "_on_device", made_current),
        mock.patch.object(_Recorder, "__call__", record),
    ):
        for _ in range(2):  # the first by Triton, which compiles, the second directly
            kernels.interpolate(*batch())
        found.append(driver.active.device)
    return found


def batch():
    return torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 1)


def direct_launches():
    """Whether direct launches have Triton's kernel, grid and arguments, for all that Triton specialises on."""
    found = {}
    x, alpha, out = torch.zeros(64), torch.zeros(4, 1), torch.zeros(64)
    base = {"real": x, "fake": x, "alpha": alpha, "out": out, "rows": 3, "width": 5, "tiles": 7, "real_stride": 5,
            "fake_stride": 5}  # fmt: skip
    variants = {
        "plain": {},
        "real misaligned": {"real": x[1:]},
        "fake misaligned": {"fake": x[1:]},
        "out misaligned": {"out": out[1:]},
        "another aligned": {"real": x[4:]},
        "half": {"real": x.half()},
        "bfloat16": {"real": x.bfloat16()},
        "double": {"alpha": alpha.double()},
        "one row": {"rows": 1},
        "one tile": {"tiles": 1},
        "width of 16": {"width": 16},
        "width of 32": {"width": 32},
        "stride of 1": {"fake_stride": 1},
        "64-bit stride": {"real_stride": 2**31 + 1},
        "aligned 64-bit stride": {"real_stride": 2**31 + 16},
        "last 32-bit stride": {"real_stride": 2**31 - 1},
        "another tile": {"ROWS": 2, "COLS": 64},
        "the same tile": {"ROWS": 4, "COLS": 32},
        "vectors": {"VECTOR": 4},
    }
    kernel = interpolation.interpolate_kernel
    with null_device(TARGET) as launches:
        seen = []
        for _ in range(2):  # in the second round all are compiled, and each must find its own kernel
            for name, changes in variants.items():
                values = tuple({**base, "ROWS": 4, "COLS": 32, "VECTOR": 1, **changes}.values())
                with counted_runs() as runs:
                    launch.launch(kernel, 6, values[:4], values[4:9], (), values[9:])
                launch._launch_by_triton(kernel, 6, *values)
                direct, by_triton = launches[-2:]
                seen.append(by_triton.compiled)
                found[name] = {
                    "runs": len(runs),
                    "kernel": direct.compiled is by_triton.compiled,
                    "call": direct.grid == by_triton.grid
                    and all(a is b for a, b in zip(direct.values, by_triton.values, strict=True)),
                    "shared": next(n for n, other in zip(variants, seen, strict=False) if other is by_triton.compiled),
                }
    return found


def kernel_variants():
    """The number of kernels for rows of all widths that fit one tile, with all strides; and at all addresses too."""
    with null_device(TARGET) as launches:
        for width in range(65, 129):
            for gap in (0, 3, 4, 16):
                rows = torch.zeros(4, width + gap)[:, :width]
                kernels.interpolate(rows, rows, torch.rand(4, 1))
        aligned = len({id(each.compiled) for each in launches})
        for offset in range(1, 5):
            rows = torch.zeros(4, 104)[:, offset : 100 + offset]
            kernels.interpolate(rows, rows, torch.rand(4, 1))
    return [aligned, len({id(each.compiled) for each in launches})]


def compiled_entries():
    """Entries kept after more shapes than the limit; how many of two launches of the last shape go through Triton."""
    with null_device(TARGET), mock.patch.object(launch, "_MOST_COMPILED", 5):
        for width in range(1, 20):
            kernels.interpolate(torch.randn(4, width), torch.randn(4, width), torch.rand(4, 1))
        with counted_runs() as runs:
            for _ in range(2):
                kernels.interpolate(torch.randn(4, width), torch.randn(4, width), torch.rand(4, 1))
    return [len(launch._compiled), len(runs)]


@contextmanager
def counted_runs():
    """The launches through Triton's own `run`."""
    runs, run = [], jit.JITFunction.run

    def counted(self, *args, **kwargs):
        runs.append(self)
        return run(self, *args, **kwargs)

    with mock.patch.object(jit.JITFunction, "run", counted):
        yield runs


def hooked_launches():
    """How many of two launches go through Triton's own `run` with hooks, debugging, or an unknown release."""
    found, calls = {}, []
    with null_device(TARGET):
        kernels.interpolate(*batch())  # compiles

    def count(name):
        calls.clear()
        with null_device(TARGET), counted_runs() as runs:
            for _ in range(2):
                kernels.interpolate(*batch())
        found[name] = len(runs)

    count("plain")
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, name)
        chain.add(calls.append)
        count(name)
        chain.remove(calls.append)
    interpolation.interpolate_kernel.add_pre_run_hook(lambda *args, **kwargs: calls.append(args))
    count("pre_run_hook")
    found["pre_run_hook called"] = len(calls)
    interpolation.interpolate_kernel.pre_run_hooks.clear()
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        count("debug")
    with knobs.compilation.scope():
        knobs.compilation.instrumentation_mode = "unknown"
        with mock.patch.object(jit.JITFunction, "run", return_value=None):
            count("instrumented")
    with mock.patch.object(launch, "DIRECT", False):
        count("unknown release")
    count("plain again")
    return found


if __name__ == "__main__":
    main()
