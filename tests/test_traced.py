"""The penalty seen through by others: the user's own torch.compile, torch.func, checkpointing, hooks, CUDA graphs."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint

from fused_gp import (
    GradientPenalty,
    dragan_penalty,
    fused_gradient_penalty,
    gradient_norm_penalty,
    input_gradient_penalty,
    interpolate,
    r1_penalty,
    r2_penalty,
    reference,
)
from fused_gp.critics.critic import Critic
from fused_gp.methods.reruns import Reruns
from tests.support.compiling import COMPILES, Graphs

pytestmark = [pytest.mark.usefixtures("one_thread"), *COMPILES]


@pytest.fixture
def graphs():
    return Graphs()


def batch(*shape):
    return torch.randn(shape, dtype=torch.float64)


def pair(size=5):
    return batch(size, 4), batch(size, 4)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 1)).double()


def assert_same(ours, truth):
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def with_gradients(penalty, *inputs):
    assert penalty.requires_grad
    return penalty.detach(), *torch.autograd.grad(penalty.sum(), inputs, materialize_grads=True)


FAMILY = {
    "fused_gradient_penalty": (fused_gradient_penalty, 2, {"weight": 10.0}),
    "one-sided, alpha": (fused_gradient_penalty, 2, {"one_sided": True, "target": 0.2, "alpha": 0.3}),
    "scaled": (fused_gradient_penalty, 2, {"grad_scale": torch.tensor(8.0), "reduction": "none"}),
    "auto": (fused_gradient_penalty, 2, {"method": "auto"}),
    "compiled": (fused_gradient_penalty, 2, {"method": "compiled"}),
    "r1_penalty": (r1_penalty, 1, {"weight": 10.0}),
    "r2_penalty": (r2_penalty, 1, {}),
    "dragan_penalty": (dragan_penalty, 1, {}),
    "GradientPenalty": (GradientPenalty(weight=10), 2, {}),
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["found out", "said"])
@pytest.mark.parametrize("name", FAMILY)
def test_compiled_by_the_user(graphs, name, dynamic):
    """In one graph: value, norms, and gradients of weights and samples, draw for draw, are eager's; a second graph
    serves all batch sizes but the first, or one serves all."""
    function, count, options = FAMILY[name]
    critic = mlp()
    compiled = torch.compile(function, fullgraph=True, backend=graphs, dynamic=dynamic)
    eagerly = options | ({"method": "double_backward"} if "method" in options else {})
    first = []
    for size in (5, 6, 7, 9):
        samples = [x.requires_grad_() for x in pair(size)[:count]]
        results = []
        for call, kwargs in ((compiled, options), (function, eagerly)):
            torch.manual_seed(3)
            penalty, norms = call(critic, *samples, return_norms=True, **kwargs)
            results.append((norms, *with_gradients(penalty, *critic.parameters(), *samples)))
        assert_same(*results)
        first = first or graphs.symbolic[:]
    if dynamic:  # torch may begin again, when it has seen what of the numbers among the options it can keep
        assert graphs.symbolic == first
        assert all(first)
    else:
        assert graphs.symbolic == [False, True]


def test_marked_as_dynamic(graphs):
    compiled = torch.compile(fused_gradient_penalty, fullgraph=True, backend=graphs)
    for size in (5, 6, 7):
        samples = pair(size)
        for x in samples:
            torch._dynamo.mark_dynamic(x, 0)
        compiled(mlp(), *samples)
    assert graphs.symbolic == [True]


def test_the_ops_compiled_by_the_user(graphs):
    """interpolate and gradient_norm_penalty by themselves."""

    def both(real, fake, alpha):
        x = interpolate(real, fake, alpha)
        return gradient_norm_penalty(x.square(), weight=3.0)

    samples = [x.requires_grad_() for x in pair()]
    alpha = torch.rand(5).double()
    compiled = torch.compile(both, fullgraph=True, backend=graphs)
    assert_same(*[with_gradients(f(*samples, alpha), *samples) for f in (compiled, both)])
    assert len(graphs.symbolic) == 1


@pytest.mark.parametrize("method", ["double_backward", "compiled"])
@pytest.mark.parametrize("inside", [False, True], ids=["optimizer outside", "optimizer inside"])
def test_a_compiled_training_step(graphs, inside, method):
    """The penalty inside a compiled loss, or a compiled step: the weights go where eager's go."""
    ends = []
    start = mlp()
    torch.manual_seed(5)
    steps = [(*pair(), torch.rand(5).double()) for _ in range(4)]
    for is_compiled in (True, False):
        critic = copy.deepcopy(start)
        optimizer = torch.optim.SGD(critic.parameters(), 0.1)

        def update(loss, optimizer=optimizer):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def step(real, fake, alpha, critic=critic, update=update, how=method if is_compiled else "double_backward"):
            loss = critic(fake).mean() - critic(real).mean()
            loss = loss + fused_gradient_penalty(critic, real, fake, alpha=alpha, weight=10, method=how)
            if inside:
                update(loss)
            return loss

        if is_compiled:  # optimizers break the graph
            step = torch.compile(step, fullgraph=not inside, backend=graphs)
        for sample in steps:
            loss = step(*sample)
            if not inside:
                update(loss)
        ends.append([p.detach() for p in critic.parameters()])
    assert_same(*ends)
    assert not any(end.equal(begin) for end, begin in zip(ends[0][:3], start.parameters(), strict=False))
    assert len(graphs.symbolic) < 4, "one for each step"


