"""What is launched where kernels are compiled, not interpreted; printed as one JSON object, a member for each question.

Run by test_null_device.py in a process of its own, on a null device.
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
    questions = (ops, penalties, lone, drivers, refusal, devices, elsewhere, current, fast, variants, many, watched)
    print(json.dumps({question.__name__: question() for question in questions}))


class Steps:
    """The kernels launched in each step of a computation, by the step's name."""

    def __init__(self, launches):
        self.launches, self.names = launches, {}

    def __call__(self, name, result):
        self.names[name] = [launch.name.removesuffix("_kernel") for launch in self.launches]
        self.launches.clear()
        return result


def gradient(of, at):
    return torch.autograd.grad([x.sum() for x in of], at, create_graph=True)


def ops():
    """Forward, backward and double backward of each op, of one tensor and of two."""
    answers = {}
    for count in (1, 2):
        x, y, u = ([torch.randn(4, 6, requires_grad=True) for _ in range(count)] for _ in range(3))
        alpha = torch.rand(4, 1)
        with null_device(TARGET) as launches:
            step = answers[f"interpolate, {count}"] = Steps(launches)
            x_hat = step("forward", interpolate(tuple(x), tuple(y), alpha, backend="triton"))
            grads = step("backward", torch.autograd.grad(x_hat, [*x, *y], u, create_graph=True))
            step("double", torch.autograd.grad(grads, u, [torch.ones_like(g) for g in grads]))
        for form in ({}, {"one_sided": True, "reduction": "none"}, {"squared": True}):
            with null_device(TARGET) as launches:
                step = answers[f"penalty {form}, {count}"] = Steps(launches)
                value = step("forward", gradient_norm_penalty(tuple(x), backend="triton", **form))
                a = torch.ones_like(value, requires_grad=True)
                step("backward alone", torch.autograd.grad(value, x, a, retain_graph=True))
                grads = step("backward", torch.autograd.grad(value, x, a, create_graph=True))
                step("double", torch.autograd.grad(grads, [*x, a], u))
    return {name: step.names for name, step in answers.items()}


def penalties():
    """The whole penalty, to the critic's weights, to the generator's, and differentiated once more."""
    critic = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    weights = list(critic.parameters())[:-1]
    real, fake = torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    answers = {}
    with null_device(TARGET) as launches:
        step = answers["penalty"] = Steps(launches)
        value = step("forward", fused_gradient_penalty(critic, real, fake.detach(), backend="triton"))
        step("backward", torch.autograd.grad(value, weights))
        step = answers["attached"] = Steps(launches)
        value = step("forward", fused_gradient_penalty(critic, real, fake, backend="triton"))
        step("backward", torch.autograd.grad(value, [*weights, fake]))
        step = answers["twice"] = Steps(launches)
        value = step("forward", fused_gradient_penalty(critic, real, fake.detach(), backend="triton"))
        grads = step("backward", torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True))
        step("double", torch.autograd.grad(sum(g.sum() for g in grads), weights, materialize_grads=True))
        step = answers["r1"] = Steps(launches)
        value = step("forward", r1_penalty(critic, real, backend="triton"))
        step("backward", torch.autograd.grad(value, weights))
        step = answers["two inputs"] = Steps(launches)
        value = step("forward", fused_gradient_penalty(Both(critic), (real, real), (real, real), backend="triton"))
        step("backward", torch.autograd.grad(value, weights))
    return {name: step.names for name, step in answers.items()}


class Both(torch.nn.Module):
    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, inputs):
        return self.critic(inputs[0] + 2 * inputs[1])


def lone():
    """What a reduction's programs meet in, by how many programs there are."""
    met = {}
    for shape in ((2, 4), (64, 2), (3, 1500), (1, 9000)):
        for reduction in ("mean", "none"):
            with null_device(TARGET) as launches:
                gradient_norm_penalty(torch.randn(shape), reduction=reduction, backend="triton")
            given = launches[0].arguments
            met[f"{shape}, {reduction}"] = [
                launches[0].grid[0],
                None if given["partials"] is None else given["partials"].numel(),
                given["arrived"] is not None,
            ]
    return met


