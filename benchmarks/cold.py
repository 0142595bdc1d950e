"""A device's time of a step whose inputs are in no cache: a replay of a graph of many calls, over copies of the inputs.

Launched one by one, an op of a few microseconds is timed by its host; called again on the same tensors, by the cache.
"""

from collections.abc import Callable, Sequence

import torch

from benchmarks.timing import CYCLES_PER_SECOND, Step

LEAST_CALLS = 10  # in a graph
MOST_COPIES = 1024  # of the inputs: smaller ones than that part of the cache stay in it, and then a few do
FEW_COPIES = 16
CACHES = 3  # as many times the last cache is what the copies of one tensor take together
QUEUED = 2e-4  # seconds for which the device is kept busy, while the host puts the graph into the queue


def copies_needed(size: int, device: str) -> int:
    """Of inputs with tensors of so many bytes, of which a step may read one alone; the inputs themselves included."""
    needed = _needed(size, device)
    return FEW_COPIES if needed > MOST_COPIES else max(2, needed)


def is_cold(size: int, device: str) -> bool:
    """Whether so many copies leave the cache before their turn comes again."""
    return _needed(size, device) <= MOST_COPIES


def _needed(size: int, device: str) -> int:
    cache = torch.get_device_module(device).get_device_properties(device).L2_cache_size
    return int(-(-CACHES * cache // size))


def replays(steps: Sequence[Step], device: str) -> Callable[[], float]:
    """The same step on each copy of the inputs, captured. What it returns replays them, and says the seconds of one."""
    module = torch.get_device_module(device)
    calls = [step for _ in range(-(-LEAST_CALLS // len(steps))) for step in steps]
    side = module.Stream()
    side.wait_stream(module.current_stream())
    with module.stream(side):
        for step in steps[:2]:  # what is allocated or loaded at a first call cannot be captured
            step()
    module.current_stream().wait_stream(side)
    module.synchronize()
    graph = module.CUDAGraph()
    with module.graph(graph):
        # What a call returns is kept until the end, so that each call writes to memory of its own, as it reads.
        kept = [step() for step in calls]
    del kept

    def seconds() -> float:
        begin, end = (module.Event(enable_timing=True) for _ in range(2))
        module._sleep(int(QUEUED * CYCLES_PER_SECOND))
        begin.record()
        graph.replay()
        end.record()
        module.synchronize()
        return 1e-3 * float(begin.elapsed_time(end)) / len(calls)

    seconds()
    return seconds