def test_through_inductor():
    """What users get: with its own random numbers, so alpha is given; batch sizes that change are one more graph."""
    critic, alphas = mlp(), {size: torch.rand(size).double() for size in (5, 6, 8)}
    compiled = torch.compile(fused_gradient_penalty, fullgraph=True)
    for size, alpha in alphas.items():
        samples = pair(size)
        calls = (compiled, fused_gradient_penalty)
        assert_same(*[with_gradients(f(critic, *samples, alpha=alpha), *critic.parameters()) for f in calls])
    assert counters["stats"]["unique_graphs"] == 2


# What fullgraph=True says of an exception that tracing runs into: the exception is quoted.
UNTRACED = {
    "triton": (
        {"backend": "triton"},
        "backend must be 'auto' or 'torch' under torch.compile, torch.func and forward-mode autograd, which see "
        "through no kernel, got 'triton'",
    ),
    "directional": (
        {"method": "directional"},
        "method='directional' evaluates the critic step by step, and cannot be traced by torch.compile, torch.func or "
        "forward-mode autograd: leave it out, or call the penalty outside the compiled function",
    ),
    "chunk_size": (
        {"chunk_size": 2},
        "chunk_size=2 evaluates the critic step by step, and cannot be traced by torch.compile, torch.func or "
        "forward-mode autograd: leave it out, or call the penalty outside the compiled function",
    ),
    "generator": (
        {"generator": torch.Generator()},
        "generator cannot be traced by torch.compile: draw alpha from it outside, and give alpha",
    ),
    "GradScaler": (
        {"grad_scale": torch.amp.GradScaler("cpu", init_scale=8.0)},
        "grad_scale must be a number or a tensor under torch.compile, which cannot trace a GradScaler: give what "
        "scaler.scale(torch.ones(())) is, called outside",
    ),
}


@pytest.mark.parametrize("what", UNTRACED)
def test_what_cannot_be_traced(graphs, what):
    options, message = UNTRACED[what]
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(fused_gradient_penalty, fullgraph=True, backend=graphs)(mlp(), *pair(), **options)
    assert f"raised exception {ValueError(message)!r}" in str(caught.value)


