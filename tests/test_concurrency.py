"""The last program's reduction in every order: programs interleaved between memory operations, in a weak memory.

The kernel itself runs, under Triton's interpreter, each program in a thread of its own. A seeded scheduler passes the
turn on at every load, store, barrier and atomic. Memory keeps every value that was stored since the launch. What a
thread of a GPU may load of them follows from its view, the oldest value of each address that it still may see, and it
gets any that is not older:

    store       adds a value, and puts it in the view of the thread that stores
    barrier     joins the views of a program's threads
    atomic      reads and replaces the newest value. As a release it leaves its thread's view beside it; as an acquire
                it joins its thread's view with those left there

A program has two threads here, one that loads and stores and one that makes the atomics: which thread does what is
Triton's choice, and only a barrier orders one thread's accesses before another's. After an atomic Triton puts a barrier
of its own, as test_compile_only.py sees in the compiled code.
"""

import inspect
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fused_gp import arguments

pytest.importorskip("triton", reason="Triton is not installed")

from triton._C.libtriton import ir
from triton.runtime import interpreter

from fused_gp.kernels import launch, norm_penalty
from fused_gp.kernels.tiles import reduction_tile

pytestmark = pytest.mark.usefixtures("one_thread")

ORDERS = 6


class Aborted(BaseException):
    """The launch is stopped from outside."""


class Program(threading.Thread):
    """One program of a launch; it rests before each memory operation until it is its turn."""

    def __init__(self, kernel, index, programs, view):
        super().__init__(daemon=True)
        self.kernel, self.index, self.programs = kernel, index, programs
        self.accesses, self.arrives = dict(view), dict(view)  # its threads' views: address -> number of a value
        self.turn, self.rest = threading.Semaphore(0), threading.Semaphore(0)
        self.error = None
        self.aborted = self.done = False

    def run(self):
        self.turn.acquire()
        try:
            if not self.aborted:
                self.kernel()
        except Aborted:
            pass
        except Exception as error:
            self.error = error
        self.done = True
        self.rest.release()

    def step(self):
        """On to the next memory operation, or to the end."""
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(self.programs, 1, 1)
        builder.set_grid_idx(self.index, 0, 0)
        self.turn.release()
        self.rest.acquire()
        if self.error is not None:
            raise self.error

    def pause(self):
        self.rest.release()
        self.turn.acquire()
        if self.aborted:
            raise Aborted

    def abort(self):
        self.aborted = True
        self.turn.release()
        self.join()

    def barrier(self):
        view = join(self.accesses, self.arrives)
        self.accesses, self.arrives = view, dict(view)


def join(one, two):
    return one | {address: max(number, one.get(address, 0)) for address, number in two.items()}


class Machine:
    """A weak memory, and the programs that run on it. `lost` names what this machine fails to do."""

    def __init__(self, seed, lost=()):
        self.draw, self.lost = random.Random(seed), lost
        self.values = {}  # address -> what it held before the first store, and after each
        self.left = {}  # address of an atomic -> the view that releases have left there
        self.stored_by = {}  # address -> the programs that stored to it
        self.running = None

    def run(self, *streams, abort_after=None):
        """Each stream's launches one after the other, those of different streams at once. Returns the steps taken."""
        streams = [SimpleNamespace(launches=list(launches), programs=[], seen={}) for launches in streams]
        steps = 0
        while True:
            for stream in streams:
                if stream.launches and not stream.programs:  # the end of a launch is seen by the next one
                    stream.programs = stream.launches.pop(0)(stream.seen)
                    for program in stream.programs:
                        program.start()
            ready = [(stream, program) for stream in streams for program in stream.programs]
            if not ready or steps == abort_after:
                for _, program in ready:
                    program.abort()
                return steps
            stream, self.running = self.draw.choice(ready)
            self.running.step()
            steps += 1
            if self.running.done:
                stream.programs.remove(self.running)
                stream.seen = join(stream.seen, join(self.running.accesses, self.running.arrives))

    def load(self, pointers, mask, other, dtype):
        self.running.pause()
        result = interpreter._interpreter.load(pointers, mask, other, dtype)
        view = self.running.accesses
        for lane in np.flatnonzero(mask & np.isin(pointers, list(self.values))):
            address = int(pointers.flat[lane])
            view[address] = self.draw.randrange(view.get(address, 0), len(self.values[address]))
            result.flat[lane] = self.values[address][view[address]]
        return result

    def store(self, pointers, data, mask):
        self.running.pause()
        before = interpreter._interpreter.load(pointers, mask, np.zeros_like(data), data.dtype)
        interpreter._interpreter.store(pointers, data, mask)
        for lane in np.flatnonzero(mask):
            address = int(pointers.flat[lane])
            values = self.values.setdefault(address, [before.flat[lane]])
            values.append(data.flat[lane])
            self.running.accesses[address] = len(values) - 1
            self.stored_by.setdefault(address, []).append(self.running.index)

    def barrier(self):
        self.running.pause()
        if "barrier" not in self.lost:
            self.running.barrier()

    def atomic(self, operate, pointers, sem, scope):
        self.running.pause()
        address = int(pointers.item())
        before = operate()
        if scope != ir.MEM_SYNC_SCOPE.CTA:
            left, both = self.left.get(address, {}), ir.MEM_SEMANTIC.ACQUIRE_RELEASE
            if sem in (ir.MEM_SEMANTIC.ACQUIRE, both) and "acquire" not in self.lost:
                self.running.arrives = join(self.running.arrives, left)
            if sem in (ir.MEM_SEMANTIC.RELEASE, both) and "release" not in self.lost:
                self.left[address] = join(left, self.running.arrives)
        self.running.barrier()  # Triton's own
        return before


