"""A weak memory: the programs of a launch interleaved between memory operations, in any order a GPU allows.

The kernel itself runs, under Triton's interpreter, each program in a thread of its own. A seeded scheduler picks the
next program at every load, store, barrier and atomic. Memory keeps every value that was stored since the launch. What a
thread of a GPU may load of them follows from its view, the oldest value of each address that it still may see, and it
gets any that is not older:

    store       adds a value, and puts it in the view of the thread that stores
    barrier     joins the views of a program's threads
    atomic      reads and replaces the newest value. As a release it leaves its thread's view beside it; as an acquire
                it joins its thread's view with those left there

A program has two threads here, one that loads and stores and one that runs the atomics: which thread does what is
Triton's choice, and only a barrier orders one thread's accesses before another's. After an atomic Triton puts a barrier
of its own, as test_compile_only.py checks in the compiled code.
"""

import inspect
import random
import threading
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from triton._C.libtriton import ir
from triton.runtime import interpreter

from fused_gp.kernels import norm_penalty


class Aborted(BaseException):
    """The launch is stopped from outside."""


class Program(threading.Thread):
    """One program of a launch; it pauses before each memory operation until the scheduler picks it."""

    def __init__(self, kernel, index, programs, view):
        super().__init__(daemon=True)
        self.kernel, self.index, self.programs = kernel, index, programs
        self.accesses, self.arrives = dict(view), dict(view)  # its threads' views: address -> number of a value
        self.picked, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.error = None
        self.aborted = self.done = False

    def run(self):
        self.picked.acquire()
        try:
            if not self.aborted:
                self.kernel()
        except Aborted:
            pass
        except Exception as error:
            self.error = error
        self.done = True
        self.paused.release()

    def step(self):
        """On to the next memory operation, or to the end."""
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(self.programs, 1, 1)
        builder.set_grid_idx(self.index, 0, 0)
        self.picked.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error

    def pause(self):
        self.paused.release()
        self.picked.acquire()
        if self.aborted:
            raise Aborted

    def abort(self):
        self.aborted = True
        self.picked.release()
        self.join()

    def barrier(self):
        view = joined(self.accesses, self.arrives)
        self.accesses, self.arrives = view, dict(view)


def joined(one, two):
    return one | {address: max(number, one.get(address, 0)) for address, number in two.items()}


class Machine:
    """A weak memory, and the programs that run on it. `lost` names operations that have no effect on this machine."""

    def __init__(self, seed, lost=()):
        self.draw, self.lost = random.Random(seed), lost
        self.values = {}  # address -> what it held before the first store, and after each
        self.left = {}  # address of an atomic -> the view that releases left there
        self.stored_by = {}  # address -> the programs that stored to it
        self.running = None

    def run(self, *streams, abort_after=None):
        """Each stream's launches in order, those of different streams at once. Returns the number of steps."""
        streams = [SimpleNamespace(launches=list(launches), programs=[], seen={}) for launches in streams]
        steps = 0
        while True:
            for stream in streams:
                if stream.launches and not stream.programs:  # the next launch sees all that the former one stored
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
                stream.seen = joined(stream.seen, joined(self.running.accesses, self.running.arrives))

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
                self.running.arrives = joined(self.running.arrives, left)
            if sem in (ir.MEM_SEMANTIC.RELEASE, both) and "release" not in self.lost:
                self.left[address] = joined(left, self.running.arrives)
        self.running.barrier()  # the one that Triton adds
        return before


@contextmanager
def weak_memory(seed, lost=()):
    """The interpreter's memory operations become those of a machine."""
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


def recorded_launches(function, *args):
    """The result of a launcher, not yet written, and its launches, each a function from a view to the programs."""
    launches = []

    def record(kernel, programs, *args):
        function = kernel.rewrite()
        constexprs = interpreter.GridExecutor(function, kernel.arg_names, (programs,)).constexprs
        given = inspect.getcallargs(function, *chain.from_iterable(args))  # keeps the tensors alive

        def run():
            function(**{n: v if n in constexprs else interpreter._implicit_cvt(v) for n, v in given.items()})

        def start(view):
            return [Program(run, index, programs, view) for index in range(programs)]

        launches.append(start)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(norm_penalty, "launch", record)
        return function(*args), launches


def same_bits(results, expected):
    return all(one.equal(two) for one, two in zip(results, expected, strict=True))
