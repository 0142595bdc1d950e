"""Ops captured in CUDA graphs, and replayed."""

import pytest
import torch

from tests.support.kernels.on_device import DEVICE_SHAPES, all_orders, assert_equal_bits, captured, device_inputs

pytestmark = pytest.mark.gpu


def replay(graph, stream):
    """On this stream, after the work of the current stream and before its later work."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.replay()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
def test_captured_ops_give_the_bits_of_eager_calls(shape):
    """Replayed with other data, on several streams, with eager calls between."""
    inputs = device_inputs(shape)
    graph, outputs = captured(all_orders, *inputs)
    for stream in [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()] * 2:
        for tensor, new in zip(inputs, device_inputs(shape), strict=True):
            tensor.copy_(new)
        replay(graph, stream)
        replayed = [output.clone() for output in outputs]
        assert_equal_bits(replayed, all_orders(*inputs))


def test_graphs_on_several_streams_at_once():
    """Each graph replayed repeatedly on a stream of its own, while the default stream computes too."""
    inputs = [device_inputs(shape) for shape in DEVICE_SHAPES]
    expected = [all_orders(*each) for each in inputs]
    graphs = [captured(all_orders, *each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [all_orders(*each) for each in inputs]
    torch.cuda.synchronize()
    for (_, outputs), results, expected_results in zip(graphs, eager, expected, strict=True):
        assert_equal_bits(outputs, expected_results)
        assert_equal_bits(results, expected_results)