@pytest.mark.parametrize("what", ["directional", "chunk_size"])
@pytest.mark.parametrize("function", [fused_gradient_penalty, r1_penalty], ids=["fused", "r1"])
def test_what_cannot_be_traced_where_graphs_may_break(graphs, function, what):
    """The exception itself."""
    options, message = UNTRACED[what]

    def step(critic, *samples):
        return 2 * function(critic, *samples, **options)

    with pytest.raises(ValueError, match=r"cannot be traced by torch\.compile, ") as caught:
        torch.compile(step, backend=graphs)(mlp(), *pair()[: 1 if function is r1_penalty else 2])
    assert str(caught.value) == message


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4).double()

    def forward(self, x):
        x = self.inner(x)[:, None, None].float().repeat(1, 1, 3, 1)
        return nn.functional.scaled_dot_product_attention(x, x, x).sum((1, 2, 3))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flash_attention_compiled_by_the_user(graphs):
    """The error comes from the compiler, before anything has run, and names the operation. Warnings with the stack of
    the call, which it prints beside, are torch's."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(fused_gradient_penalty, fullgraph=True, backend=graphs)(Attention(), *pair())
    assert "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented" in str(
        caught.value
    )


GIVE_THE_CRITIC = (
    "hand the critic itself to fused_gradient_penalty, r1_penalty or r2_penalty, which can be compiled, and have other "
    "methods"
)


def outputs_first(critic, x):
    return input_gradient_penalty(critic(x), x, weight=10)


def test_input_gradient_penalty_cannot_be_traced(graphs):
    x = pair()[0].requires_grad_()
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(outputs_first, fullgraph=True, backend=graphs)(mlp(), x)
    assert f"input_gradient_penalty cannot be traced by torch.compile: {GIVE_THE_CRITIC}" in str(caught.value)


def test_input_gradient_penalty_where_graphs_may_break(graphs):
    """torch.compile leaves the function that calls it alone, critic and all: the gradient is there, and right."""
    critic, x = mlp(), pair()[0].requires_grad_()
    ours, truth = torch.compile(outputs_first, backend=graphs)(critic, x), outputs_first(critic, x)
    assert_same(with_gradients(ours, *critic.parameters()), with_gradients(truth, *critic.parameters()))


@pytest.mark.parametrize("wrap", [lambda scores: scores, lambda scores: 2 * scores], ids=["directly", "by more"])
def test_outputs_of_a_compiled_critic(graphs, wrap):
    critic, x = torch.compile(mlp(), backend=graphs), pair()[0].requires_grad_()
    with pytest.raises(ValueError, match="differentiated twice") as caught:
        input_gradient_penalty(wrap(critic(x)), x)
    assert str(caught.value) == (
        "outputs must come from a critic that can be differentiated twice, got those of one with a part that "
        f"torch.compile compiled: {GIVE_THE_CRITIC}"
    )
    scores = critic(x)
    with torch.no_grad():  # once is enough for the value
        value = input_gradient_penalty(scores, x)
    torch.testing.assert_close(value, reference.input_gradient_penalty(critic._orig_mod(x), x).detach())


def test_every_kth_call_inside_a_compiled_function(graphs):
    """Each count would be a graph of its own. Where graphs may break, the module steps out of them, and counts."""
    module, critic = GradientPenalty(r1_penalty, every=3), mlp()

    def step(x):
        return 2 * module(critic, x)

    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(step, fullgraph=True, backend=graphs)(pair()[0])
    assert (
        "GradientPenalty(every=3) counts its calls, for each of which torch.compile would compile anew: call it "
        "outside the compiled function, and compile the penalty in it, GradientPenalty(torch.compile(r1_penalty), "
        "every=3)"
    ) in str(caught.value)
    compiled, x = torch.compile(step, backend=graphs), pair()[0]
    value = 6 * r1_penalty(critic, x)
    for call in range(12):
        torch.testing.assert_close(compiled(x), value if call % 3 == 0 else torch.zeros(()), check_dtype=False)
    assert len(graphs.symbolic) < 6


def test_every_kth_call_of_a_compiled_penalty(graphs):
    """As that message says."""
    module = GradientPenalty(torch.compile(r1_penalty, fullgraph=True, backend=graphs), every=3, weight=10.0)
    critic, x = mlp(), pair()[0]
    truth = with_gradients(3 * reference.r1_penalty(critic, x, weight=10.0), *critic.parameters())
    for call in range(12):
        penalty = module(critic, x)
        if call % 3:
            assert penalty == 0
        else:
            assert_same(with_gradients(penalty, *critic.parameters()), truth)
    assert graphs.symbolic == [False]


# torch.func


def of_weights(critic, function, *samples, **options):
    """The penalty as a function of the weights alone."""
    return lambda weights: function(lambda x: functional_call(critic, weights, (x,)), *samples, **options)


@pytest.mark.parametrize("name", ["fused_gradient_penalty", "r1_penalty"])
@pytest.mark.parametrize("options", [{}, {"one_sided": True, "target": 0.1}, {"grad_scale": 8.0}], ids=str)
def test_transforms(name, options):
    """grad, vjp, jacrev and hessian of the penalty are those of plain autograd."""
    critic = mlp()
    if name == "r1_penalty":
        samples, options = pair()[:1], {k: v for k, v in options.items() if k == "grad_scale"}
    else:
        samples, options = pair(), options | {"alpha": 0.4}
    weights = {name: p.detach() for name, p in critic.named_parameters()}
    ours = of_weights(critic, {"r1_penalty": r1_penalty}.get(name, fused_gradient_penalty), *samples, **options)
    truth = getattr(reference, name)(critic, *samples, **options)
    wanted = torch.autograd.grad(truth, list(critic.parameters()), materialize_grads=True)
    assert_same(grad(ours)(weights).values(), wanted)
    value, pull_back = vjp(ours, weights)
    assert_same((value, *pull_back(torch.ones_like(value))[0].values()), (truth.detach(), *wanted))
    assert_same(jacrev(ours)(weights).values(), wanted)

    def of_one(weight, function):
        return of_weights(critic, function, *samples, **options)(weights | {"0.weight": weight})

    weight = weights["0.weight"]
    second = hessian(partial(of_one, function=fused_gradient_penalty if name != "r1_penalty" else r1_penalty))(weight)
    plain = torch.autograd.functional.hessian(partial(of_one, function=getattr(reference, name)), weight)
    assert plain.any()
    torch.testing.assert_close(second, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["double_backward", "compiled", "auto"])
def test_an_ensemble_of_critics(method):
    """vmap over the weights: each critic's penalty and gradient."""
    critics, samples, alpha = [mlp() for _ in range(3)], pair(), torch.rand(5).double()
    weights, _ = stack_module_state(critics)
    penalty = of_weights(critics[0], fused_gradient_penalty, *samples, alpha=alpha, method=method)
    values, gradients = vmap(penalty)(weights), vmap(grad(penalty))(weights)
    for index, critic in enumerate(critics):
        truth = with_gradients(reference.fused_gradient_penalty(critic, *samples, alpha=alpha), *critic.parameters())
        assert_same((values[index].detach(), *[g[index].detach() for g in gradients.values()]), truth)


