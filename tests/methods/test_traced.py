"""The penalty under the user's own torch.compile, under torch.func and forward-mode autograd."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
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
from tests.support.compiling import COMPILES
from tests.support.critics import ViT, mlp
from tests.support.gradients import gradients, value_and_gradients
from tests.support.samples import fp32_images, vectors
from tests.support.tolerances import assert_same

pytestmark = [pytest.mark.usefixtures("one_thread"), *COMPILES]

CALLS = {
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


@pytest.mark.parametrize("dynamic", [None, True], ids=["inferred", "declared"])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_penalties_are_eager_ones(graphs, name, dynamic):
    """In one graph: value, norms, and gradients of weights and samples, under the same seed; a second graph serves all
    batch sizes but the first, or one serves all."""
    function, count, options = CALLS[name]
    critic = mlp().double()
    compiled = torch.compile(function, fullgraph=True, backend=graphs, dynamic=dynamic)
    eagerly = options | ({"method": "double_backward"} if "method" in options else {})
    first = []
    for size in (5, 6, 7, 9):
        samples = [x.requires_grad_() for x in vectors(size)[:count]]
        results = []
        for call, kwargs in ((compiled, options), (function, eagerly)):
            torch.manual_seed(3)
            penalty, norms = call(critic, *samples, return_norms=True, **kwargs)
            results.append((norms, *value_and_gradients(penalty, *critic.parameters(), *samples)))
        assert_same(*results)
        first = first or graphs.symbolic[:]
    if dynamic:  # torch may compile again, when it knows which numbers among the options are constant
        assert graphs.symbolic == first
        assert all(first)
    else:
        assert graphs.symbolic == [False, True]


def test_a_batch_marked_as_dynamic_has_one_graph(graphs):
    compiled = torch.compile(fused_gradient_penalty, fullgraph=True, backend=graphs)
    for size in (5, 6, 7):
        samples = vectors(size)
        for x in samples:
            torch._dynamo.mark_dynamic(x, 0)
        compiled(mlp().double(), *samples)
    assert graphs.symbolic == [True]


def test_compiled_ops_are_eager_ones(graphs):
    """interpolate and gradient_norm_penalty, without a critic."""

    def both(real, fake, alpha):
        x = interpolate(real, fake, alpha)
        return gradient_norm_penalty(x.square(), weight=3.0)

    samples = [x.requires_grad_() for x in vectors()]
    alpha = torch.rand(5).double()
    compiled = torch.compile(both, fullgraph=True, backend=graphs)
    assert_same(*[value_and_gradients(f(*samples, alpha), *samples) for f in (compiled, both)])
    assert len(graphs.symbolic) == 1


@pytest.mark.parametrize("method", ["double_backward", "compiled"])
@pytest.mark.parametrize("inside", [False, True], ids=["optimizer outside", "optimizer inside"])
def test_a_compiled_training_step_trains_the_same_weights(graphs, inside, method):
    """The penalty inside a compiled loss, or inside a compiled step."""
    trained = []
    start = mlp().double()
    torch.manual_seed(5)
    steps = [(*vectors(), torch.rand(5).double()) for _ in range(4)]
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
        trained.append([p.detach() for p in critic.parameters()])
    assert_same(*trained)
    assert not any(end.equal(begin) for end, begin in zip(trained[0][:3], start.parameters(), strict=False))
    assert len(graphs.symbolic) < 4, "compiled at each step"


def test_penalty_compiled_by_inductor():
    """As users run it. Inductor draws other random numbers, so alpha is given; other batch sizes are one more graph."""
    critic, alphas = mlp().double(), {size: torch.rand(size).double() for size in (5, 6, 8)}
    compiled = torch.compile(fused_gradient_penalty, fullgraph=True)
    for size, alpha in alphas.items():
        samples = vectors(size)
        calls = (compiled, fused_gradient_penalty)
        assert_same(*[value_and_gradients(f(critic, *samples, alpha=alpha), *critic.parameters()) for f in calls])
    assert counters["stats"]["unique_graphs"] == 2


# With fullgraph=True the compiler quotes the exception that tracing raised.
NOT_TRACEABLE = {
    "triton": (
        {"backend": "triton"},
        "backend must be 'auto' or 'torch' under torch.compile, torch.func and forward-mode autograd, which cannot "
        "trace a kernel, got 'triton'",
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


@pytest.mark.parametrize("what", NOT_TRACEABLE)
def test_options_that_cannot_be_traced_are_refused(graphs, what):
    options, message = NOT_TRACEABLE[what]
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(fused_gradient_penalty, fullgraph=True, backend=graphs)(mlp().double(), *vectors(), **options)
    quoted = f"{message!r}", f"[ConstantVariable(str: {message!r})]"  # the latter by torch 2.11 and older
    assert any(f"raised exception ValueError({each})" in str(caught.value) for each in quoted)


@pytest.mark.parametrize("what", ["directional", "chunk_size"])
@pytest.mark.parametrize("function", [fused_gradient_penalty, r1_penalty], ids=["fused", "r1"])
def test_options_that_cannot_be_traced_are_refused_where_graphs_may_break(graphs, function, what):
    """With the exception itself."""
    options, message = NOT_TRACEABLE[what]

    def step(critic, *samples):
        return 2 * function(critic, *samples, **options)

    with pytest.raises(ValueError, match=r"cannot be traced by torch\.compile, ") as caught:
        torch.compile(step, backend=graphs)(mlp().double(), *vectors()[: 1 if function is r1_penalty else 2])
    assert str(caught.value) == message


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flash_attention_is_named_by_the_compiler(graphs):
    """The error comes from the compiler, before anything has run, and names the operation. The compiler also warns with
    the stack of the call."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(fused_gradient_penalty, fullgraph=True, backend=graphs)(ViT(), *fp32_images(5))
    assert "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented" in str(
        caught.value
    )


