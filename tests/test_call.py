"""The drop-in call as its users meet it."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_gp import dragan_penalty, fused_gradient_penalty, gradient_norm_penalty, r1_penalty, reference
from fused_gp.ops import backends, torch_ops


def snippet(critic, real, fake):
    """The fifteen lines, as everybody writes them."""
    alpha = torch.rand(real.size(0), 1, 1, 1, device=real.device)
    x_hat = (alpha * fake + (1 - alpha) * real).requires_grad_(True)
    scores = critic(x_hat)
    gradients = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True, retain_graph=True)[0]
    norms = torch.sqrt((gradients.flatten(1) ** 2).sum(1) + 1e-12)
    return ((norms - 1) ** 2).mean()


def conv_critic():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8 * 16, 1)
    )


@pytest.fixture
def batch():
    return torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)


@pytest.mark.parametrize("swapped", [False, True], ids=["alpha on fake", "alpha on real"])
def test_same_seed_same_numbers_as_the_snippet(place, batch, swapped):
    """Draw for draw, a critic with dropout included: value, weight gradients, and the generator's state after."""
    critic = conv_critic().to(place.device)
    real, fake = (t.to(place.device) for t in batch)
    torch.manual_seed(7)
    wanted = snippet(critic, fake, real) if swapped else snippet(critic, real, fake)
    wanted_grads = torch.autograd.grad(wanted, list(critic.parameters()), materialize_grads=True)
    wanted_next = torch.rand(1, device=place.device)
    torch.manual_seed(7)
    pair = (fake, real) if swapped else (real, fake)
    penalty = fused_gradient_penalty(critic, *pair, backend=place.backend)
    grads = torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True)
    torch.testing.assert_close(penalty, wanted)
    for actual, expected in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(actual, expected)
    assert torch.rand(1, device=place.device).equal(wanted_next)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3), (3, 2, 2, 2), (17, 1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_generator_is_consumed_as_rand_of_b_by_ones(shape, dtype):
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.sum().expand(shape[0])

    real, fake = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    for generator in (None, torch.Generator().manual_seed(5)):
        torch.manual_seed(5)
        fused_gradient_penalty(critic, real, fake, generator=generator)
        after = torch.rand(3, generator=generator)
        torch.manual_seed(5)
        alpha = torch.rand(shape[0], *[1] * (len(shape) - 1))
        assert seen.pop().equal(alpha.to(dtype).expand(shape))
        assert after.equal(torch.rand(3))


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_dragan_draws_noise_and_then_alpha_from_the_generator(batch, alpha):
    """The same numbers as under a global seed, whose own generator is left alone; a given alpha is not drawn."""
    critic = conv_critic().eval()
    torch.manual_seed(5)
    wanted = dragan_penalty(critic, batch[0], alpha=alpha)
    wanted_next = torch.rand(1)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    assert dragan_penalty(critic, batch[0], alpha=alpha, generator=generator).equal(wanted)
    assert torch.rand(1, generator=generator).equal(wanted_next)
    assert torch.get_rng_state().equal(before)


def test_the_critic_runs_once_and_sees_its_arguments(batch):
    calls = []

    def critic(x, label, *, scale):
        calls.append((label, scale))
        return (x * scale).sum((1, 2, 3)) + label

    label = torch.arange(5.0)
    penalty, norms = fused_gradient_penalty(
        critic, *batch, critic_args=(label,), critic_kwargs={"scale": 2.0}, return_norms=True
    )
    assert calls == [(label, 2.0)]
    wanted = 2 * (3 * 8 * 8) ** 0.5
    torch.testing.assert_close(norms, torch.full((5,), wanted))
    assert penalty.item() == pytest.approx((wanted - 1) ** 2, rel=1e-5)


def test_fake_attached_to_a_generator(place, batch):
    """Gradients flow into the generator as autograd would send them, and into real too where it asks for them."""
    critic = conv_critic().eval().double().to(place.device)
    noise, weight = torch.randn(5, 4).double().to(place.device), torch.randn(4, 192).double().to(place.device)
    real = batch[0].double().to(place.device)
    results = []
    for function, options in (
        (fused_gradient_penalty, {"backend": place.backend}),
        (reference.fused_gradient_penalty, {}),
    ):
        w, r = weight.clone().requires_grad_(), real.clone().requires_grad_()
        fake = torch.tanh(noise @ w).view(5, 3, 8, 8)
        penalty = function(critic, r, fake, alpha=0.4, **options)
        results.append(torch.autograd.grad(penalty, (w, r), materialize_grads=True))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(place, batch, mode):
    """For logging a validation penalty: the value, no graph, and nothing left requiring grad."""
    critic = conv_critic().eval().to(place.device)
    real, fake = (t.to(place.device) for t in batch)
    wanted = fused_gradient_penalty(critic, real, fake, alpha=0.3, backend=place.backend)
    with mode():
        made_inside = real.clone()  # an inference tensor, in inference mode
        alpha = torch.full((5,), 0.3, device=place.device)
        penalty, norms = fused_gradient_penalty(
            critic, made_inside, fake, alpha=alpha, backend=place.backend, return_norms=True
        )
    assert not penalty.requires_grad
    assert not norms.requires_grad
    torch.testing.assert_close(penalty, wanted.detach())


def test_inference_mode_with_labels_made_inside():
    weight = torch.randn(4, requires_grad=True)

    def critic(x, label, *, other):
        return (x * label * other["label"] * weight).sum(1).square()

    with torch.inference_mode():
        real, fake, label = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
        kwargs = {"other": {"label": label}}
        penalty = fused_gradient_penalty(critic, real, fake, critic_args=(label,), critic_kwargs=kwargs)
    assert penalty.isfinite()
    assert not penalty.requires_grad


def test_critic_that_changes_its_input_is_refused():
    """The gradient would be that with respect to what the critic made of its input, silently."""
    critic = nn.Sequential(nn.LeakyReLU(0.2, inplace=True), nn.Linear(4, 1))
    fake = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="critic must leave its input as it is, got one that changes it in place"):
        fused_gradient_penalty(critic, torch.randn(3, 4), fake)
    with pytest.raises(RuntimeError, match="in-place"):  # torch itself refuses where nothing is attached
        fused_gradient_penalty(critic, torch.randn(3, 4), fake.detach())


