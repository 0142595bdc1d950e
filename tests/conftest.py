"""Where the tests run (torch, Triton's interpreter, a real device), and NaN in every tensor nobody has written to."""

import os
import sys
from typing import NamedTuple

import pytest
import torch


def pytest_configure(config):
    # The kernels become interpreted or compiled ones when they are imported. With `-m gpu` they are compiled. Nothing
    # may have imported Triton before, as torch._dynamo does.
    assert "triton" not in sys.modules
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA or ROCm device, and there is none")
        if os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("the kernels are interpreted in this run: `make test-gpu` runs them on the device")


class Place(NamedTuple):
    backend: str
    device: str


PLACES = [
    pytest.param(Place("torch", "cpu"), id="torch"),
    pytest.param(Place("triton", "cpu"), id="interpreter"),
    pytest.param(Place("triton", "cuda"), id="device", marks=pytest.mark.gpu),
]


@pytest.fixture(params=PLACES)
def place(request):
    """A backend, and the device on which it is tested."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors: threads that wait for one another on busy cores would only make a file slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_memory(request, monkeypatch):
    """Memory that was not written to holds NaN, so that reading it cannot go unnoticed."""
    if request.node.get_closest_marker("compiles"):
        return

    def poisoned(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


# For tests in which torch's compiler runs. The warnings are of its own doing; the first it hides from whoever has not
# made errors of warnings.
COMPILES = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _no_graph_is_known(request):
    """To the compiler, from another test, or to another from this one."""
    compiles = request.node.get_closest_marker("compiles")
    if compiles:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    yield
    if compiles:
        torch._dynamo.reset()


class Graphs:
    """A compiler that compiles nothing, and keeps whether each graph it saw had symbols among its sizes."""

    def __init__(self):
        self.symbolic = []

    def __call__(self, graph, inputs, options=None):
        sizes = [size for x in inputs if isinstance(x, torch.Tensor) for size in x.shape]
        self.symbolic.append(any(isinstance(size, torch.SymInt) for size in [*inputs, *sizes]))
        if options is None:
            return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, inputs)
        from torch._dynamo.backends.common import aot_autograd
        from torch._dynamo.backends.debugging import boxed_nop

        # The same, with a split of forward and backward that is not the usual one.
        split = options["custom_partitioner_fn"]
        aot_eager = aot_autograd(fw_compiler=boxed_nop, partition_fn=split, keep_inference_input_mutations=True)
        return aot_eager(graph, inputs)
