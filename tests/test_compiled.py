"""method="compiled": exact, one graph, kept for the next call, forgotten with its critic, and clear where it cannot be.

Most of these tests put AOTAutograd, which takes the derivatives, in front of eager kernels instead of Inductor's: what
is compiled is the same, and it takes a tenth of the time.
"""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.graph import save_on_cpu
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import fused_gp
from fused_gp import fused_gradient_penalty, r1_penalty, reference
from fused_gp.critics import autograd_graph as graph
from fused_gp.critics import critic as known_critics
from fused_gp.methods.partition import GradientInForward
from tests.support.compiling import COMPILES, Graphs

pytestmark = [pytest.mark.usefixtures("one_thread"), *COMPILES]


@pytest.fixture(autouse=True)
def _one_graph(_fresh_compiler):
    yield
    assert not counters["graph_break"]


@pytest.fixture
def graphs(monkeypatch):
    graphs = Graphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    return graphs


def batch(*shape):
    return torch.randn(shape, dtype=torch.float64)


def pair(size=5, width=4):
    return batch(size, width), batch(size, width)


def mlp(width=4):
    return nn.Sequential(nn.Linear(width, 6), nn.SiLU(), nn.Linear(6, 1)).double()


class Remembering(nn.Module):
    """Its derivative needs what a buffer was before it was written."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 3).double(), nn.Linear(3, 1).double()
        self.register_buffer("mean", torch.rand(3).double())

    def forward(self, x):
        before = self.mean.clone()
        with torch.no_grad():
            torch.mul(self.mean, 0.5, out=self.mean)
        return self.head(torch.tanh(self.body(x) * before))


class Tied(nn.Module):
    """One weight in two places, and two whose gradients are one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(4, width).double() for width in (4, 4, 1))
        self.second.weight = self.first.weight
        self.a, self.b = (nn.Parameter(torch.rand(4).double()) for _ in range(2))

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x))) + self.a + self.b))


class Wrapped(nn.Module):
    """A critic whose forward is a function of its network and the samples."""

    def __init__(self, run, net=None):
        super().__init__()
        self.net = mlp() if net is None else net
        self.run = run

    def forward(self, *args, **kwargs):
        return self.run(self.net, *args, **kwargs)


def conditional(net, x, labels, *, strength):
    return net(x) + strength * (x * labels).sum(1, keepdim=True).tanh()


def two_inputs(net, x):
    first, second = x
    return net(first) * second.square().mean((1, 2))[:, None]


def pairs_of_tensors():
    return [(batch(5, 4), batch(5, 2, 3)) for _ in range(2)]


def results(function, critic, samples, **options):
    """Value, norms, and the gradients of weights and samples; the buffers after."""
    critic = copy.deepcopy(critic)
    samples = torch.utils._pytree.tree_map(lambda x: x.clone().requires_grad_(), samples)
    torch.manual_seed(3)
    penalty, norms = function(critic, *samples, return_norms=True, **options)
    inputs = [*critic.parameters(), *torch.utils._pytree.tree_leaves(samples)]
    grads = torch.autograd.grad(penalty.sum(), inputs, materialize_grads=True)
    assert any(grad.any() for grad in grads), "a penalty that moves nothing shows nothing"
    return penalty.detach(), norms, *grads, *critic.buffers()


def assert_exact(name, critic, samples, how=None, **options):
    ours = results(getattr(fused_gp, name), critic, samples, method="compiled", **(how or {}), **options)
    truth = results(getattr(reference, name), critic, samples, **options)
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


FUSED, NET = "fused_gradient_penalty", (mlp, pair)