@contextmanager
def weak_memory(seed, lost=()):
    """The interpreter's memory operations are those of the machine."""
    builder, machine = interpreter.InterpreterBuilder, Machine(seed, lost)
    rmw = builder.create_atomic_rmw

    def load(self, pointers, mask, other, *_):
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        other = np.zeros(pointers.data.shape, dtype) if other is None else other.data
        return interpreter.TensorHandle(machine.load(pointers.data, mask.data, other, dtype), element)

    def store(self, pointers, value, mask, *_):
        machine.store(pointers.data, value.data, mask.data)

    def atomic(self, operation, pointer, value, mask, sem, scope):
        return machine.atomic(lambda: rmw(self, operation, pointer, value, mask, sem, scope), pointer.data, sem, scope)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(builder, "create_masked_load", load)
        patches.setattr(builder, "create_masked_store", store)
        patches.setattr(builder, "create_atomic_rmw", atomic)
        patches.setattr(builder, "create_barrier", lambda self: machine.barrier())
        patched = interpreter._patch_lang(norm_penalty.reduce_rows_kernel.fn)
        try:
            yield machine
        finally:
            patched.restore()


def recorded(function, *args):
    """What a launcher returns, not yet written, and its launches, each a function from a view to the programs."""
    launches = []

    def record(kernel, programs, *args):
        function = kernel.rewrite()
        constexprs = interpreter.GridExecutor(function, kernel.arg_names, (programs,)).constexprs
        given = inspect.getcallargs(function, *chain.from_iterable(args))  # with the tensors, which must not be freed

        def run():
            function(**{n: v if n in constexprs else interpreter._implicit_cvt(v) for n, v in given.items()})

        def start(view):
            return [Program(run, index, programs, view) for index in range(programs)]

        launches.append(start)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(norm_penalty, "launch", record)
        return function(*args), launches


def forward(tensors, form):
    return norm_penalty.penalty_forward(tensors, form)


def double_backward(tensors, form):
    """Its reduction: the dots, from which the scaling goes on, and the gradient of the upstream factor."""
    norms = torch.linspace(0.5, 2.0, form.rows, dtype=torch.float32)
    dots, upstream_grad = torch.empty_like(norms), norms.new_empty(() if form.reduce else norms.shape)
    norm_penalty._reduce_rows(tensors, [g.flip(1) for g in tensors], norms, dots, upstream_grad, form)
    return upstream_grad, dots


# Rows summed by one program each; several rows in a program; rows split over few and over many programs; a row in three
# tensors, the first and the last of them split.
WIDTHS = {
    "rows": (9, [1500]),
    "tiles": (64, [300]),
    "split": (3, [9001]),
    "split much": (1, [40000]),
    "several": (2, [9001, 700, 9001]),
}


def problem(widths, reduction="mean"):
    rows, widths = WIDTHS[widths]
    tensors = [torch.randn(rows, width) for width in widths]
    return tensors, arguments.penalty_form(len(tensors[0]), 1.0, False, 1e-12, 1.0, reduction, False)


