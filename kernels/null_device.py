"""A device that runs nothing: Triton compiles for a GPU that need not exist, and every launch is recorded instead.

    with null_device(GPUTarget("cuda", 90, 32)) as launches:
        kernels.interpolate(real, fake, alpha)  # tensors on the CPU; the result is not computed
    launches[0].name, launches[0].grid, launches[0].arguments["real"], launches[0].compiled.asm["ptx"]

For tests and benchmarks on machines without a GPU: which kernels are launched with which arguments, and the host time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import count
from math import inf
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .interpolation import interpolate_kernel
from .launch import is_interpreted

MAX_THREADS = 1024  # of a program, on NVIDIA and AMD


class Launch(NamedTuple):
    """Triton's compiled kernel (`.asm`, `.metadata`), the grid, and the values of the kernel's parameters in order."""

    compiled: Any
    grid: tuple[int, int, int]
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.compiled.src.fn.__name__

    @property
    def arguments(self) -> dict[str, Any]:
        """Tensors, numbers and None, by the names of the parameters that are no `tl.constexpr`."""
        return {name: value for name, value, is_constexpr in self._parameters() if not is_constexpr}

    @property
    def constexprs(self) -> dict[str, Any]:
        """The values of the `tl.constexpr` parameters, by name."""
        return {name: value for name, value, is_constexpr in self._parameters() if is_constexpr}

    def _parameters(self) -> Iterator[tuple[str, Any, bool]]:
        params = self.compiled.src.fn.params
        return ((p.name, value, p.is_constexpr) for p, value in zip(params, self.values, strict=True))


@contextmanager
def null_device(target: GPUTarget, index: int = 0) -> Iterator[list[Launch]]:
    """Inside, in all threads, Triton's current device is one of `target` that launches nothing. Yields the launches.

    Kernels are compiled once per process for each pair of target and index.

    Raises:
        RuntimeError: the kernels are interpreted: TRITON_INTERPRET=1 was set when they were imported.
    """
    if is_interpreted(interpolate_kernel):
        raise RuntimeError(
            "null_device records launches of compiled kernels, but these are interpreted: TRITON_INTERPRET=1 was set "
            "when fused_gp.kernels was imported"
        )
    former = driver._active  # `driver.active` would look for a real device
    null = _NullDriver(target, _device(target, index))
    driver.set_active(null)
    try:
        yield null.launches
    finally:
        driver.set_active(former)


def is_null() -> bool:
    """Whether Triton's current device is a null device."""
    return isinstance(driver._active, _NullDriver)


_below_zero = count(-1, -1)


@cache
def _device(target: GPUTarget, index: int) -> int:
    """The device number under which Triton keeps its compiled kernels: never a real device's."""
    return next(_below_zero)


class _NullDriver:
    """The parts of a Triton driver that `JITFunction.run` and `CompiledKernel` use, in Triton 3.5 to 3.8."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target, self.device = target, device
        self.launches: list[Launch] = []
        self.launcher_cls = _Recorder
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": inf},
            # module (None: nothing to unload), function, registers, spills (unknown) and threads of a program
            load_binary=lambda name, binary, shared, device: (None, None, None, None, MAX_THREADS),
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder:
    """In place of a compiled kernel's launcher."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.src, self.device = src, driver.active.get_current_device()

    @cached_property
    def compiled(self) -> Any:
        kernels = self.src.fn.device_caches[self.device][0].values()
        return next(kernel for kernel in kernels if kernel._run is self)

    def __call__(
        self, grid_x: int, grid_y: int, grid_z: int, stream: int, function: Any, packed_metadata: Any,
        launch_metadata: Any, enter_hook: Any, exit_hook: Any, *values: Any,
    ) -> None:  # fmt: skip
        driver.active.launches.append(Launch(self.compiled, (grid_x, grid_y, grid_z), values))