CASES = {
    "weight": (FUSED, *NET, {"weight": 10.0}),
    "alpha": (FUSED, *NET, {"alpha": torch.rand(5).double()}),
    "sum": (FUSED, *NET, {"reduction": "sum"}),
    "none": (FUSED, *NET, {"reduction": "none", "eps": 0.0}),
    "one-sided": (FUSED, *NET, {"one_sided": True, "target": 0.1}),
    "zero-centred": (FUSED, *NET, {"target": 0.0}),
    "scaled": (FUSED, *NET, {"grad_scale": 8.0}),
    "scaled by no power of two": (FUSED, *NET, {"grad_scale": 1000.0}),
    "scaled by a tensor": (FUSED, *NET, {"grad_scale": torch.tensor(8.0)}),
    "packed": (
        FUSED, lambda: nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(1), mlp(8)), lambda: pair(6),
        {"group_size": 2},
    ),
    "conditional": (
        FUSED, lambda: Wrapped(conditional), pair,
        {"critic_args": (torch.ones(5, 4).double(),), "critic_kwargs": {"strength": 0.5}},
    ),
    "two inputs": (FUSED, lambda: Wrapped(two_inputs), pairs_of_tensors, {}),
    "patches": (
        FUSED, lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 2)).double(),
        lambda: (batch(3, 2, 4, 4), batch(3, 2, 4, 4)), {},
    ),
    "spectral norm": (FUSED, lambda: spectral_norm(nn.Linear(4, 6).double()), pair, {}),
    "spectral norm, none": (FUSED, lambda: spectral_norm(nn.Linear(4, 6).double()), pair, {"reduction": "none"}),
    "a buffer as it was": (FUSED, Remembering, pair, {}),
    "tied weights": (FUSED, Tied, pair, {}),
    "R1": ("r1_penalty", mlp, lambda: pair()[:1], {"weight": 10.0}),
    "R2": ("r2_penalty", mlp, lambda: pair()[:1], {}),
    "DRAGAN": ("dragan_penalty", mlp, lambda: pair()[:1], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_exact(graphs, case):
    """Value, norms, the gradients of weights and of both batches, and the buffers of spectral norm: as plain autograd
    has them, through one graph without symbols."""
    name, build, samples, options = CASES[case]
    assert_exact(name, build(), samples(), **options)
    assert graphs.symbolic == [False]


def test_exact_in_chunks(graphs):
    """A rest of one sample is a batch of another size."""
    assert_exact(FUSED, mlp(), pair(5), {"chunk_size": 2}, alpha=torch.rand(5).double())
    assert graphs.symbolic == [False, False]  # torch makes a graph of its own for a batch of one


def test_exact_through_inductor():
    """What users get, at a first batch size and at others: two compilations."""
    critic = mlp()
    for size in (5, 6, 7, 9, 5):
        ours, truth = (
            function(critic, *samples, return_norms=True, **options)
            for samples, alpha in [(pair(size), torch.rand(size).double())]
            for function, options in (
                (fused_gradient_penalty, {"method": "compiled", "alpha": alpha}),
                (reference.fused_gradient_penalty, {"alpha": alpha}),
            )
        )
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
        grads = [
            torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True)
            for penalty, _ in (ours, truth)
        ]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 2


def test_dropout_through_inductor():
    """Inductor draws in its own order, so the masks are not eager's; their distribution is, and the backward sees the
    forward's: of a penalty that is quadratic in w, the derivative along w is twice the penalty."""
    critic = Wrapped(lambda net, x: net(x), nn.Sequential(nn.Dropout(0.75), nn.Linear(4000, 1, bias=False)))
    w = critic.net[1].weight
    nn.init.ones_(w)
    penalty, norms = r1_penalty(critic, torch.randn(6, 4000), weight=2.0, method="compiled", return_norms=True)
    # Each of 4000 elements is kept with probability 1/4, and then multiplied by 4: 16 (1000 +- 27.4).
    kept = norms.square() / 16
    assert (kept - 1000).abs().max() < 5 * 27.4
    assert len(kept.unique()) > 1
    (slope,) = torch.autograd.grad(penalty, w, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(3 * penalty, w)[0], 3 * slope)  # which nobody has overwritten
    torch.testing.assert_close((slope * w).sum(), 2 * penalty.detach())


@pytest.mark.parametrize("case", ["spectral norm", "spectral norm, none"])
def test_exact_where_torch_is_told_to_keep_less(graphs, case):
    """A setting of the whole process, with which torch would read the vectors of spectral norm after their update."""
    with torch._functorch.config.patch(activation_memory_budget=0.7):
        test_exact(graphs, case)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "lambda"])
