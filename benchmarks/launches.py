"""How many kernels, copies and fills a step puts on a device, and how long they take together, by torch's profiler."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "benchmarks.launches: "


def of(steps: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    """By name, from one session of the profiler: a step's are those that begin while it runs, synchronised.

    `busy_ms` has no gaps, other than the time between two events; what runs at once counts twice.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as session:
        for name, step in steps.items():
            torch.cuda.synchronize()
            with record_function(MARK + name):
                step()
                torch.cuda.synchronize()
    events = session.events() or []
    # Marks, and those that the compiler sets around its graphs, are on the device's side too, around what is inside.
    on_device = [
        event.time_range
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation and not event.name.startswith(MARK)
    ]
    found = {}
    for event in events:
        if event.name.startswith(MARK) and event.device_type == DeviceType.CPU:
            inside = [at for at in on_device if event.time_range.start <= at.start <= event.time_range.end]
            busy = sum(at.elapsed_us() for at in inside)
            found[event.name.removeprefix(MARK)] = {"launches": len(inside), "busy_ms": 1e-3 * busy}
    return found
