"""One callable that runs another critic at another call, or state that no run of a module shows."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import spectral_norm

from fused_gp import fused_gradient_penalty, reference
from tests.support.samples import doubles

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["double_backward", "directional", "auto"]


def with_spectral_norm(width=4):
    """Its buffers change at every run in training."""
    return nn.Sequential(spectral_norm(nn.Linear(width, 6)), nn.SiLU(), spectral_norm(nn.Linear(6, 1))).double()


def assert_exact(critic, nets, method, width=4, **options):
    """Value, weight gradients and buffers as those of plain autograd, in one run from the same state."""
    real, fake = doubles(5, width), doubles(5, width)
    alpha = torch.rand(5, dtype=torch.float64)
    weights = [p for net in nets for p in net.parameters()]
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    random = torch.get_rng_state()

    def run(penalty, **more):
        for net, state in zip(nets, before, strict=True):
            net.load_state_dict(state)
        torch.set_rng_state(random)
        value = penalty(critic, real, fake, alpha=alpha, **options, **more)
        found = torch.autograd.grad(value, weights, materialize_grads=True)
        return value.detach(), found, [b.clone() for net in nets for b in net.buffers()]

    value, gradients, buffers = run(fused_gradient_penalty, method=method)
    wanted_value, wanted_gradients, wanted_buffers = run(reference.fused_gradient_penalty)
    torch.testing.assert_close(value, wanted_value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(buffers, wanted_buffers, rtol=1e-14, atol=1e-14)
    for actual, expected in zip(gradients, wanted_gradients, strict=True):
        assert (actual - expected).norm() <= 1e-8 * max(1.0, expected.norm().item())


class Stages(nn.Module):
    """A GAN grown progressively: a number says which of its critics is trained."""

    def __init__(self):
        super().__init__()
        self.critics, self.stage = nn.ModuleList([with_spectral_norm() for _ in range(2)]), 0

    def score(self, x):
        return self.critics[self.stage](x)


class Owner:
    def __init__(self, critic):
        self.critic = critic


@pytest.mark.parametrize("method", METHODS)
def test_by_an_argument(method):
    nets = {name: with_spectral_norm() for name in ("coarse", "fine")}

    def critic(x, name):
        return nets[name](x)

    for name in ("coarse", "fine", "coarse"):
        assert_exact(critic, list(nets.values()), method, critic_args=(name,))
        assert_exact(critic, list(nets.values()), method, critic_kwargs={"name": name})


@pytest.mark.parametrize("method", METHODS)
def test_by_the_samples_shape(method):
    nets = {width: with_spectral_norm(width) for width in (4, 7)}

    def critic(x):
        return nets[x.shape[1]](x)

    for width in (4, 7, 4):
        assert_exact(critic, list(nets.values()), method, width)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["lambda", "method"])
def test_by_a_number_of_a_module(form, method):
    stages = Stages()
    for stage in (0, 1, 0):
        stages.stage = stage
        assert_exact(stages.score if form == "method" else lambda x: stages.score(x), [stages], method)


@pytest.mark.parametrize("method", METHODS)
def test_by_an_exchange_deep_inside_while_the_old_one_lives(method):
    trainer, nets = Owner(nn.Module()), [with_spectral_norm() for _ in range(2)]
    for net in (*nets, *nets):
        trainer.critic.inner = nn.ModuleDict({"critic": net})
        assert_exact(lambda x: trainer.critic.inner["critic"](x), nets, method)


@pytest.mark.parametrize("method", METHODS)
def test_by_chance(method):
    nets = [with_spectral_norm() for _ in range(2)]
    for _ in range(5):
        assert_exact(lambda x: nets[int(torch.rand(()) < 0.5)](x), nets, method)


@pytest.mark.parametrize("first", ["double_backward", "directional", "no_grad"])
def test_auto_after_a_call_that_ran_another(first):
    """What is known of the other says nothing of the buffers from which this one is tried."""
    nets = [with_spectral_norm() for _ in range(2)]

    def over(number):
        return lambda x: nets[number](x)

    if first == "no_grad":
        with torch.no_grad():
            fused_gradient_penalty(over(0), doubles(5, 4), doubles(5, 4))
    else:
        fused_gradient_penalty(over(0), doubles(5, 4), doubles(5, 4), method=first)
    assert_exact(over(1), nets, "auto")
    nets[0].eval()
    assert_exact(over(1), nets, "auto")


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return upstream * (1 - ctx.saved_tensors[0].tanh() ** 2)


def test_auto_refuses_another_kind_of_critic():
    """In the call, not in a later backward: what was chosen for the other does not work for this one."""
    owner = Owner(None)
    owner.critics, owner.current = [nn.SiLU(), OnceDifferentiable.apply], 0

    def critic(x):
        return owner.critics[owner.current](x)

    fused_gradient_penalty(critic, doubles(5, 4), doubles(5, 4), method="auto")
    owner.current = 1
    with pytest.raises(ValueError, match=r"must differentiate the critic twice, and found .*method='directional'"):
        fused_gradient_penalty(critic, doubles(5, 4), doubles(5, 4), method="auto")
    # What the message names, applied: tanh as a Function, and as torch's own operation.
    real, fake = doubles(5, 4).requires_grad_(), doubles(5, 4)
    penalty = fused_gradient_penalty(critic, real, fake, alpha=0.25, method="directional")
    wanted = reference.fused_gradient_penalty(torch.tanh, real, fake, alpha=0.25)
    torch.testing.assert_close(penalty, wanted)
    gradients = [torch.autograd.grad(value, real)[0] for value in (penalty, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


class WithoutHash:
    def __hash__(self):
        raise RuntimeError("no hash")


def test_an_object_without_a_hash():
    net, thing = with_spectral_norm(), WithoutHash()
    assert_exact(lambda x: net(x) * (thing is not None), [net], "directional")


class Normaliser(nn.Module):
    """Running statistics of what it is given, as in adversarial motion priors; used by its method, not by a call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def normalise(self, x):
        y = torch.tanh(x - self.mean)
        with torch.no_grad():
            self.count += 1
            self.mean += (x.detach().mean(0) - self.mean) / self.count
        return y