def drivers():
    """Which driver is active before, in and after a null device that an error ends, and in one inside another."""
    before = driver._active
    kinds = []
    with null_device(TARGET) as outer:
        first = driver._active
        with null_device(TARGET, 1) as inner:
            kernels.interpolate(*batch())
        kinds.append([len(outer), len(inner), driver._active is first, driver.active.get_current_target() == TARGET])
    try:
        with null_device(TARGET):
            raise KeyError
    except KeyError:
        kinds.append(driver._active is before)
    return kinds


def refusal():
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


def elsewhere():
    """How many of two launches on tensors of a real device are recorded: it is not looked for, nor made current."""
    with null_device(TARGET) as launches, mock.patch.object(torch.Tensor, "get_device", return_value=0):
        for _ in range(2):
            kernels.interpolate(*batch())
    return len(launches)


def current():
    """The device and the stream that two launches go to, while another device than the tensors' is current."""
    where = []

    @contextmanager
    def made_current(device):
        former, driver.active.device = driver.active.device, 1
        yield
        driver.active.device = former

    def record(self, x, y, z, stream, *_):
        where.append([driver.active.get_current_device(), stream])

    with (
        null_device(TARGET),
        mock.patch.object(driver.active, "device", 0),
        mock.patch.object(driver.active, "get_current_stream", lambda device: 70 + device),
        mock.patch.object(torch.Tensor, "get_device", return_value=1),
        mock.patch.object(launch, "_on_device", made_current),
        mock.patch.object(_Recorder, "__call__", record),
    ):
        for _ in range(2):  # by Triton, which compiles; directly
            kernels.interpolate(*batch())
        where.append(driver.active.device)
    return where


def batch():
    return torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 1)


def fast():
    """For launches that differ in what Triton specialises on: does `launch`, when it knows them, what Triton does?"""
    answers = {}
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
        for _ in range(2):  # the second time through, all is known, and nothing of one variant may serve another
            for name, changes in variants.items():
                values = tuple({**base, "ROWS": 4, "COLS": 32, "VECTOR": 1, **changes}.values())
                with counted_runs() as runs:
                    launch.launch(kernel, 6, values[:4], values[4:9], (), values[9:])
                launch._launch_by_triton(kernel, 6, *values)
                ours, tritons = launches[-2:]
                seen.append(tritons.compiled)
                answers[name] = {
                    "runs": len(runs),
                    "kernel": ours.compiled is tritons.compiled,
                    "call": ours.grid == tritons.grid
                    and all(a is b for a, b in zip(ours.values, tritons.values, strict=True)),
                    "shared": next(n for n, other in zip(variants, seen, strict=False) if other is tritons.compiled),
                }
    return answers


def variants():
    """How many kernels serve rows of all widths that one tile holds, at all distances, and at all addresses."""
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


def many():
    """Launches that are known, after more shapes than are kept; and how many of two of the last shape Triton makes."""
    with null_device(TARGET), mock.patch.object(launch, "_MOST_COMPILED", 5):
        for width in range(1, 20):
            kernels.interpolate(torch.randn(4, width), torch.randn(4, width), torch.rand(4, 1))
        with counted_runs() as runs:
            for _ in range(2):
                kernels.interpolate(torch.randn(4, width), torch.randn(4, width), torch.rand(4, 1))
    return [len(launch._compiled), len(runs)]


@contextmanager
def counted_runs():
    """The calls of Triton's own way to launch."""
    runs, run = [], jit.JITFunction.run

    def counted(self, *args, **kwargs):
        runs.append(self)
        return run(self, *args, **kwargs)

    with mock.patch.object(jit.JITFunction, "run", counted):
        yield runs


def watched():
    """How many of two launches go Triton's own way where somebody watches, or the release is unknown."""
    answers, calls = {}, []
    with null_device(TARGET):
        kernels.interpolate(*batch())  # compiles

    def count(name):
        calls.clear()
        with null_device(TARGET), counted_runs() as runs:
            for _ in range(2):
                kernels.interpolate(*batch())
        answers[name] = len(runs)

    count("plain")
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, name)
        chain.add(calls.append)
        count(name)
        chain.remove(calls.append)
    interpolation.interpolate_kernel.add_pre_run_hook(lambda *args, **kwargs: calls.append(args))
    count("pre_run_hook")
    answers["pre_run_hook called"] = len(calls)
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
    return answers


if __name__ == "__main__":
    main()
