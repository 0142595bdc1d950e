"""A critic is watched while it runs: what is known of it is what ran, whatever it is behind, and has a bound."""

import copy
import functools
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrizations import spectral_norm

from fused_gp import fused_gradient_penalty, reference
from fused_gp.critics import autograd_graph
from fused_gp.critics import critic as critics
from fused_gp.critics.critic import Critic
from fused_gp.critics.profile import Bounded
from tests.support.samples import doubles

pytestmark = pytest.mark.usefixtures("one_thread")


def samples():
    return doubles(5, 4), doubles(5, 4)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 1)).double()


def with_spectral_norm():
    """Its buffers change at every run in training."""
    return nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.SiLU(), spectral_norm(nn.Linear(6, 1))).double()


def with_batch_norm():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()


def assert_exact(critic, modules, method, tolerance=1e-8):
    """Weight gradients and buffers as plain autograd has them, in one run of a copy."""
    truth, truth_modules = copy.deepcopy((critic, modules)) if isinstance(critic, nn.Module) else (critic, modules)
    before = [copy.deepcopy(m.state_dict()) for m in modules]
    real, fake = samples()
    alpha = torch.rand(5, dtype=torch.float64)
    weights = [p for m in modules for p in m.parameters()]
    ours = torch.autograd.grad(
        fused_gradient_penalty(critic, real, fake, alpha=alpha, method=method), weights, materialize_grads=True
    )
    after = [[b.clone() for b in m.buffers()] for m in modules]
    if truth is critic:
        for m, state in zip(modules, before, strict=True):
            m.load_state_dict(state)
    truth_weights = [p for m in truth_modules for p in m.parameters()]
    wanted = torch.autograd.grad(
        reference.fused_gradient_penalty(truth, real, fake, alpha=alpha), truth_weights, materialize_grads=True
    )
    for actual, expected in zip(ours, wanted, strict=True):
        assert (actual - expected).norm() <= tolerance * max(1.0, expected.norm().item())
    for actual, m in zip(after, truth_modules, strict=True):
        torch.testing.assert_close(actual, list(m.buffers()), rtol=0, atol=0)


METHODS = ["double_backward", "directional", "auto"]


class Unregistered(nn.Module):
    """Its blocks are in a plain list, so that they are not among its modules."""

    def __init__(self, block):
        super().__init__()
        self.blocks, self.head = [block], nn.Linear(1, 1).double()

    def forward(self, x):
        return self.head(self.blocks[0](x))


@pytest.mark.parametrize("method", METHODS)
def test_modules_outside_of_the_critics_own(method):
    """Their buffers are kept and restored too."""
    critic = Unregistered(with_spectral_norm())
    for _ in range(2):
        assert_exact(critic, [critic, critic.blocks[0]], method)


def test_batch_norm_outside_of_the_critics_own_modules():
    with pytest.warns(UserWarning, match=r"batch normalisation in training mode \(1\)"):
        fused_gradient_penalty(Unregistered(with_batch_norm()), *samples())


def test_a_part_that_runs_before_the_whole():
    """Is a part of the critic, not another root of it: named once."""
    net = nn.Sequential(with_batch_norm(), nn.Linear(1, 1).double())

    def critic(x):
        return net[0](x) + net(x)

    with pytest.warns(UserWarning, match=r"batch normalisation in training mode \(0\.1\)"):
        fused_gradient_penalty(critic, *samples())
    assert Critic(critic).profile.roots() == [net]