@pytest.mark.parametrize("batch", [5, 6])
def test_nothing_is_kept_but_one_gradient_per_parameter(graphs, wrap, batch):
    """All else that two derivatives need is gone when the call returns, at the first batch size and at others."""
    critic = mlp()
    for size in (5, batch):
        penalty = fused_gradient_penalty(wrap(critic), *pair(size), method="compiled")
    graph_nodes = [node for node in graph.nodes([penalty]) if hasattr(node, "saved_tensors")]
    (compiled,) = (node for node in graph_nodes if "CompiledFunction" in node.name())
    weights = [critic[0].weight, critic[0].bias, critic[2].weight]  # the last bias has no part in the penalty
    assert sorted(t.shape for t in compiled.saved_tensors) == sorted(w.shape for w in weights)
    assert not {t.data_ptr() for t in compiled.saved_tensors} & {w.data_ptr() for w in weights}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_on_another_device_than_the_penalty(device):
    """Are not multiplied by its upstream factor in the end: the compiler splits such a graph as ever."""
    nodes = torch.fx.Graph()
    weight, upstream = nodes.placeholder("primals_1"), nodes.placeholder("tangents_1")
    penalty = nodes.call_function(torch.ops.aten.sum.default, (weight,))
    gradient = nodes.call_function(torch.ops.aten.mul.Tensor, (weight, upstream))
    nodes.output([penalty, gradient])
    for node in nodes.nodes:
        node.meta["val"] = torch.ones(3, device=device) if node in (weight, gradient) else torch.ones(())
    _, backward = GradientInForward(False)(torch.fx.GraphModule({}, nodes), [], num_fwd_outputs=1)
    (product,) = backward.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert (product.args[0].name == weight.name) == (device == "meta")


def test_a_change_between_call_and_backward_spoils_nothing(graphs):
    """The gradient is that of the weights in the call."""
    critic, samples = mlp(), pair()
    truth = fused_gradient_penalty(critic, *samples, alpha=0.5)
    expected = torch.autograd.grad(truth, list(critic.parameters()), materialize_grads=True)
    penalty = fused_gradient_penalty(critic, *samples, alpha=0.5, method="compiled")
    with torch.no_grad():
        for p in critic.parameters():
            p += 1
    actual = torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_attached_arguments_get_their_gradient(graphs):
    critic, samples = Wrapped(conditional), pair()
    labels, strength = torch.rand(5, 4).double().requires_grad_(), torch.tensor(0.5).double().requires_grad_()
    options = {"alpha": 0.5, "critic_args": (labels,), "critic_kwargs": {"strength": strength}}
    ours = fused_gradient_penalty(critic, *samples, method="compiled", **options)
    truth = reference.fused_gradient_penalty(critic, *samples, **options)
    grads = [torch.autograd.grad(3 * p, [labels, strength, *critic.parameters()], materialize_grads=True)
             for p in (ours, truth)]  # fmt: skip
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    assert grads[0][0].any()
    assert grads[0][1].any()


def test_attached_samples_of_any_batch_size(graphs):
    critic = mlp()
    for size in (5, 6, 7):
        real, fake = pair(size)
        real.requires_grad_()
        ours, truth = (
            torch.autograd.grad(function(critic, real, fake, alpha=0.5, **options), real)
            for function, options in (
                (fused_gradient_penalty, {"method": "compiled"}), (reference.fused_gradient_penalty, {}),
            )
        )  # fmt: skip
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    assert graphs.symbolic == [False, True]


@pytest.mark.parametrize(("scaled", "chunk_size"), [(True, None), (True, 2), (False, None)])
def test_small_gradients_in_fp16(graphs, scaled, chunk_size):
    """The loss scale reaches them on their way, whether scores are scaled by it too or not, as in eager mode. Without,
    they would be some few steps of the smallest number of fp16, 2^-24."""
    critic, (real, fake) = mlp().half(), [x.half() for x in pair(6)]
    with torch.no_grad():
        critic[2].weight *= 2**-9
    options = {"alpha": 0.5, "target": 0.0, "grad_scale": 2.0**12 if scaled else None}
    others = options | {"grad_scale": None if scaled else 2.0}  # have a graph of their own
    fused_gradient_penalty(critic, real, fake, method="compiled", **others)
    ours, eager = (
        torch.autograd.grad(2.0**12 * fused_gradient_penalty(critic, real, fake, **options, **how), critic[0].weight)[0]
        for how in ({"method": "compiled", "chunk_size": chunk_size}, {})
    )
    assert 0 < eager.abs().max() < 2**12 * 2**-19
    torch.testing.assert_close(ours, eager, rtol=2**-7, atol=2**-7 * eager.abs().mean().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_differentiable_once(graphs, reduction):
    """Its gradient is known as numbers: a second derivative would lose what they depend on, in silence."""
    critic = mlp()
    penalty = fused_gradient_penalty(critic, *pair(), method="compiled", reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="method='compiled' gives the penalty's first derivative alone"):
        torch.autograd.grad(penalty, critic[0].weight, create_graph=True)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "lambda"])