@pytest.mark.parametrize("function", [fused_gradient_penalty, dragan_penalty], ids=["fused", "dragan"])
def test_an_ensemble_draws_as_vmap_is_told(function):
    critic = mlp()
    weights, _ = stack_module_state([critic, critic])
    samples = pair()[: 1 if function is dragan_penalty else 2]
    penalty = of_weights(critic, function, *samples)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(penalty)(weights)
    one, other = vmap(penalty, randomness="different")(weights)
    assert one != other
    one, other = vmap(penalty, randomness="same")(weights)
    assert one == other


def test_forward_mode():
    """The directional derivative, or an error: nothing drops the tangent, as a kernel would."""
    critic, (real, fake), tangent = mlp(), pair(), pair()[0]
    functions = {
        "interpolate": lambda x, **options: interpolate(x, fake, 0.4, **options).square().sum(),
        "gradient_norm_penalty": gradient_norm_penalty,
        "fused_gradient_penalty": lambda x, **options: fused_gradient_penalty(critic, x, fake, alpha=0.4, **options),
    }
    for function in functions.values():
        leaf = real.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(function(leaf), leaf)
        for x in (real, leaf):
            with dual_level():
                found = unpack_dual(function(make_dual(x, tangent))).tangent
                assert_same([found.detach()], [(wanted * tangent).sum()])
                with pytest.raises(ValueError, match="forward-mode autograd, which see through no kernel"):
                    function(make_dual(x, tangent), backend="triton")
    with dual_level(), pytest.raises(ValueError, match=r"torch.func or forward-mode autograd: leave it out"):
        functions["fused_gradient_penalty"](make_dual(real, tangent), method="directional")