def same(results, expected):
    return all(one.equal(two) for one, two in zip(results, expected, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("function", [forward, double_backward])
def test_every_order_gives_the_same_bits(function, widths, reduction):
    args = problem(widths, reduction)
    expected = function(*args)
    assert all(result.isfinite().all() for result in expected)
    finishers = set()
    for seed in range(ORDERS):
        results, launches = recorded(function, *args)
        with weak_memory(seed) as machine:
            machine.run(launches)
        assert same(results, expected), f"order {seed}"
        for result in results:
            for address in range(result.data_ptr(), result.data_ptr() + result.nbytes, result.element_size()):
                assert len(machine.stored_by[address]) == 1  # by the one program that finishes
        finishers |= set(machine.stored_by[results[0].data_ptr()])
    tiling = reduction_tile(*args[0][-1].shape, 4)
    if reduction == "mean" or tiling.splits > 1:
        assert len(finishers) > 1  # the orders differ in which program comes last


@pytest.mark.parametrize("widths", ["tiles", "split"])
@pytest.mark.parametrize("lost", ["barrier", "release", "acquire"])
def test_the_memory_is_weak(lost, widths):
    """The kernel needs each of the three: without it, nearly every order gives something else."""
    args = problem(widths)
    expected = forward(*args)
    wrong = 0
    for seed in range(ORDERS):
        results, launches = recorded(forward, *args)
        with weak_memory(seed, lost) as machine:
            machine.run(launches)
        wrong += not same(results, expected)
    assert wrong > ORDERS // 2


@pytest.mark.parametrize("widths", ["tiles", "split"])
def test_launch_after_launch(widths):
    """On one stream, none of them clearing anything, more of them than one memset serves."""
    args = problem(widths)
    expected = forward(*args)
    kept = [launch.arrival_counter(torch.device("cpu")) for _ in range(launch._LAUNCHES - 2)]
    calls = [recorded(forward, *args) for _ in range(4)]
    with weak_memory(0) as machine:
        machine.run([start for _, launches in calls for start in launches])
    assert all(same(results, expected) for results, _ in calls)
    assert not any(counter.any() for counter in kept)


def share_a_counter(patches):
    counter = torch.zeros(1, dtype=torch.int32)
    patches.setattr(norm_penalty, "arrival_counter", lambda device: counter)


@pytest.mark.parametrize("shared", [False, True])
def test_streams_at_once(shared, monkeypatch):
    """Two launches on each of three streams. They must not share a counter: if they do, this test sees it."""
    args = [problem(widths) for widths in ("tiles", "split", "rows")] * 2
    expected = [forward(*each) for each in args]
    if shared:
        share_a_counter(monkeypatch)
    for seed in range(ORDERS // 2):
        calls = [recorded(forward, *each) for each in args]
        with weak_memory(seed) as machine:
            machine.run(*([*calls[i][1], *calls[i + 3][1]] for i in range(3)))
        right = [same(results, wanted) for (results, _), wanted in zip(calls, expected, strict=True)]
        assert all(right) != shared


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("widths", ["tiles", "split"])
def test_an_aborted_launch_spoils_no_other(widths, shared, monkeypatch):
    """Stopped before any memory operation; the next launch on the stream is right. With a shared counter it is not."""
    args = problem(widths)
    expected = forward(*args)
    if shared:
        share_a_counter(monkeypatch)
    with weak_memory(0) as machine:
        steps = machine.run(recorded(forward, *args)[1])
    spoilt = 0
    for seed in range(ORDERS):
        aborted, (results, launches) = recorded(forward, *args), recorded(forward, *args)
        with weak_memory(seed) as machine:
            machine.run(aborted[1], abort_after=machine.draw.randrange(steps))
            machine.run(launches)
        assert not same(aborted[0], expected)
        spoilt += not same(results, expected)
    assert (spoilt > 0) == shared


@pytest.fixture
def device(monkeypatch):
    """A stand-in for a GPU, whose memory is the CPU's."""
    device = SimpleNamespace(stream=0, capturing=False)
    zeros = torch.zeros
    monkeypatch.setattr(launch, "_zeroed", {})
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    module = SimpleNamespace(current_device=lambda: 0, is_current_stream_capturing=lambda: device.capturing)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    active = SimpleNamespace(get_current_stream=lambda index: device.stream)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    device.arrivals = lambda: launch.arrival_counter(torch.device("cuda", 0))
    return device


def test_every_launch_gets_a_counter_of_its_own(device):
    counters = [device.arrivals() for _ in range(3 * launch._LAUNCHES)]
    assert len({counter.data_ptr() for counter in counters}) == len(counters)
    assert len({counter.data_ptr() % 16 for counter in counters}) == 1
    assert all(counter.dtype == torch.int32 and counter[0] == 0 for counter in counters)
    assert len({counter.untyped_storage().data_ptr() for counter in counters}) == 3  # one memset each


def test_streams_do_not_share_a_memset(device):
    """It is ordered before the launches of the stream it was made on only."""
    memsets = []
    for device.stream in (7, 8, 7, 8):
        memsets.append(device.arrivals().untyped_storage().data_ptr())
    assert memsets[:2] == memsets[2:]
    assert memsets[0] != memsets[1]


def test_a_captured_launch_has_its_memset_in_the_graph(device):
    eager = device.arrivals()
    device.capturing = True
    captured = [device.arrivals() for _ in range(3)]
    device.capturing = False
    memsets = {counter.untyped_storage().data_ptr() for counter in (eager, *captured)}
    assert len(memsets) == 4
    assert device.arrivals().untyped_storage().data_ptr() == eager.untyped_storage().data_ptr()


def test_threads_on_one_stream_get_different_counters(device):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            calls = [threads.submit(lambda: [device.arrivals() for _ in range(500)]) for _ in range(16)]
            counters = [counter for call in calls for counter in call.result()]
    finally:
        sys.setswitchinterval(interval)
    assert len({counter.data_ptr() for counter in counters}) == len(counters)