GIVE_THE_CRITIC = (
    "pass the critic itself to fused_gradient_penalty, r1_penalty or r2_penalty, which can be compiled, and have other "
    "methods"
)


def penalty_of_outputs(critic, x):
    return input_gradient_penalty(critic(x), x, weight=10)


def test_input_gradient_penalty_cannot_be_traced(graphs):
    x = vectors()[0].requires_grad_()
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(penalty_of_outputs, fullgraph=True, backend=graphs)(mlp().double(), x)
    assert f"input_gradient_penalty cannot be traced by torch.compile: {GIVE_THE_CRITIC}" in str(caught.value)


def test_input_gradient_penalty_runs_eagerly_where_graphs_may_break(graphs):
    """torch.compile does not compile the function that calls it, nor the critic in it: the gradient is right."""
    critic, x = mlp().double(), vectors()[0].requires_grad_()
    ours, expected = torch.compile(penalty_of_outputs, backend=graphs)(critic, x), penalty_of_outputs(critic, x)
    assert_same(value_and_gradients(ours, *critic.parameters()), value_and_gradients(expected, *critic.parameters()))


@pytest.mark.parametrize("wrap", [lambda scores: scores, lambda scores: 2 * scores], ids=["directly", "by more"])
def test_outputs_of_a_compiled_critic_are_refused(graphs, wrap):
    critic, x = torch.compile(mlp().double(), backend=graphs), vectors()[0].requires_grad_()
    with pytest.raises(ValueError, match="differentiated twice") as caught:
        input_gradient_penalty(wrap(critic(x)), x)
    assert str(caught.value) == (
        "outputs must come from a critic that can be differentiated twice, got those of one with a part that "
        f"torch.compile compiled: {GIVE_THE_CRITIC}"
    )
    scores = critic(x)
    with torch.no_grad():  # the value needs the first derivative alone
        value = input_gradient_penalty(scores, x)
    torch.testing.assert_close(value, reference.input_gradient_penalty(critic._orig_mod(x), x).detach())


