"""Reductions give the same bits in every order in which their programs may access memory: run on a weak memory."""

import pytest
import torch

from fused_gp import arguments

pytest.importorskip("triton", reason="Triton is not installed")

from fused_gp.kernels import launch, norm_penalty
from fused_gp.kernels.tiles import reduction_tile
from tests.support.kernels.weak_memory import recorded_launches, same_bits, weak_memory

pytestmark = pytest.mark.usefixtures("one_thread")

ORDERS = 6


def forward(tensors, form):
    return norm_penalty.penalty_forward(tensors, form)


def double_backward(tensors, form):
    """Its reduction: the dot products that the scaling kernel needs, and the gradient of the upstream factor."""
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


def tensors_and_form(widths, reduction="mean"):
    rows, widths = WIDTHS[widths]
    tensors = [torch.randn(rows, width) for width in widths]
    return tensors, arguments.penalty_form(len(tensors[0]), 1.0, False, 1e-12, 1.0, reduction, False)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("function", [forward, double_backward])
def test_every_order_gives_the_same_bits(function, widths, reduction):
    args = tensors_and_form(widths, reduction)
    expected = function(*args)
    assert all(result.isfinite().all() for result in expected)
    last_programs = set()
    for seed in range(ORDERS):
        results, launches = recorded_launches(function, *args)
        with weak_memory(seed) as machine:
            machine.run(launches)
        assert same_bits(results, expected), f"order {seed}"
        for result in results:
            for address in range(result.data_ptr(), result.data_ptr() + result.nbytes, result.element_size()):
                assert len(machine.stored_by[address]) == 1  # by the program that finishes the row or the mean
        last_programs |= set(machine.stored_by[results[0].data_ptr()])
    tiling = reduction_tile(*args[0][-1].shape, 4)
    if reduction == "mean" or tiling.splits > 1:
        assert len(last_programs) > 1  # the orders differ in which program is the last


@pytest.mark.parametrize("widths", ["tiles", "split"])
@pytest.mark.parametrize("lost", ["barrier", "release", "acquire"])
def test_without_its_barrier_release_or_acquire_the_kernel_is_wrong(lost, widths):
    """So the memory model is weak enough: without any of the three, nearly every order gives another result."""
    args = tensors_and_form(widths)
    expected = forward(*args)
    wrong = 0
    for seed in range(ORDERS):
        results, launches = recorded_launches(forward, *args)
        with weak_memory(seed, lost) as machine:
            machine.run(launches)
        wrong += not same_bits(results, expected)
    assert wrong > ORDERS // 2


@pytest.mark.parametrize("widths", ["tiles", "split"])
def test_launches_one_after_the_other_on_one_stream(widths):
    """More of them than have counters from one memset; no launch resets its counter."""
    args = tensors_and_form(widths)
    expected = forward(*args)
    kept = [launch.arrival_counter(torch.device("cpu")) for _ in range(launch._LAUNCHES - 2)]
    calls = [recorded_launches(forward, *args) for _ in range(4)]
    with weak_memory(0) as machine:
        machine.run([start for _, launches in calls for start in launches])
    assert all(same_bits(results, expected) for results, _ in calls)
    assert not any(counter.any() for counter in kept)


def share_one_counter(patches):
    counter = torch.zeros(1, dtype=torch.int32)
    patches.setattr(norm_penalty, "arrival_counter", lambda device: counter)


@pytest.mark.parametrize("shared", [False, True])
def test_launches_on_several_streams_at_once(shared, monkeypatch):
    """Two launches on each of three streams are right with a counter each, and wrong with a shared counter."""
    args = [tensors_and_form(widths) for widths in ("tiles", "split", "rows")] * 2
    expected = [forward(*each) for each in args]
    if shared:
        share_one_counter(monkeypatch)
    for seed in range(ORDERS // 2):
        calls = [recorded_launches(forward, *each) for each in args]
        with weak_memory(seed) as machine:
            machine.run(*([*calls[i][1], *calls[i + 3][1]] for i in range(3)))
        right = [same_bits(results, wanted) for (results, _), wanted in zip(calls, expected, strict=True)]
        assert all(right) != shared


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("widths", ["tiles", "split"])
def test_an_aborted_launch_changes_no_later_result(widths, shared, monkeypatch):
    """Stopped before any memory operation. With a shared counter the next launch on the stream would be wrong."""
    args = tensors_and_form(widths)
    expected = forward(*args)
    if shared:
        share_one_counter(monkeypatch)
    with weak_memory(0) as machine:
        steps = machine.run(recorded_launches(forward, *args)[1])
    wrong = 0
    for seed in range(ORDERS):
        aborted, (results, launches) = recorded_launches(forward, *args), recorded_launches(forward, *args)
        with weak_memory(seed) as machine:
            machine.run(aborted[1], abort_after=machine.draw.randrange(steps))
            machine.run(launches)
        assert not same_bits(aborted[0], expected)
        wrong += not same_bits(results, expected)
    assert (wrong > 0) == shared