def test_nothing_of_the_callers_is_changed(batch):
    critic = conv_critic()
    real, fake = batch
    fake.requires_grad_()
    state = copy.deepcopy(critic.state_dict())
    before = real.clone(), fake.detach().clone()
    fused_gradient_penalty(critic, real, fake)
    assert real.equal(before[0])
    assert fake.equal(before[1])
    assert not real.requires_grad
    assert fake.requires_grad
    assert fake.grad is None
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    for name, value in critic.state_dict().items():
        assert value.equal(state[name])


def test_what_else_is_computed_from_the_samples_has_no_part_in_the_gradient(place):
    """The critic is asked at points of ours: a weight that the caller took from the same tensor is a constant there."""
    real = torch.randn(4, 3, dtype=torch.float64, device=place.device, requires_grad=True)
    factor = real.square().sum(1)
    _, norms = r1_penalty(lambda x: x.sum(1) * factor, real, return_norms=True, backend=place.backend)
    torch.testing.assert_close(norms, factor.detach() * 3**0.5)


def test_r1_on_samples_made_in_inference_mode(place):
    """Data loaders run under inference_mode; the training step does not."""
    with torch.inference_mode():
        real = torch.randn(4, 3, device=place.device)
    weight = torch.ones(3, device=place.device, requires_grad=True)
    r1_penalty(lambda x: (x * weight).sum(1).square(), real, backend=place.backend).backward()
    assert weight.grad.abs().max() > 0


