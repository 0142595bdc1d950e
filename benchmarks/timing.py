"""Time steps, interleaved."""

import gc
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

Clock = Callable[[], float]
Step = Callable[[], object]

SHORTEST_TIMING = 2e-3  # seconds: far above the clock's resolution
ROUNDS = (9, 101)  # at least, at most
LONGEST_QUEUE = 0.1  # seconds: for the host to put a step into the queue, which holds about a thousand launches
CYCLES_PER_SECOND = 2e9  # of the fastest clocks; on slower ones the device only stays busy for longer


class Timing(NamedTuple):
    """Of one step, seconds: by the clock; of the host alone and of the device alone, where there is one. And the bytes
    of memory that the system handed out afresh, each page with a fault.
    """

    total: float
    host: float | None
    device: float | None
    fresh: float


def seconds(step: Step, device: str, steps: int = 1, clock: Clock = time.perf_counter) -> float:
    """Of one step, the device's work included."""
    synchronize(device)
    start = clock()
    for _ in range(steps):
        step()
    synchronize(device)
    return (clock() - start) / steps


def timing(
    step: Step, device: str, steps: int, clock: Clock = time.perf_counter, replay: Callable[[], float] | None = None
) -> Timing:
    """The device's own time is that of `replay`, where there is one. Else it is that between two events on its stream,
    and has gaps wherever the host is slower. So the device is kept busy until all the work is in its queue; meanwhile
    the host does not wait either.
    """
    faults = _page_faults()
    total = seconds(step, device, steps, clock)
    fresh = (_page_faults() - faults) * resource.getpagesize() / steps
    if device == "cpu":
        return Timing(total, None, None, fresh)
    module = torch.get_device_module(device)
    begin, end = (module.Event(enable_timing=True) for _ in range(2))
    module._sleep(int(min(2 * total * steps, LONGEST_QUEUE) * CYCLES_PER_SECOND))
    begin.record()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    host = time.perf_counter() - start
    end.record()
    module.synchronize()
    busy = 1e-3 * begin.elapsed_time(end) / steps if replay is None else replay()
    return Timing(total, host / steps, busy, fresh)


def interleaved(
    steps: Mapping[str, Step], device: str, budget: float, rounds: int | None = None, clock: Clock = time.perf_counter,
    replays: Mapping[str, Callable[[], float]] | None = None, least: int = ROUNDS[0],
) -> tuple[dict[str, int], dict[str, list[Timing]]]:  # fmt: skip
    """Rounds of one timing of each, in random order, for about `budget` seconds: a change of the machine's speed
    affects all, and none always runs after the same other one.

    A timing takes as many steps as fill SHORTEST_TIMING: with one number for all, the fastest, such as the two ops
    alone, would make a slow critic run dozens of steps. Returns these numbers, and the timings. `replays` are those of
    `cold`, by which the device's own time is taken.
    """
    number = {name: _steps(step, device, clock) for name, step in steps.items()}
    names = list(steps)
    order = random.Random(0)
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    start = time.perf_counter()
    least, most = (least, ROUNDS[1]) if rounds is None else (rounds, rounds)
    with _no_garbage_collection():
        for done in range(most):
            if done >= least and time.perf_counter() - start > budget:
                break
            order.shuffle(names)
            for name in names:
                timings[name].append(timing(steps[name], device, number[name], clock, (replays or {}).get(name)))
    return number, timings


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Of cycles, in the middle of a step; between cases it runs."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _steps(step: Step, device: str, clock: Clock) -> int:
    step()  # once more after the first call: caches, and what is only set up at the second
    once = seconds(step, device, clock=clock)
    if once < 50 * SHORTEST_TIMING:  # one call alone may have met a busy moment
        once = min(once, *(seconds(step, device, clock=clock) for _ in range(2)))
    return max(1, round(SHORTEST_TIMING / once))


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