def test_a_batch_size_is_compiled_once_and_all_others_together(graphs, wrap):
    """The first keeps its static graph. A lambda made anew at each step is no new critic."""
    net = mlp()

    def call(size):
        fused_gradient_penalty(wrap(net), *pair(size), method="compiled").backward()
        return graphs.symbolic

    assert [call(8)[:] for _ in range(3)] == [[False]] * 3
    assert [call(size)[:] for size in (5, 6, 7, 9)] == [[False, True]] * 4
    assert call(8) == [False, True]
    assert call(1) == [False, True, False]  # torch always makes one of a single sample a case of its own
    assert call(6) == [False, True, False]


def test_other_batch_sizes_share_a_graph_whatever_torch_remembers_of_sizes(graphs):
    """torch notices by itself that a size changed, unless it was told not to look."""
    critic = mlp()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for size in (8, 5, 6, 7):
            fused_gradient_penalty(critic, *pair(size), method="compiled")
    assert graphs.symbolic == [False, True]


def test_numbers_that_change_from_step_to_step_change_no_graph(graphs):
    critic, real, fake = mlp(), *pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for weight in (1, 2.5, 10.0):
        assert_exact_here(critic, real, fake, weight=weight)
    assert graphs.symbolic == [False]
    for scale in (2.0, 4.0, torch.tensor(8.0)):
        assert_exact_here(critic, real, fake, grad_scale=scale)
    for scale in (16.0, 32.0):
        scaler.update(scale) if scaler._scale is not None else scaler.scale(torch.ones(()))
        ours = fused_gradient_penalty(critic, real, fake, alpha=0.5, grad_scale=scaler, method="compiled")
        torch.testing.assert_close(ours, reference.fused_gradient_penalty(critic, real, fake, alpha=0.5))
    assert graphs.symbolic == [False, False]


def assert_exact_here(critic, real, fake, **options):
    """Of this critic itself, which stays known."""
    ours = fused_gradient_penalty(critic, real, fake, alpha=0.5, method="compiled", **options)
    truth = reference.fused_gradient_penalty(critic, real, fake, alpha=0.5, **options)
    weights = [p for p in critic.parameters() if p.requires_grad]
    for actual, expected in zip(
        (ours, *torch.autograd.grad(ours, weights, materialize_grads=True)),
        (truth, *torch.autograd.grad(truth, weights, materialize_grads=True)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_modes_of_the_critic(graphs):
    """Training and evaluation, frozen and thawed: each is seen, and compiled once."""
    doubled = Wrapped(lambda net, x: net(2 * x if doubled.training else x))
    for _ in range(2):
        for training in (True, False):
            for thawed in (True, False):
                doubled.train(training)
                doubled.net[0].requires_grad_(thawed)
                assert_exact_here(doubled, *pair())
    assert graphs.symbolic == [False] * 4


def test_autocast(graphs):
    """The critic computes in bf16 inside, in fp32 outside, and each as the eager method does there."""
    critic, (real, fake) = mlp().float(), [x.float() for x in pair()]
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ours, eager = (
                fused_gradient_penalty(critic, real, fake, alpha=0.5, method=method)
                for method in ("compiled", "double_backward")
            )
        assert ours.dtype == torch.float32
        grads = [torch.autograd.grad(p, list(critic.parameters()), materialize_grads=True) for p in (ours, eager)]
        # One rounding to bf16 more or less on the way is 2^-8.
        tolerance = {"rtol": 2**-6, "atol": 2**-8} if enabled else {}
        torch.testing.assert_close((ours, *grads[0]), (eager, *grads[1]), **tolerance)
    assert graphs.symbolic == [False, False]


def test_without_gradients(graphs):
    """The value is the eager one: nothing is compiled for it."""
    critic, samples = mlp(), pair()
    with torch.no_grad():
        ours = fused_gradient_penalty(critic, *samples, alpha=0.5, method="compiled")
    assert not ours.requires_grad
    torch.testing.assert_close(ours, reference.fused_gradient_penalty(critic, *samples, alpha=0.5).detach())
    assert graphs.symbolic == []


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "lambda"])
def test_forgotten_with_its_critic(graphs, wrap):
    critic = mlp()
    for size in (5, 6):
        fused_gradient_penalty(wrap(critic), *pair(size), method="compiled").backward()
    gone = [weakref.ref(critic)]
    for found in known_critics._profiles[critic].values():
        gone += [
            weakref.ref(run.__wrapped__) for kept in found.compiled.values() for run in (kept.fixed, kept.variable)
        ]
        gone += map(weakref.ref, found.compiled.values())
    assert len(gone) == 4
    assert all(ref() is not None for ref in gone)
    del critic, found
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


