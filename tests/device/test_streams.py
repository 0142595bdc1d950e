"""Launches on several streams, from several threads, and on a device that is not current."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.kernels.on_device import DEVICE_SHAPES, all_orders, assert_equal_bits, device_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
def test_launches_one_after_the_other(shape):
    """More of them than have counters from one memset, without synchronisation between them."""
    inputs = device_inputs(shape)
    penalty_and_norms = all_orders(*inputs)[:2]
    for results in [all_orders(*inputs)[:2] for _ in range(300)]:
        assert_equal_bits(results, penalty_and_norms)


def test_sixteen_streams_at_once():
    """Each with data of its own, repeatedly, with the results of the default stream."""
    inputs = [device_inputs(shape) for shape in DEVICE_SHAPES * 3][:16]
    expected = [all_orders(*each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    calls = []  # 4 GB in all
    for _ in range(10):
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                calls.append(all_orders(*each))
    torch.cuda.synchronize()
    for results, expected_results in zip(calls, expected * 10, strict=True):
        assert_equal_bits(results, expected_results)


@pytest.mark.parametrize("streams", ["one", "each its own"])
def test_eight_threads_at_once(streams):
    """On one stream, or on one each."""
    inputs = [device_inputs(shape) for shape in (*DEVICE_SHAPES, (5, 5000), (700, 90))]
    expected = [all_orders(*each) for each in inputs]
    torch.cuda.synchronize()

    def launch_repeatedly(each):
        stream = torch.cuda.default_stream() if streams == "one" else torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [all_orders(*each) for _ in range(20)]  # 4 GB in all
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(inputs)) as threads:
        for calls, expected_results in zip(threads.map(launch_repeatedly, inputs), expected, strict=True):
            for results in calls:
                assert_equal_bits(results, expected_results)


def test_tensors_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    inputs = [device_inputs(shape) for shape in DEVICE_SHAPES]
    expected = [[x.cpu() for x in all_orders(*each)] for each in inputs]
    assert torch.cuda.current_device() == 0
    for each, expected_results in zip(inputs, expected, strict=True):
        results = all_orders(*[x.to("cuda:1") for x in each])
        assert all(x.device == torch.device("cuda:1") for x in results)
        assert_equal_bits([x.cpu() for x in results], expected_results)