class Normalising(nn.Module):
    def __init__(self):
        super().__init__()
        self.normaliser = Normaliser()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 1)).double()

    def score(self, x):
        return self.net(self.normaliser.normalise(x))


def held_deeper(critic):
    trainer = Owner(Owner(critic))
    return lambda x: trainer.critic.critic.score(x)


def held_in_a_dict_of_an_object(critic):
    trainer = Owner({"critic": critic})
    return lambda x: trainer.critic["critic"].score(x)


def held_by_an_object(critic):
    trainer = Owner(critic)
    return lambda x: trainer.critic.score(x)


HELD = {
    "parts": lambda critic: lambda x: critic.net(critic.normaliser.normalise(x)),
    "method": lambda critic: critic.score,
    "object": held_by_an_object,
    "object of an object": held_deeper,
    "dict of an object": held_in_a_dict_of_an_object,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("held", HELD)
def test_buffers_of_a_part_that_is_not_called(held, method):
    critic = Normalising()
    for _ in range(2):
        assert_exact(HELD[held](critic), [critic], method)


COMPILED = None  # the compiled function of the next test


def compiled_in_closure(net):
    compiled = torch.compile(lambda x: net(x), backend="eager")
    return lambda x: compiled(x)


def compiled_in_a_global(net):
    globals()["COMPILED"] = torch.compile(lambda x: net(x), backend="eager")
    return lambda x: COMPILED(x)


def compiled_in_an_attribute(net):
    trainer = Owner(torch.compile(lambda x: net(x), backend="eager"))
    return lambda x: trainer.critic(x)


def compiled_in_place(net):
    trainer = Owner(Owner(Owner(net)))
    net.compile(backend="eager")
    return lambda x: trainer.critic.critic.critic(x)


class Unregistered(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.blocks = [block]

    def forward(self, x):
        return self.blocks[0](x)


def compiled_module(net):
    return torch.compile(Unregistered(net), backend="eager")


@pytest.mark.compiles
@pytest.mark.parametrize("method", ["directional", "auto"])
@pytest.mark.parametrize(
    "build",
    [compiled_in_closure, compiled_in_a_global, compiled_in_an_attribute, compiled_in_place, compiled_module],
)
def test_buffers_of_what_is_compiled(build, method):
    """From the first call on."""
    torch._dynamo.reset()
    net = with_spectral_norm()
    critic = build(net)
    for _ in range(2):
        assert_exact(critic, [net], method)


@pytest.mark.compiles
@pytest.mark.parametrize("what", ["critics", "generator"])
def test_another_critic_is_seen_beside_what_is_compiled(what):
    """One that is not smooth, chosen by a number, is refused however smooth the first was."""
    torch._dynamo.reset()
    trainer, nets = Owner(None), [nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 1)) for act in (nn.SiLU, nn.ReLU)]
    trainer.critics, trainer.current = [net.double() for net in nets], 0
    if what == "critics":
        trainer.critics = [torch.compile(net, backend="eager") for net in nets]
    else:
        trainer.generator = torch.compile(nn.Linear(4, 4), backend="eager")

    def critic(x):
        return trainer.critics[trainer.current](x)

    fused_gradient_penalty(critic, doubles(5, 4), doubles(5, 4), method="directional")
    trainer.current = 1
    with pytest.raises(ValueError, match="needs a smooth critic, and found Relu"):
        fused_gradient_penalty(critic, doubles(5, 4), doubles(5, 4), method="directional")