def test_critics_of_one_class_do_not_count_against_one_another(graphs):
    """torch.compile gives up after eight graphs of one function."""
    critics = [mlp() for _ in range(10)]
    for _ in range(2):
        for critic in critics:
            assert_exact_here(critic, *pair())
    assert graphs.symbolic == [False] * 10


@pytest.mark.parametrize("compiled", ["all", "in place", "part"])
def test_critics_that_are_compiled_already(graphs, compiled):
    """They are compiled again, with the rest."""
    net = mlp()
    critic = Wrapped(lambda net, x: net(x), net)
    if compiled == "in place":
        critic.compile(backend="aot_eager")
    elif compiled == "all":
        critic = torch.compile(critic, backend="aot_eager")
    else:
        critic.net = torch.compile(net, backend="aot_eager")
    samples = pair()
    ours = fused_gradient_penalty(critic, *samples, alpha=0.5, method="compiled")
    truth = reference.fused_gradient_penalty(net, *samples, alpha=0.5)
    grads = [torch.autograd.grad(p, list(net.parameters()), materialize_grads=True) for p in (ours, truth)]
    torch.testing.assert_close((ours, *grads[0]), (truth, *grads[1]), rtol=1e-10, atol=1e-12)
    assert len(graphs.symbolic) == 1


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


def attention(net, x):
    x = x[:, None, None].float().repeat(1, 1, 3, 1)
    return net(nn.functional.scaled_dot_product_attention(x, x, x).mean((1, 2)).double())


def branching(net, x):
    return net(x) if x.sum() > 0 else net(-x)


def printing(net, x):
    print("scores")
    return net(x)


COMPILER_SAYS = "method='compiled' needs a critic that torch.compile can compile whole, and it says: "
TWICE = "method='compiled' must differentiate the critic twice, and found "
INSTEAD = " Use method='double_backward', or, where the critic is smooth, method='directional'."
HOOKS = (
    "method='compiled' cannot see through activation checkpointing, save_on_cpu and other hooks on saved tensors: "
    "leave them out, since the compiler itself decides what to keep, or use method='double_backward', or, where the "
    "critic is smooth, method='directional'"
)

