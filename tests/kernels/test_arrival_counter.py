"""Counters of arrived programs: zeroed memory of its own for each launch, which no other launch or stream shares."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fused_gp.kernels import launch


@pytest.fixture
def device(monkeypatch):
    """A fake GPU, whose memory is the CPU's."""
    device = SimpleNamespace(stream=0, capturing=False)
    zeros = torch.zeros
    monkeypatch.setattr(launch, "_zeroed", {})
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    module = SimpleNamespace(current_device=lambda: 0, is_current_stream_capturing=lambda: device.capturing)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    active = SimpleNamespace(get_current_stream=lambda index: device.stream)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    device.arrival_counter = lambda: launch.arrival_counter(torch.device("cuda", 0))
    return device


def test_every_launch_gets_a_counter_of_its_own(device):
    counters = [device.arrival_counter() for _ in range(3 * launch._LAUNCHES)]
    assert len({counter.data_ptr() for counter in counters}) == len(counters)
    assert len({counter.data_ptr() % 16 for counter in counters}) == 1
    assert all(counter.dtype == torch.int32 and counter[0] == 0 for counter in counters)
    assert len({counter.untyped_storage().data_ptr() for counter in counters}) == 3  # one memset each


def test_streams_do_not_share_a_memset(device):
    """A memset is ordered before the launches on its own stream only."""
    memsets = []
    for device.stream in (7, 8, 7, 8):
        memsets.append(device.arrival_counter().untyped_storage().data_ptr())
    assert memsets[:2] == memsets[2:]
    assert memsets[0] != memsets[1]


def test_a_captured_launch_has_its_memset_in_the_graph(device):
    eager = device.arrival_counter()
    device.capturing = True
    captured = [device.arrival_counter() for _ in range(3)]
    device.capturing = False
    memsets = {counter.untyped_storage().data_ptr() for counter in (eager, *captured)}
    assert len(memsets) == 4
    assert device.arrival_counter().untyped_storage().data_ptr() == eager.untyped_storage().data_ptr()


def test_threads_on_one_stream_get_different_counters(device):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            calls = [threads.submit(lambda: [device.arrival_counter() for _ in range(500)]) for _ in range(16)]
            counters = [counter for call in calls for counter in call.result()]
    finally:
        sys.setswitchinterval(interval)
    assert len({counter.data_ptr() for counter in counters}) == len(counters)
