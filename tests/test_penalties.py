"""The penalties of a critic, as users call them: values, random numbers, gradients, memory."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from fused_gp import GradientPenalty, dragan_penalty, fused_gradient_penalty, r1_penalty, reference
from tests.support.family import ours_and_reference
from tests.support.gradients import gradients
from tests.support.samples import doubles
from tests.support.tolerances import assert_same


def fifteen_lines(critic, real, fake):
    """The gradient penalty as it is usually written."""
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
def test_same_numbers_as_the_fifteen_lines_under_one_seed(place, batch, swapped):
    """With a critic with dropout: value, weight gradients, and the generator's state afterwards."""
    critic = conv_critic().to(place.device)
    real, fake = (t.to(place.device) for t in batch)
    torch.manual_seed(7)
    expected = fifteen_lines(critic, fake, real) if swapped else fifteen_lines(critic, real, fake)
    expected_grads = gradients(expected, critic.parameters())
    expected_next = torch.rand(1, device=place.device)
    torch.manual_seed(7)
    samples = (fake, real) if swapped else (real, fake)
    penalty = fused_gradient_penalty(critic, *samples, backend=place.backend)
    grads = gradients(penalty, critic.parameters())
    torch.testing.assert_close(penalty, expected)
    for actual, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, expected)
    assert torch.rand(1, device=place.device).equal(expected_next)


CRITICS = {
    "mlp": lambda: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.LeakyReLU(0.2), torch.nn.Linear(16, 1)
    ),
    "conv, patches": lambda: torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 1, 3)
    ),
    "layer norm, (B,)": lambda: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(),
        torch.nn.Linear(8, 1), torch.nn.Flatten(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"one_sided": True, "target": 0.2}, {"reduction": "sum", "weight": 10.0}])
@pytest.mark.parametrize("critic", CRITICS)
def test_value_norms_and_weight_gradients(place, critic, options):
    """Under one seed, compared with the reference."""
    critic = CRITICS[critic]().double().to(place.device)
    real, fake = (torch.randn(4, 3, 4, 4, dtype=torch.float64, device=place.device) for _ in range(2))
    results = []
    for function, extra in ours_and_reference("fused_gradient_penalty", backend=place.backend):
        torch.manual_seed(3)
        penalty, norms = function(critic, real, fake, return_norms=True, **options, **extra)
        weights = gradients(penalty, critic.parameters())
        results.append((penalty, norms, *weights, torch.rand(1, device=place.device)))
    assert_same(*results)


