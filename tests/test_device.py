"""What only a device can show: sizes past 2^31, streams, graphs, that nobody waits, and devices that are not current.

Derivatives, edges and whole penalties run there too, as the "device" cases of the other files; torch.compile's own
graphs and captured training steps are in test_traced.py.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fused_gp import fused_gradient_penalty, gradient_norm_penalty, interpolate, r1_penalty, reference
from tests.support.compiling import COMPILES
from tests.support.places import Place
from tests.support.tolerances import assert_near
from tests.test_parity import assert_same_to_second_order, gradients_like
from tests.test_traced import captured_step, mlp, pair, with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]
DEVICE = "cuda"

# Around the tiles of each dtype (8192 bytes), and around the numbers of programs at which rows are split or joined.
WIDTHS = [1, 2, 3, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 6144, 8193]
ROWS = [1, 2, 3, 127, 128, 129, 1023, 1024, 1025, 2047, 2048, 2049]
LARGE = [(1, 2**21 - 1), (1, 2**22 + 1), (2, 10_000_019), (3, 2**23), (65_537, 33), (100_003, 7), (1_000_003, 1)]

# Programs that sum one row each, several rows, or a part of a row; many programs of each kind.
SHAPES = [(9, 1500), (64, 300), (3, 9001), (1, 1_000_003), (3000, 700), (300, 20_000)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [*ROWS, "large"])
def test_every_threshold(rows, dtype):
    """Both ops, up to second derivatives."""
    shapes = LARGE if rows == "large" else [(rows, width) for width in WIDTHS]
    for shape in shapes:
        assert_same_to_second_order({}, gradients_like(shape, dtype, DEVICE), Place("triton", DEVICE))
        one, two, cotangent = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
        alpha = torch.rand(shape[0], device=DEVICE).to(torch.promote_types(dtype, torch.float32))
        results = []
        for function, cast in ((interpolate, torch.Tensor.clone), (reference.interpolate, torch.Tensor.double)):
            real, fake = cast(one).requires_grad_(), cast(two).requires_grad_()
            x_hat = function(real, fake, cast(alpha))
            results.append((x_hat, *torch.autograd.grad(x_hat, (real, fake), cast(cotangent))))
        for actual, expected in zip(*results, strict=True):
            assert_near(actual, expected, dtype, 1)


def data(shape):
    """Gradients or samples, others, a cotangent, and alpha."""
    return [torch.randn(shape, device=DEVICE) for _ in range(3)] + [torch.rand(shape[0], device=DEVICE)]


def all_orders(one, other, cotangent, alpha):
    """Every kernel, through both ops: values, gradients, and gradients of those."""
    g, real, fake = (x.detach().requires_grad_() for x in (one, one, other))
    penalty, norms = gradient_norm_penalty(g, target=30.0, return_norms=True)
    upstream = torch.ones_like(penalty).requires_grad_()
    (first,) = torch.autograd.grad(penalty, g, upstream, create_graph=True)
    seconds = torch.autograd.grad(first, (g, upstream), cotangent)
    x_hat = interpolate(real, fake, alpha)
    ends = torch.autograd.grad(x_hat, (real, fake), cotangent)
    return [x.detach() for x in (penalty, norms, first, *seconds, x_hat, *ends)]


def assert_equal(results, expected):
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.equal(wanted)  # NaN, with which memory is poisoned, equals nothing


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_launch_after_launch(shape):
    """More than share a memset, and nobody waits for the one before."""
    inputs = data(shape)
    penalty_and_norms = all_orders(*inputs)[:2]
    for results in [all_orders(*inputs)[:2] for _ in range(300)]:
        assert_equal(results, penalty_and_norms)


def test_streams_at_once():
    """Sixteen streams, each with data of its own, over and over; all give what the default stream gave."""
    inputs = [data(shape) for shape in SHAPES * 3][:16]
    expected = [all_orders(*each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    calls = []
    for _ in range(10):
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                calls.append(all_orders(*each))
    torch.cuda.synchronize()
    for results, wanted in zip(calls, expected * 10, strict=True):
        assert_equal(results, wanted)


@pytest.mark.parametrize("streams", ["one", "each its own"])
def test_threads_at_once(streams):
    """Eight threads launch at the same time, on one stream or on one each."""
    inputs = [data(shape) for shape in (*SHAPES, (5, 5000), (700, 90))]
    expected = [all_orders(*each) for each in inputs]
    torch.cuda.synchronize()

    def work(each):
        stream = torch.cuda.default_stream() if streams == "one" else torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [all_orders(*each) for _ in range(40)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(inputs)) as threads:
        for calls, wanted in zip(threads.map(work, inputs), expected, strict=True):
            for results in calls:
                assert_equal(results, wanted)


def replay(graph, stream):
    """On that stream, between what the current one has done and will do."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.replay()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops_are_captured(shape):
    """Replayed with other data, on one stream and another, with eager calls in between: the bits of the eager call."""
    inputs = data(shape)
    graph, outputs = captured_step(all_orders, *inputs)
    for stream in [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()] * 2:
        for tensor, new in zip(inputs, data(shape), strict=True):
            tensor.copy_(new)
        replay(graph, stream)
        replayed = [output.clone() for output in outputs]
        assert_equal(replayed, all_orders(*inputs))