def test_the_default_device_leaves_nothing_behind(place):
    """Numbers that are kept from call to call belong to no device; neither does a number for grad_scale."""
    x = torch.randn(4, 6, device=place.device)
    options = {"weight": 11.25, "eps": 0.015, "backend": place.backend}
    with torch.device("meta"):
        inside = gradient_norm_penalty(x, **options)
        fused_gradient_penalty(lambda x: x.square().sum(1), x, x, alpha=0.5, grad_scale=8.0, backend=place.backend)
    torch.testing.assert_close(inside, reference.gradient_norm_penalty(x, weight=11.25, eps=0.015))
    assert gradient_norm_penalty(x, **options).equal(inside)


def test_fake_tensors_leave_nothing_behind():
    """FakeTensorMode, in which people estimate memory, and then a real call with the same numbers."""
    options = {"weight": 7.125, "eps": 0.03125}
    with FakeTensorMode():
        gradient_norm_penalty(torch.randn(4, 6), **options)
    x = torch.randn(4, 6)
    torch.testing.assert_close(gradient_norm_penalty(x, **options), reference.gradient_norm_penalty(x, **options))


def test_fake_tensors_of_a_device_get_no_kernels():
    """A kernel would be launched on the address zero, and fake counters be kept for the launches after it."""
    with FakeTensorMode() as mode:
        fake = torch.randn(4, 6)
        with pytest.raises(ValueError, match="backend='triton' cannot run on a FakeTensor"):
            gradient_norm_penalty(fake, backend="triton")
    on_device = FakeTensor(mode, torch.empty(4, 6, device="meta"), torch.device("cuda", 0))
    assert backends.backend_for("auto", on_device) is torch_ops


def test_frozen_critic(batch):
    """A generator's step: no gradient for the critic, one for the fake batch."""
    critic = conv_critic().eval().requires_grad_(False)
    real, fake = batch
    fake.requires_grad_()
    penalty = fused_gradient_penalty(nn.Sequential(critic, nn.Tanh()), real, fake, alpha=0.5)
    penalty.backward()
    assert fake.grad is not None
    assert all(p.grad is None for p in critic.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(place, batch, dtype):
    """The critic computes in half precision; the penalty is accumulated and returned in fp32."""
    critic = conv_critic().eval().to(place.device)
    real, fake = (t.to(place.device) for t in batch)
    exact = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
    with torch.autocast(place.device, dtype):
        penalty = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
        wanted = reference.fused_gradient_penalty(critic, real, fake, alpha=0.5)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, wanted)
    torch.testing.assert_close(penalty, exact, rtol=0.02, atol=0.02)
    grads, wanted_grads = (torch.autograd.grad(p, critic[0].weight) for p in (penalty, wanted))
    torch.testing.assert_close(grads, wanted_grads, rtol=2**-7, atol=1e-3)


def test_half_precision_critic(place, batch):
    critic = conv_critic().eval().to(place.device, torch.bfloat16)
    real, fake = (t.to(place.device, torch.bfloat16) for t in batch)
    penalty = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert critic[0].weight.grad.isfinite().all()


def test_batch_norm_in_training_is_warned_of_once(batch):
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_gradient_penalty(critic, *batch)  # in eval mode it is a fixed affine map
    critic.train()
    with pytest.warns(UserWarning, match=r"batch normalisation in training mode \(1\)") as caught:
        fused_gradient_penalty(critic, *batch)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_gradient_penalty(critic, *batch)


def test_repeated_calls_leak_nothing(batch):
    """No tensor outlives its step, and a critic that was looked at can be collected."""
    critic = conv_critic()

    def alive():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(12):
        penalty, _ = fused_gradient_penalty(critic, *batch, return_norms=True)
        penalty.backward()
        critic.zero_grad()
        del penalty, _
        counts.append(alive())
    assert len(set(counts[1:])) == 1
    gone = weakref.ref(critic)
    del critic
    gc.collect()
    assert gone() is None


def test_many_norms_wait_for_no_other_thread():
    """torch.sqrt of more than 2048 numbers does, and on busy cores takes a thousand times as long as the rest."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    seen = set()
    gradients = torch.randn(4096, 2, requires_grad=True)
    with Names():
        gradient_norm_penalty((gradients, gradients)).backward()
    assert "hypot" in seen
    assert not any("sqrt" in name for name in seen)