FAILING = {
    "flash attention": (
        attention,
        TWICE + 'an operation of which autograd says "derivative for '
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented\". Use method='directional' "
        "where the critic is smooth, or attention that autograd sees: torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    ),
    "once_differentiable": (
        lambda net, x: net(Once.apply(x)),
        TWICE + "the autograd Function Once, whose backward is once_differentiable. Use method='directional' where the "
        "critic is smooth.",
    ),
    "reentrant checkpointing": (lambda net, x: checkpoint(net, x, use_reentrant=True), HOOKS),
    "checkpointing": (lambda net, x: checkpoint(net, x, use_reentrant=False), HOOKS),
    "a print": (
        printing,
        COMPILER_SAYS + "Failed to trace builtin operator Explanation: Dynamo does not know how to trace builtin "
        "operator `print` with argument types ['str'] (has_kwargs False)" + INSTEAD,
    ),
    "control flow that depends on data": (
        branching,
        COMPILER_SAYS + "Data-dependent branching Explanation: Detected data-dependent branching (e.g. `if "
        "my_tensor.sum() > 0:`). Dynamo does not support tracing dynamic control flow." + INSTEAD,
    ),
    "scores of something else": (
        lambda net, x: net(x.detach()),
        "critic must return scores that depend on the samples it is given, got scores that do not: is there a detach() "
        "or no_grad() inside it?",
    ),
    "a mean": (
        lambda net, x: net(x).mean(),
        "critic must return at least one score per sample or group, got shape () for 5 of them: a mean over the batch "
        "would shrink every gradient",
    ),
}


@pytest.mark.parametrize("cause", FAILING)
def test_critics_that_cannot(graphs, cause, capfd):
    """Said at the call, each time, in a line, and torch is left as it was: hooks on saved tensors can be used."""
    run, message = FAILING[cause]
    critic, samples = Wrapped(run), pair()
    for _ in range(2):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
            fused_gradient_penalty(critic, *samples, method="compiled")
        assert str(caught.value) == message
    assert "Traceback" not in capfd.readouterr().err
    with save_on_cpu():
        fused_gradient_penalty(mlp(), *samples).backward()
    counters["graph_break"].clear()  # it counts what it refused


class MovingMean(nn.Module):
    """Keeps what it has seen in a buffer, and passes it on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x


@pytest.mark.parametrize("first", [partial(nn.BatchNorm1d, 4, dtype=torch.float64), MovingMean])
@pytest.mark.filterwarnings("ignore:critic has batch normalisation")
def test_buffers_changed_on_the_way(graphs, first):
    """torch.func does not allow it in the midst of the derivative. Its own words differ from version to version."""
    critic = nn.Sequential(first(), mlp())
    before = copy.deepcopy(critic.state_dict())
    with pytest.raises(ValueError, match="changes no buffer on the way from points to scores, as batch") as caught:
        fused_gradient_penalty(critic, *pair(), method="compiled")
    assert str(caught.value).endswith(INSTEAD)
    torch.testing.assert_close(critic.state_dict(), before, rtol=0, atol=0)
    if first is not MovingMean:
        assert_exact_here(critic.eval(), *pair())


def test_sparse_gradients(graphs):
    """The compiler would say so in the backward."""

    class Embedded(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.words, self.net = nn.Embedding(3, 4, sparse=sparse, dtype=torch.float64), mlp()

        def forward(self, x, words):
            return self.net(x * self.words(words))

    words = torch.tensor([0, 1, 2, 0, 1])
    fused_gradient_penalty(Embedded(False), *pair(5), critic_args=(words,), method="compiled").backward()
    with pytest.raises(ValueError, match=r"needs dense gradients, got a critic with Embedding\(sparse=True\)"):
        fused_gradient_penalty(Embedded(True), *pair(5), critic_args=(words,), method="compiled")


def test_dropout_at_another_batch_size(graphs):
    """On the CPU torch cannot trace it for a batch of variable size. The message must not blame the critic as such."""
    critic = nn.Sequential(nn.Dropout(0.5), mlp())
    for _ in range(2):
        fused_gradient_penalty(critic, *pair(5), method="compiled")
        with pytest.raises(ValueError, match="whole, for batches of other sizes than the first, 5, as well, and it"):
            fused_gradient_penalty(critic, *pair(4), method="compiled")
    counters["graph_break"].clear()  # it counts what it refused


def test_inside_hooks_on_saved_tensors(graphs):
    """Refused before and after the compilation, and the hooks can be used as before."""
    critic, samples = mlp(), pair()
    for _ in range(2):
        with pytest.raises(ValueError, match="method='compiled' cannot see through") as caught, save_on_cpu():
            fused_gradient_penalty(critic, *samples, method="compiled")
        assert str(caught.value) == HOOKS
        with save_on_cpu():
            fused_gradient_penalty(critic, *samples).backward()
        assert_exact_here(critic, *samples)


def test_a_critic_that_is_never_the_same(graphs):
    """A number in an attribute is part of the graph."""
    critic = Wrapped(lambda net, x: critic.fade * net(x))
    limit = torch._dynamo.config.recompile_limit
    for step in range(limit):
        critic.fade = 1.0 / (1 + step)
        fused_gradient_penalty(critic, *pair(), method="compiled")
    critic.fade = 0.0
    with pytest.raises(ValueError, match="stays as it is") as caught:
        fused_gradient_penalty(critic, *pair(), method="compiled")
    assert str(caught.value) == (
        f"method='compiled' needs a critic that stays as it is, got one that was compiled {limit} times and has "
        "changed again: numbers that change from call to call belong in tensors, such as buffers"
    )


def test_numbers_in_tensors_may_change(graphs):
    """As the message above says."""
    critic = Wrapped(lambda net, x, fade: fade * net(x))
    for step in range(12):
        assert_exact_here(critic, *pair(), critic_args=(torch.tensor(0.5 + 0.1 * step),))
    assert graphs.symbolic == [False]
