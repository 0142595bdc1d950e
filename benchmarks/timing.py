"""What every benchmark here measures with."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


def seconds(step: Callable[[], object], device: str, steps: int = 1) -> float:
    """Of one step, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / steps


class Turn(NamedTuple):
    """Seconds of one step: by the clock; of the host alone, and of the device alone, where there is one."""

    wall: float
    host: float | None
    device: float | None


def turn(step: Callable[[], object], device: str, steps: int) -> Turn:
    """The device's own time is that between two events on its stream, and has gaps wherever the host is slower. So the
    device is kept busy until all the work is in its queue; meanwhile the host does not wait either.
    """
    wall = seconds(step, device, steps)
    if device == "cpu":
        return Turn(wall, None, None)
    module = torch.get_device_module(device)
    begin, end = (module.Event(enable_timing=True) for _ in range(2))
    module._sleep(int(2 * wall * steps * CYCLES_PER_SECOND))
    begin.record()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    host = time.perf_counter() - start
    end.record()
    module.synchronize()
    return Turn(wall, host / steps, 1e-3 * begin.elapsed_time(end) / steps)


CYCLES_PER_SECOND = 2e9  # of the fastest clocks; on slower ones the device only stays busy for longer
SHORTEST_TURN = 2e-3  # seconds: far above what the clock can tell
ROUNDS = (9, 101)  # at least, at most


def interleaved(
    steps: Mapping[str, Callable[[], object]], device: str, budget: float, rounds: int | None = None
) -> tuple[dict[str, int], dict[str, list[Turn]]]:
    """Turns of all, round after round, each round in another order, for about `budget` seconds.

    A change of the machine's speed meets all, and nobody always runs in the wake of the same neighbour. Each takes as
    many steps in a turn as fill SHORTEST_TURN: were they as many for all, the fastest, such as the two ops alone, would
    have a slow critic run dozens of steps. Returns these numbers, and the turns.
    """
    names = list(steps)
    number = {}
    for name in names:
        steps[name]()  # once more after the first call: caches, and what is only set up at the second
        once = seconds(steps[name], device)
        if once < 50 * SHORTEST_TURN:  # one call alone may have met a busy moment
            once = min(once, *(seconds(steps[name], device) for _ in range(2)))
        number[name] = max(1, round(SHORTEST_TURN / once))
    order = random.Random(0)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    start = time.perf_counter()
    least, most = ROUNDS if rounds is None else (rounds, rounds)
    for done in range(most):
        if done >= least and time.perf_counter() - start > budget:
            break
        order.shuffle(names)
        for name in names:
            turns[name].append(turn(steps[name], device, number[name]))
    return number, turns


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of theirs / ours, taken round by round."""
    low, median, high = statistics.quantiles([b / a for a, b in zip(ours, theirs, strict=True)], n=4)
    return {"ratio": median, "ratio_low": low, "ratio_high": high}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()