def test_transforms_of_what_cannot_be_transformed():
    critic, samples = mlp(), pair()
    weights = {name: p.detach() for name, p in critic.named_parameters()}
    for options in ({"method": "directional"}, {"chunk_size": 2}):
        with pytest.raises(ValueError, match=r"cannot be traced by torch.compile, torch.func or forward-"):
            grad(of_weights(critic, fused_gradient_penalty, *samples, **options))(weights)

    def checkpointed(x):
        return checkpoint(critic, x, use_reentrant=False)

    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):  # torch's own words, and clear
        grad(lambda x: r1_penalty(checkpointed, x))(samples[0])


def test_input_gradient_penalty_in_a_transform():
    """Of the transform's own input it is right; of a tensor from outside there is nothing to see, which it says."""
    critic, x = mlp(), pair()[0]
    leaf = x.clone().requires_grad_()
    truth = torch.autograd.grad(reference.input_gradient_penalty(critic(leaf), leaf), leaf)
    assert_same([grad(lambda x: input_gradient_penalty(critic(x), x))(x).detach()], truth)
    weights = {name: p.detach() for name, p in critic.named_parameters()}
    with pytest.raises(ValueError, match="outputs must depend on inputs"):
        grad(lambda weights: input_gradient_penalty(functional_call(critic, weights, (leaf,)), leaf))(weights)


# Checkpointing, and hooks on what autograd saves


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.SiLU()).double(), nn.Linear(6, 1).double()
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=self.use_reentrant))


# The tolerance of each method in fp64, relative and absolute.
METHODS = {"double_backward": 1e-10, "auto": 1e-10, "directional": 1e-7}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing(method, chunk_size):
    critic, samples = Checkpointed(use_reentrant=False), pair()
    kept = nn.Sequential(critic.body, critic.head)
    ours = fused_gradient_penalty(critic, *samples, alpha=0.5, method=method, chunk_size=chunk_size)
    truth = reference.fused_gradient_penalty(kept, *samples, alpha=0.5)
    for actual, expected in zip(
        with_gradients(ours, *critic.parameters()), with_gradients(truth, *critic.parameters()), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=METHODS[method], atol=METHODS[method])


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("method", METHODS)
def test_reentrant_checkpointing(method, chunk_size):
    """torch allows no input gradient through it, not even a first one."""
    remedy = r"reentrant checkpointing. Use torch.utils.checkpoint.checkpoint\(..., use_reentrant=False\).$"
    with pytest.raises(ValueError, match=remedy):
        fused_gradient_penalty(Checkpointed(use_reentrant=True), *pair(), method=method, chunk_size=chunk_size)


def test_checkpointing_compiled_by_the_user(graphs):
    """torch's own words. It leaves hooks disabled ever after, unless somebody gives them back."""
    critic, penalise = Checkpointed(use_reentrant=False), torch.compile(fused_gradient_penalty, backend=graphs)
    with disable_saved_tensors_hooks("by this test"), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        penalise(critic, *pair())
    assert "don't yet support saved tensor hooks" in str(caught.value)