def test_a_lazy_module_cannot_be_traced(graphs):
    """Each count would be a graph of its own. Where graphs may break, the module runs outside of them, and counts."""
    module, critic = GradientPenalty(r1_penalty, every=3), mlp().double()

    def step(x):
        return 2 * module(critic, x)

    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(step, fullgraph=True, backend=graphs)(vectors()[0])
    assert (
        "GradientPenalty(every=3) counts its calls, for each of which torch.compile would compile anew: call it "
        "outside the compiled function, and compile the penalty in it, GradientPenalty(torch.compile(r1_penalty), "
        "every=3)"
    ) in str(caught.value)
    compiled, x = torch.compile(step, backend=graphs), vectors()[0]
    value = 6 * r1_penalty(critic, x)
    for call in range(12):
        torch.testing.assert_close(compiled(x), value if call % 3 == 0 else torch.zeros(()), check_dtype=False)
    assert len(graphs.symbolic) < 6


def test_a_lazy_module_of_a_compiled_penalty(graphs):
    """As the error of the test above says."""
    module = GradientPenalty(torch.compile(r1_penalty, fullgraph=True, backend=graphs), every=3, weight=10.0)
    critic, x = mlp().double(), vectors()[0]
    expected = value_and_gradients(3 * reference.r1_penalty(critic, x, weight=10.0), *critic.parameters())
    for call in range(12):
        penalty = module(critic, x)
        if call % 3:
            assert penalty == 0
        else:
            assert_same(value_and_gradients(penalty, *critic.parameters()), expected)
    assert graphs.symbolic == [False]


def as_function_of_weights(critic, function, *samples, **options):
    """The penalty as a function of the weights alone."""
    return lambda weights: function(lambda x: functional_call(critic, weights, (x,)), *samples, **options)


@pytest.mark.parametrize("name", ["fused_gradient_penalty", "r1_penalty"])
@pytest.mark.parametrize("options", [{}, {"one_sided": True, "target": 0.1}, {"grad_scale": 8.0}], ids=str)
def test_transforms_are_those_of_plain_autograd(name, options):
    """grad, vjp, jacrev and hessian."""
    critic = mlp().double()
    if name == "r1_penalty":
        samples, options = vectors()[:1], {k: v for k, v in options.items() if k == "grad_scale"}
    else:
        samples, options = vectors(), options | {"alpha": 0.4}
    weights = {name: p.detach() for name, p in critic.named_parameters()}
    ours = as_function_of_weights(
        critic, {"r1_penalty": r1_penalty}.get(name, fused_gradient_penalty), *samples, **options
    )
    expected = getattr(reference, name)(critic, *samples, **options)
    expected_gradients = gradients(expected, critic.parameters())
    assert_same(grad(ours)(weights).values(), expected_gradients)
    value, pull_back = vjp(ours, weights)
    assert_same((value, *pull_back(torch.ones_like(value))[0].values()), (expected.detach(), *expected_gradients))
    assert_same(jacrev(ours)(weights).values(), expected_gradients)

    def of_one(weight, function):
        return as_function_of_weights(critic, function, *samples, **options)(weights | {"0.weight": weight})

    weight = weights["0.weight"]
    second = hessian(partial(of_one, function=fused_gradient_penalty if name != "r1_penalty" else r1_penalty))(weight)
    plain = torch.autograd.functional.hessian(partial(of_one, function=getattr(reference, name)), weight)
    assert plain.any()
    torch.testing.assert_close(second, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["double_backward", "compiled", "auto"])
def test_vmap_over_an_ensemble_of_critics(method):
    """Gives each critic's penalty and gradient."""
    critics, samples, alpha = [mlp().double() for _ in range(3)], vectors(), torch.rand(5).double()
    weights, _ = stack_module_state(critics)
    penalty = as_function_of_weights(critics[0], fused_gradient_penalty, *samples, alpha=alpha, method=method)
    values, grads = vmap(penalty)(weights), vmap(grad(penalty))(weights)
    for index, critic in enumerate(critics):
        expected = value_and_gradients(
            reference.fused_gradient_penalty(critic, *samples, alpha=alpha), *critic.parameters()
        )
        assert_same((values[index].detach(), *[g[index].detach() for g in grads.values()]), expected)


