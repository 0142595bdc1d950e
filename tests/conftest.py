"""Fixtures for all tests; where the kernels run; NaN in all memory that was allocated and not written."""

import os
import sys
from functools import partial

import pytest
import torch

from tests.support.compiling import Graphs
from tests.support.kernels import interpreter
from tests.support.places import PLACES

LAUNCHES = pytest.StashKey()  # of a test that runs on a device


def pytest_configure(config):
    # The kernels become interpreted or compiled ones when they are imported; `-m gpu`, with or without more conditions,
    # runs compiled ones. So nothing may have imported Triton before, as torch._dynamo does.
    assert "triton" not in sys.modules
    if config.option.markexpr.startswith("gpu"):
        # Two runs of one critic are compared, one of them to the precision of fp32 or fp64.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.mend()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA or ROCm device, and there is none")
        if os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("the kernels are interpreted in this run: `make test-gpu` runs them on the device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that fails on a device tells what it launched."""
    report = yield
    launches = item.stash.get(LAUNCHES, None)
    if report.failed and launches is not None:
        report.sections.append(("kernels launched", str(launches)))
    return report


@pytest.fixture(autouse=True)
def _recorded_launches(request):
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    from tests.support.kernels.launches import LastLaunches  # which imports Triton

    launches = request.node.stash[LAUNCHES] = LastLaunches()
    with launches.recorded():
        yield


@pytest.fixture(params=PLACES)
def place(request):
    """A backend, and the device on which it is tested."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors, where threads that wait for one another on busy cores take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_memory(request, monkeypatch):
    """New memory holds NaN, so that a read before the first write shows in the result."""
    if request.node.get_closest_marker("compiles"):
        return

    def poisoned(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))  # detached, since autograd refuses a write to a leaf
            return tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    """The compiler has no graphs from other tests, and other tests none from this one."""
    compiles = request.node.get_closest_marker("compiles")
    if compiles:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    yield
    if compiles:
        torch._dynamo.reset()


@pytest.fixture
def no_graph_breaks(_fresh_compiler):
    """Whatever the test compiles is compiled as one graph."""
    yield
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture
def graphs():
    return Graphs()


@pytest.fixture
def compiled_graphs(monkeypatch, graphs):
    """The graphs of all calls of torch.compile that name no backend, as method="compiled" makes them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    return graphs