@pytest.mark.parametrize("over", ["the call", "the backward too"])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("method", METHODS)
def test_hooks_on_saved_tensors(method, chunk_size, over):
    """What is saved goes elsewhere and comes back: gradients are the same, and it does go."""
    critic, samples, packed = mlp(), pair(), []

    def pack(tensor):
        packed.append(tensor.detach().clone())
        return packed[-1]

    truth = with_gradients(reference.fused_gradient_penalty(critic, *samples, alpha=0.5), *critic.parameters())
    for hooks in (save_on_cpu(), saved_tensors_hooks(pack, lambda tensor: tensor)):
        with hooks:
            penalty = fused_gradient_penalty(critic, *samples, alpha=0.5, method=method, chunk_size=chunk_size)
            if over == "the backward too":
                ours = with_gradients(penalty, *critic.parameters())
        if over == "the call":
            ours = with_gradients(penalty, *critic.parameters())
        for actual, expected in zip(ours, truth, strict=True):
            torch.testing.assert_close(actual, expected, rtol=METHODS[method], atol=METHODS[method])
    assert packed


# CUDA graphs


def test_a_capture_cannot_rewind_the_generator(monkeypatch):
    """Said before the generator does, in words that help."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="a CUDA graph cannot capture critics that run again"):
        Reruns(Critic(nn.Identity()), torch.device("cuda"))
    Reruns(Critic(nn.Identity()), torch.device("cpu"))


def captured_step(penalise, *inputs):
    """A CUDA graph of this, warmed up on a stream of its own as torch asks, and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            penalise(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = penalise(*inputs)
    return graph, outputs


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 2}, {"method": "compiled"}, {"grad_scale": 8.0, "target": 0.0}], ids=str
)
def test_a_whole_penalty_step_is_captured(options):
    """Replayed on other samples, it gives their penalty and gradients."""
    critic = mlp().cuda()
    real, fake, alpha = [*(x.cuda() for x in pair(6)), torch.rand(6, dtype=torch.float64, device="cuda")]

    def penalise(real, fake, alpha):
        penalty, norms = fused_gradient_penalty(critic, real, fake, alpha=alpha, return_norms=True, **options)
        return norms, *with_gradients(penalty, *critic.parameters())

    graph, outputs = captured_step(penalise, real, fake, alpha)
    for _ in range(3):
        for tensor in (real, fake):
            tensor.normal_()
        alpha.uniform_()
        graph.replay()
        truth = {k: v for k, v in options.items() if k in ("grad_scale", "target")}
        penalty, norms = reference.fused_gradient_penalty(critic, real, fake, alpha=alpha, return_norms=True, **truth)
        assert_same(outputs, (norms, *with_gradients(penalty, *critic.parameters())))


@pytest.mark.gpu
def test_a_captured_step_draws_alpha_anew():
    critic, samples = mlp().cuda(), [x.cuda() for x in pair()]
    graph, penalty = captured_step(lambda real, fake: fused_gradient_penalty(critic, real, fake).detach(), *samples)
    values = set()
    for _ in range(5):
        graph.replay()
        values.add(penalty.item())
    assert len(values) == 5


@pytest.mark.gpu
def test_a_capture_refuses_directional():
    critic, samples = mlp().cuda(), [x.cuda() for x in pair()]
    with pytest.raises(ValueError, match="a CUDA graph cannot capture critics that run again"):
        captured_step(lambda *xs: fused_gradient_penalty(critic, *xs, method="directional"), *samples)


@pytest.mark.gpu
def test_reduce_overhead():
    """torch.compile's own CUDA graphs."""
    critic, compiled = mlp().cuda(), torch.compile(fused_gradient_penalty, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        samples, alpha = [x.cuda() for x in pair()], torch.rand(5, dtype=torch.float64, device="cuda")
        ours = [t.clone() for t in with_gradients(compiled(critic, *samples, alpha=alpha), *critic.parameters())]
        truth = reference.fused_gradient_penalty(critic, *samples, alpha=alpha)
        assert_same(ours, with_gradients(truth, *critic.parameters()))