@pytest.mark.parametrize("function", [fused_gradient_penalty, dragan_penalty], ids=["fused", "dragan"])
def test_alpha_is_drawn_by_the_randomness_of_vmap(function):
    critic = mlp().double()
    weights, _ = stack_module_state([critic, critic])
    samples = vectors()[: 1 if function is dragan_penalty else 2]
    penalty = as_function_of_weights(critic, function, *samples)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(penalty)(weights)
    one, other = vmap(penalty, randomness="different")(weights)
    assert one != other
    one, other = vmap(penalty, randomness="same")(weights)
    assert one == other


def test_forward_mode_gives_the_directional_derivative():
    """Or an error where a kernel would drop the tangent."""
    critic, (real, fake), tangent = mlp().double(), vectors(), vectors()[0]
    functions = {
        "interpolate": lambda x, **options: interpolate(x, fake, 0.4, **options).square().sum(),
        "gradient_norm_penalty": gradient_norm_penalty,
        "fused_gradient_penalty": lambda x, **options: fused_gradient_penalty(critic, x, fake, alpha=0.4, **options),
    }
    for function in functions.values():
        leaf = real.clone().requires_grad_()
        (expected_gradients,) = torch.autograd.grad(function(leaf), leaf)
        for x in (real, leaf):
            with dual_level():
                tangents = unpack_dual(function(make_dual(x, tangent))).tangent
                assert_same([tangents.detach()], [(expected_gradients * tangent).sum()])
                with pytest.raises(ValueError, match="forward-mode autograd, which cannot trace a kernel"):
                    function(make_dual(x, tangent), backend="triton")
    with dual_level(), pytest.raises(ValueError, match=r"torch.func or forward-mode autograd: leave it out"):
        functions["fused_gradient_penalty"](make_dual(real, tangent), method="directional")


def test_options_that_cannot_be_transformed_are_refused():
    critic, samples = mlp().double(), vectors()
    weights = {name: p.detach() for name, p in critic.named_parameters()}
    for options in ({"method": "directional"}, {"chunk_size": 2}):
        with pytest.raises(ValueError, match=r"cannot be traced by torch.compile, torch.func or forward-"):
            grad(as_function_of_weights(critic, fused_gradient_penalty, *samples, **options))(weights)

    def checkpointed(x):
        return checkpoint(critic, x, use_reentrant=False)

    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):  # torch's own message
        grad(lambda x: r1_penalty(checkpointed, x))(samples[0])


def test_input_gradient_penalty_in_a_transform():
    """It is right for the transform's own input, and an error for a tensor from outside, of which the transform has no
    graph."""
    critic, x = mlp().double(), vectors()[0]
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(reference.input_gradient_penalty(critic(leaf), leaf), leaf)
    assert_same([grad(lambda x: input_gradient_penalty(critic(x), x))(x).detach()], expected)
    weights = {name: p.detach() for name, p in critic.named_parameters()}
    with pytest.raises(ValueError, match="outputs must depend on inputs"):
        grad(lambda weights: input_gradient_penalty(functional_call(critic, weights, (leaf,)), leaf))(weights)


def test_a_layer_thawed_since_has_its_gradient_after_a_reset(graphs):
    """As docs/methods.md says; without it torch before 2.12 leaves the layer without one."""
    critic, samples = mlp().double(), vectors()
    layer = next(module for module in critic.modules() if isinstance(module, nn.Linear))
    penalty_function = torch.compile(fused_gradient_penalty, backend=graphs)
    layer.requires_grad_(False)
    penalty_function(critic, *samples, alpha=0.5).backward()
    layer.requires_grad_(True)
    torch.compiler.reset()
    penalties = (
        penalty_function(critic, *samples, alpha=0.5),
        reference.fused_gradient_penalty(critic, *samples, alpha=0.5),
    )
    assert_same(*[value_and_gradients(penalty, *critic.parameters()) for penalty in penalties])