def test_weight_gradients_by_finite_differences(place):
    """Of a small critic; and gradients of an attached fake batch."""
    real = doubles(3, 4).to(place.device)
    weight, last, fake = (doubles(*shape).to(place.device).requires_grad_() for shape in ((4, 5), (5,), (3, 4)))

    def function(weight, last, fake):
        def critic(x):
            return torch.nn.functional.silu(x @ weight) @ last

        return fused_gradient_penalty(critic, real, fake, alpha=0.3, backend=place.backend)

    assert gradcheck(function, (weight, last, fake))


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3), (3, 2, 2, 2), (17, 1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alpha_is_drawn_as_rand_of_b_by_ones(shape, dtype):
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
    """The same numbers as under a global seed; the global generator is not used, and a given alpha is not drawn."""
    critic = conv_critic().eval()
    torch.manual_seed(5)
    expected = dragan_penalty(critic, batch[0], alpha=alpha)
    expected_next = torch.rand(1)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    assert dragan_penalty(critic, batch[0], alpha=alpha, generator=generator).equal(expected)
    assert torch.rand(1, generator=generator).equal(expected_next)
    assert torch.get_rng_state().equal(before)


def test_the_critic_runs_once_with_its_arguments(batch):
    calls = []

    def critic(x, label, *, scale):
        calls.append((label, scale))
        return (x * scale).sum((1, 2, 3)) + label

    label = torch.arange(5.0)
    penalty, norms = fused_gradient_penalty(
        critic, *batch, critic_args=(label,), critic_kwargs={"scale": 2.0}, return_norms=True
    )
    assert calls == [(label, 2.0)]
    expected = 2 * (3 * 8 * 8) ** 0.5
    torch.testing.assert_close(norms, torch.full((5,), expected))
    assert penalty.item() == pytest.approx((expected - 1) ** 2, rel=1e-5)


def test_gradients_reach_the_generator_of_fake(place, batch):
    """As with autograd, and real too where it requires grad."""
    critic = conv_critic().eval().double().to(place.device)
    noise, weight = torch.randn(5, 4).double().to(place.device), torch.randn(4, 192).double().to(place.device)
    real = batch[0].double().to(place.device)
    results = []
    for function, options in ours_and_reference("fused_gradient_penalty", backend=place.backend):
        w, r = weight.clone().requires_grad_(), real.clone().requires_grad_()
        fake = torch.tanh(noise @ w).view(5, 3, 8, 8)
        penalty = function(critic, r, fake, alpha=0.4, **options)
        results.append(torch.autograd.grad(penalty, (w, r), materialize_grads=True))
    assert_same(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_value_without_gradients(place, batch, mode):
    """For logging a validation penalty: no graph, and nothing requires grad afterwards."""
    critic = conv_critic().eval().to(place.device)
    real, fake = (t.to(place.device) for t in batch)
    expected = fused_gradient_penalty(critic, real, fake, alpha=0.3, backend=place.backend)
    with mode():
        copy_of_real = real.clone()  # an inference tensor, in inference mode
        alpha = torch.full((5,), 0.3, device=place.device)
        penalty, norms = fused_gradient_penalty(
            critic, copy_of_real, fake, alpha=alpha, backend=place.backend, return_norms=True
        )
    assert not penalty.requires_grad
    assert not norms.requires_grad
    torch.testing.assert_close(penalty, expected.detach())


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
    """The gradient would silently be that with respect to the changed input."""
    critic = nn.Sequential(nn.LeakyReLU(0.2, inplace=True), nn.Linear(4, 1))
    fake = torch.randn(3, 4, requires_grad=True)
    changed = "critic must leave its input as it is, got one that changes it in place: use inplace=False$"
    with pytest.raises(ValueError, match=changed):
        fused_gradient_penalty(critic, torch.randn(3, 4), fake)
    with pytest.raises(RuntimeError, match="in-place"):  # torch's own error where no sample requires grad
        fused_gradient_penalty(critic, torch.randn(3, 4), fake.detach())
    critic[0].inplace = False  # what the message names
    assert fused_gradient_penalty(critic, torch.randn(3, 4), fake).isfinite()


def test_tensors_of_the_caller_are_not_changed(batch):
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


def test_other_functions_of_the_samples_are_constants(place):
    """The critic runs at points of the package's own: a weight that the caller computed from the same tensor is a
    constant there."""
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


def test_a_frozen_critic_gives_a_gradient_to_fake(batch):
    """A generator's step: no gradient for the critic."""
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
    fp32 = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
    with torch.autocast(place.device, dtype):
        penalty = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
        expected = reference.fused_gradient_penalty(critic, real, fake, alpha=0.5)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(penalty, fp32, rtol=0.02, atol=0.02)
    grads, expected_grads = (torch.autograd.grad(p, critic[0].weight) for p in (penalty, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=2**-7, atol=1e-3)


def test_half_precision_critic(place, batch):
    critic = conv_critic().eval().to(place.device, torch.bfloat16)
    real, fake = (t.to(place.device, torch.bfloat16) for t in batch)
    penalty = fused_gradient_penalty(critic, real, fake, alpha=0.5, backend=place.backend)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert critic[0].weight.grad.isfinite().all()


def test_tensors_and_critics_are_freed(batch):
    """No tensor outlives its step, and a critic can be collected after calls."""
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
    reference_to_critic = weakref.ref(critic)
    del critic
    gc.collect()
    assert reference_to_critic() is None


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_does_not_grow_over_training_steps():
    """2,000 steps, each with another kind of penalty, its backward and the optimizer's step. A (64, 256) fp32 tensor
    leaked at each of the last 1,600 would be 100 MiB; a leaked graph several times that."""
    torch.manual_seed(0)
    critic = torch.nn.Sequential(torch.nn.Linear(256, 32), torch.nn.LeakyReLU(0.2), torch.nn.Linear(32, 1))
    optimizer = torch.optim.Adam(critic.parameters(), 1e-4)
    every, lazy = GradientPenalty(weight=10.0), GradientPenalty(r1_penalty, every=4)
    real, fake = torch.randn(64, 256), torch.randn(64, 256)
    penalties = [
        lambda: fused_gradient_penalty(critic, real, fake, return_norms=True)[0],
        lambda: r1_penalty(critic, real),
        lambda: every(critic, real, fake),
        lambda: lazy(critic, real) + fused_gradient_penalty(lambda x: critic(x), real, fake, grad_scale=8.0),
    ]

    def steps(count):
        for step in range(count):
            optimizer.zero_grad()
            penalties[step % len(penalties)]().backward()
            optimizer.step()
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return tensors, resident_bytes()

    tensors, resident = steps(400)
    tensors_after, resident_after = steps(1600)
    assert tensors_after <= tensors  # fewer, when tensors of other tests were freed
    leak = 1600 * real.numel() * real.element_size()
    assert resident_after - resident < leak / 5, f"{(resident_after - resident) / 2**20:.1f} MiB more"