def test_graphs_at_once():
    """Several graphs, each replayed again and again on a stream of its own, while the default stream computes too."""
    inputs = [data(shape) for shape in SHAPES]
    expected = [all_orders(*each) for each in inputs]
    graphs = [captured_step(all_orders, *each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [all_orders(*each) for each in inputs]
    torch.cuda.synchronize()
    for (_, outputs), results, wanted in zip(graphs, eager, expected, strict=True):
        assert_equal(outputs, wanted)
        assert_equal(results, wanted)


@pytest.fixture
def no_waiting():
    """Until called, nothing; from then on an operation that waits for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_seen(no_waiting):
    no_waiting()
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device=DEVICE).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_op_waits(shape, no_waiting):
    inputs = data(shape)
    expected = all_orders(*inputs)  # the first call loads the kernels
    no_waiting()
    results = [all_orders(*inputs) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("default")
    for each in results:
        assert_equal(each, expected)


WAYS = {
    "plain": {},
    "a number for alpha": {"alpha": 0.3},
    "one-sided, none": {"one_sided": True, "reduction": "none"},
    "a scale": {"grad_scale": 8.0},
    "chunks": {"chunk_size": 2},
}


@pytest.mark.parametrize("way", [*WAYS, "a scale on the device"])
@pytest.mark.parametrize("name", ["fused_gradient_penalty", "r1_penalty"])
def test_no_penalty_waits(name, way, no_waiting):
    """The whole call and its backward, once the critic is known."""
    options = WAYS.get(way, {"grad_scale": torch.full((), 8.0, device=DEVICE)})
    if name == "r1_penalty":
        options = {k: v for k, v in options.items() if k not in ("alpha", "one_sided")}
    critic, (real, fake) = mlp().to(DEVICE), [x.to(DEVICE) for x in pair(6)]

    def step():
        if name == "r1_penalty":
            return with_gradients(r1_penalty(critic, real, **options), *critic.parameters())
        return with_gradients(fused_gradient_penalty(critic, real, fake, **options), *critic.parameters())

    for _ in range(2):
        step()
    no_waiting()
    step()


@pytest.mark.parametrize(
    "options", [pytest.param(each, marks=COMPILES, id=str(each)) for each in ({}, {"grad_scale": 8.0})]
)
def test_no_compiled_penalty_waits(options, no_waiting):
    critic, samples = mlp().to(DEVICE), [x.to(DEVICE) for x in pair(6)]
    for index in range(4):
        if index == 3:
            no_waiting()
        penalty = fused_gradient_penalty(critic, *samples, method="compiled", **options)
        with_gradients(penalty, *critic.parameters())


def needs(gigabytes):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free device memory, and there are {free / 1e9:.1f}")


def assert_all_are(part, wanted):
    """One number, to the rounding of fp16 and the smallest step that it has."""
    low, high = part.min().item(), part.max().item()
    assert low == high
    assert low == pytest.approx(wanted, rel=2**-11, abs=2**-25)


# More than 2^31 elements: in one row, in rows longer than a program's share, in many rows, and in short ones.
PAST_31_BITS = [(1, 2**31 + 8), (3, 2**30), (2**20 + 1, 2**11 + 1), (2**30 + 4, 2)]


@pytest.mark.parametrize("shape", PAST_31_BITS, ids=str)
def test_penalty_past_31_bits(shape):
    """Each gradient is 2^-10, but the last one of its row is 3, so that a row that is not read to its end shows."""
    needs(40)
    g = torch.full(shape, 2.0**-10, dtype=torch.float16, device=DEVICE)
    g[:, -1] = 3.0
    g.requires_grad_()
    each, norms = gradient_norm_penalty(g, target=2.0, eps=0.0, reduction="none", return_norms=True)
    n = ((shape[1] - 1) * 2.0**-20 + 9.0) ** 0.5
    assert norms.min() == norms.max()
    assert_near(norms[:1], torch.full((1,), n, dtype=torch.float64), torch.float32, 0)

    (first,) = torch.autograd.grad(each.sum(), g, create_graph=True)
    w = 2 * (n - 2) / n
    assert_all_are(first[:, :-1], w * 2.0**-10)
    assert_all_are(first[:, -1], w * 3)

    cotangent = torch.zeros_like(g)
    cotangent[:, -1] = 1.0
    (second,) = torch.autograd.grad(first, g, cotangent)
    bend = 2 * 2 / n**3 * 3  # (w'/n) <g, u>
    assert_all_are(second[:, :-1], bend * 2.0**-10)
    assert_all_are(second[:, -1], w + bend * 3)


@pytest.mark.parametrize("shape", PAST_31_BITS, ids=str)
def test_interpolation_past_31_bits(shape):
    needs(40)
    real = torch.full(shape, 2.0, dtype=torch.float16, device=DEVICE)
    fake = torch.full(shape, 4.0, dtype=torch.float16, device=DEVICE)
    real[:, -1] = -2.0
    alpha = torch.full(shape[:1], 0.25, device=DEVICE)
    x_hat = interpolate(real, fake, alpha)
    assert_all_are(x_hat[:, :-1], 2.5)
    assert_all_are(x_hat[:, -1], -0.5)
    del x_hat
    real.requires_grad_()
    fake.requires_grad_()
    ends = torch.autograd.grad(interpolate(real, fake, alpha), (real, fake), real.detach())
    for end, weight in zip(ends, (0.75, 0.25), strict=True):
        assert_all_are(end[:, :-1], 2 * weight)
        assert_all_are(end[:, -1], -2 * weight)


def test_rows_far_apart():
    """Few elements, with strides that take them past 2^31."""
    needs(20)
    wide = torch.zeros(3, 2**31 + 8, dtype=torch.float16, device=DEVICE)
    rows = wide[:, -1000:]
    rows.copy_(torch.randn(3, 1000))
    others = rows.flip(0), torch.randn(3, 1000, device=DEVICE).half(), torch.rand(3, device=DEVICE)
    assert_equal(all_orders(rows, *others), all_orders(rows.contiguous(), *others))


def test_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    inputs = [data(shape) for shape in SHAPES]
    expected = [[x.cpu() for x in all_orders(*each)] for each in inputs]
    assert torch.cuda.current_device() == 0
    for each, wanted in zip(inputs, expected, strict=True):
        results = all_orders(*[x.to("cuda:1") for x in each])
        assert all(x.device == torch.device("cuda:1") for x in results)
        assert_equal([x.cpu() for x in results], wanted)