class Counting(nn.Module):
    """A method that is not `forward` writes a buffer of its module."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("runs", torch.zeros((), dtype=torch.float64))

    def score(self, x):
        self.runs += 1
        return self.net(x) * (1 + self.runs / 10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["method", "lambda"])
def test_buffers_of_the_owner_of_a_method(form, method):
    owner = Counting()
    for _ in range(2):
        assert_exact(owner.score if form == "method" else lambda x: owner.score(x), [owner], method)


class Nested:
    """Its critic is two objects further down, chosen by a number."""

    def __init__(self, nets):
        self.inner, self.current = type("Inner", (), {})(), 0
        self.inner.nets = nets

    def score(self, x):
        return self.inner.nets[self.current](x)


@pytest.mark.parametrize("method", METHODS)
def test_another_critic_behind_the_same_callable(method):
    """By a number in its closure, by a number in its owner, by an exchange deep inside of the owner."""
    nets = [with_spectral_norm() for _ in range(3)]
    owner = Nested(nets[:2])

    def critic(x):
        return nets[number](x)

    for number in (0, 1, 0):
        assert_exact(critic, [nets[number]], method)
        owner.current = number
        assert_exact(owner.score, [nets[number]], method)
    owner.inner.nets[0] = nets[2]
    assert_exact(owner.score, [nets[2]], method)


@pytest.mark.parametrize("method", ["double_backward", "directional", "auto", "compiled"])
def test_the_first_call_changes_no_more_than_a_later_one(method, monkeypatch):
    """A callable that is watched in a run of its own leaves buffers and random state as they were."""
    if method == "compiled":
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    net = nn.Sequential(with_spectral_norm()[:2], nn.Dropout(0.5), nn.Linear(6, 1).double())
    steps = []
    for _ in range(2):
        state = copy.deepcopy(net.state_dict())
        torch.manual_seed(1)
        fused_gradient_penalty(lambda x: net(x), *samples(), method=method)
        steps.append((torch.rand(3), *[b.clone() for b in net.buffers()]))
        net.load_state_dict(state)
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "lambda"])
def test_double_backward_runs_the_critic_once(wrap):
    net, runs = mlp(), []
    net.register_forward_hook(lambda *_: runs.append(1))
    for calls in (1, 2):
        fused_gradient_penalty(wrap(net), *samples())
        assert len(runs) == calls


@pytest.fixture
def looks(monkeypatch):
    found = []
    original = autograd_graph.nodes
    monkeypatch.setattr(autograd_graph, "nodes", lambda outputs: found.append(1) or original(outputs))
    return found


class Graph:
    """A batch of data: another object at every step."""

    def __init__(self):
        self.size = torch.ones(())


@pytest.mark.parametrize("method", METHODS)
def test_new_data_in_a_closure_is_no_new_critic(looks, method):
    """Objects, tensors, numbers, and modules that are made for one run: nothing is checked again, nothing is added."""
    net = mlp()

    def over(data, labels, numbers):
        return lambda x: nn.Flatten()(net(x)) * data.size * numbers["share"] + labels[:, None]

    for step in range(4):
        fused_gradient_penalty(over(Graph(), torch.randn(5), {"share": step / 7}), *samples(), method=method)
        if step == 0:
            looks.clear()
    assert not looks
    assert len(critics._profiles[net]) == 1


def test_labels_and_numbers_in_a_closure_are_recognised():
    """Without watching another run."""
    net = mlp()

    def over(labels, share):
        return lambda x: net(x) * share + labels[:, None]

    fused_gradient_penalty(over(torch.randn(5), 0.5), *samples())
    assert Critic(over(torch.randn(5), 0.6)).known
    assert not Critic(over(torch.randn(5).half(), 0.6)).known


def over_closure(net):
    return lambda x: net(x)


def over_default(net):
    return lambda x, net=net: net(x)


def over_keyword(net):
    return lambda x, *, net=net: net(x)


def over_partial(net):
    return functools.partial(lambda net, x: net(x), net)


def over_list(net):
    nets = [net]
    return lambda x: nets[0](x)


def over_helper(net):
    score = over_closure(net)
    return lambda x: score(x)


def over_wrapper(net):
    return torch.enable_grad()(net)  # a function of torch's own, as that of vmap


OVER = [over_closure, over_default, over_keyword, over_partial, over_list, over_helper, over_wrapper]


@pytest.mark.parametrize("over", OVER, ids=lambda f: f.__name__)
def test_callables_of_one_line_over_two_critics(over):
    """What is known of the first, which is still there, says nothing of the second."""
    nets = [with_batch_norm() for _ in range(2)]
    for net in nets:
        with pytest.warns(UserWarning, match="batch normalisation in training mode"):
            fused_gradient_penalty(over(net), *samples())


CURRENT = None  # the critic of the next test


@pytest.mark.parametrize("critic", [lambda x: CURRENT(x), lambda x: (lambda y: CURRENT(y))(x)], ids=["own", "inner"])
def test_another_critic_in_a_global(critic, monkeypatch):
    nets = [with_batch_norm() for _ in range(2)]
    for net in nets:
        monkeypatch.setitem(globals(), "CURRENT", net)
        with pytest.warns(UserWarning, match="batch normalisation in training mode"):
            fused_gradient_penalty(critic, *samples())


class Owner:
    def __init__(self):
        self.critic = None

    def score(self, x):
        return self.critic(x)

    def over_itself(self):
        return lambda x: self.critic(x)


class ModuleOwner(nn.Module):
    score, over_itself = Owner.score, Owner.over_itself


@pytest.mark.parametrize("owner", [Owner, ModuleOwner])
@pytest.mark.parametrize("form", ["method", "lambda"])
def test_another_critic_in_an_attribute(owner, form):
    """A trainer exchanges its critic."""
    trainer, nets = owner(), [with_batch_norm() for _ in range(2)]
    for net in nets:
        trainer.critic = net
        with pytest.warns(UserWarning, match=r"batch normalisation in training mode \(critic\.1\)"):
            fused_gradient_penalty(trainer.score if form == "method" else trainer.over_itself(), *samples())


def test_what_is_known_has_a_bound(looks):
    """Words in a closure make another critic of it; only so many are known at a time."""
    net = mlp()

    def over(prompt):
        return lambda x: net(x) * len(prompt)

    for step in range(250):
        fused_gradient_penalty(over(str(step)), *samples())
        assert len(critics._profiles[net]) <= 100
        assert len(critics._recognised) <= 100
    assert looks

    profile = Critic(net).profile
    for step in range(250):
        fused_gradient_penalty(net, *samples(), step=step + 1.0, method="directional")
    known = [value for value in vars(profile).values() if isinstance(value, dict)]
    assert len(known) == 7
    assert all(isinstance(value, Bounded) for value in known)


def test_bounded():
    known = Bounded()
    for key in range(100):
        known[key] = key
    known[5] = 0
    assert len(known) == 100
    known[100] = 0
    assert known == {100: 0}


def test_no_hook_is_left_behind():
    """Nor after an error in the critic."""

    def fails(x):
        net(x)
        raise KeyError("in the critic")

    net = mlp()
    fused_gradient_penalty(lambda x: net(x), *samples())
    for method in ("double_backward", "directional", "auto"):
        with pytest.raises(KeyError, match="in the critic"):
            fused_gradient_penalty(fails, *samples(), method=method)
    assert not torch_module._global_forward_pre_hooks


def test_other_threads_are_not_watched():
    """A module that runs elsewhere meanwhile is no part of the critic."""
    net, elsewhere = mlp(), with_batch_norm()

    def critic(x):
        thread = threading.Thread(target=lambda: elsewhere(torch.randn(5, 4, dtype=torch.float64)))
        thread.start()
        thread.join()
        return net(x)

    fused_gradient_penalty(critic, *samples())  # warnings are errors here
    assert Critic(critic).profile.roots() == [net]


def test_a_profile_lives_no_longer_than_its_critic():
    def profile_of_a_critic():
        net = mlp()
        fused_gradient_penalty(lambda x: net(x), *samples(), method="directional")
        profile = weakref.ref(next(iter(critics._profiles[net].values())))
        assert profile() is not None
        return profile

    profile = profile_of_a_critic()
    gc.collect()
    assert profile() is None


def compiled_module(net, backend):
    compiled = torch.compile(net, backend=backend)
    return lambda x: compiled(x)


def compiled_function(net, backend):
    return torch.compile(lambda x: net(x), backend=backend)


class Trainer:
    """Has a generator with batch normalisation beside a compiled critic."""

    def __init__(self, net, backend):
        self.generator, self.critic = nn.BatchNorm1d(4), torch.compile(net, backend=backend)

    def score(self, x):
        return self.critic(x)


def compiled_attribute(net, backend):
    return Trainer(net, backend).score


def compiled_critic(net, backend):
    return torch.compile(net, backend=backend)


def compiled_function_of_an_object(net, backend):
    trainer = Owner()
    trainer.critic = torch.compile(lambda x: net(x), backend=backend)
    return lambda x: trainer.critic(x)


def compiled_global(net, backend):
    globals()["CURRENT"] = torch.compile(lambda x: net(x), backend=backend)
    return lambda x: CURRENT(x)


def compiled_part(net, backend):
    return nn.Sequential(nn.Identity(), torch.compile(net, backend=backend))


@pytest.mark.compiles
@pytest.mark.parametrize("first", ["loss", "penalty"])
@pytest.mark.parametrize(
    "build",
    [compiled_module, compiled_function, compiled_attribute, compiled_function_of_an_object, compiled_global,
     compiled_critic, compiled_part],
)  # fmt: skip
def test_compiled_critics_are_watched_without_compiling_the_hook(build, first):
    """No warning of torch's about hooks, and no graph that is compiled for the hook alone."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = with_spectral_norm()
    critic, (real, fake) = build(net, backend), samples()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if first == "loss":
            critic(real)
        fused_gradient_penalty(critic, real, fake, method="directional").backward()
        compiled = len(graphs)
        critic(real)
        fused_gradient_penalty(critic, real, fake, method="directional").backward()
    assert len(graphs) == compiled
    assert {id(part) for part in Critic(critic).modules()} >= {id(part) for part in net.modules()}
