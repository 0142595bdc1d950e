"""chunk_size: the penalty and gradients of the whole batch, in training too; memory does not grow with the batch."""

import gc
import weakref

import pytest
import torch
from torch import nn

import fused_gp
from fused_gp import GradientPenalty, fused_gradient_penalty, r1_penalty, reference
from fused_gp.critics import autograd_graph
from tests.support.critics import Conditional, conv, mlp, spectrally_normalised
from tests.support.gradients import gradients, relative_error
from tests.support.places import to_device
from tests.support.samples import fp32_images, vectors
from tests.support.tolerances import assert_same, assert_same_sums

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"reduction": "sum", "weight": 10.0}, {"one_sided": True, "target": 0.1}, {"target": 0.0}, {"eps": 0.0},
        {"grad_scale": 64.0}, {"grad_scale": torch.tensor(64.0)},
    ],
    ids=str,
)  # fmt: skip
def test_every_chunk_size_and_form_gives_the_gradients_of_the_whole_batch(place, options, chunk_size):
    critic = mlp(activation=nn.LeakyReLU).double().to(place.device)
    real, fake = to_device(vectors(7), place.device)
    options = to_device(options, place.device)

    def run(function, **more):
        torch.manual_seed(1)
        penalty, norms = function(critic, real, fake, return_norms=True, **options, **more)
        return penalty.detach(), norms, *gradients(3 * penalty, critic.parameters())

    ours = run(fused_gradient_penalty, chunk_size=chunk_size, backend=place.backend)
    assert_same_sums(ours, run(reference.fused_gradient_penalty))


@pytest.mark.parametrize("name", ["r1_penalty", "r2_penalty", "dragan_penalty"])
def test_r1_r2_and_dragan_in_chunks(name):
    critic, (real, _) = mlp().double(), vectors(7)

    def run(module, **options):
        torch.manual_seed(1)
        return gradients(getattr(module, name)(critic, real, **options), critic.parameters())

    assert_same_sums(run(fused_gp, chunk_size=3), run(reference))


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_samples_alpha_and_arguments_get_gradients(chunk_size):
    """Arguments are cut where the batch is their first dimension, and passed whole elsewhere."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 1)

        def forward(self, x, labels, *, shifts):
            return self.head(torch.tanh(self.body(x) + labels + shifts["a"] * shifts["b"][0]))

    critic, generator = Critic().double(), nn.Linear(3, 6).double()
    real, noise = vectors(7)[0].requires_grad_(), vectors(7, 3)[0]
    table, shift = torch.randn(7, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    alpha = torch.rand(7, dtype=torch.float64, requires_grad=True)
    wanted = [*critic.parameters(), *generator.parameters(), real, table, shift, alpha]

    def run(function, **options):
        kwargs = {"shifts": {"a": 3 * shift, "b": [torch.ones(1).double(), "a word", None]}}
        penalty = function(
            critic, real, generator(noise), alpha=alpha, critic_args=(2 * table,), critic_kwargs=kwargs, **options
        )
        return gradients(penalty, wanted)

    ours = run(fused_gradient_penalty, chunk_size=chunk_size)
    assert_same_sums(ours, run(reference.fused_gradient_penalty))
    assert sum(gradient.any().item() for gradient in ours) == len(ours) - 1  # all but the last bias


def test_chunks_are_multiples_of_groups():
    critic = nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(1), mlp(width=12)).double()
    real, fake = vectors(10)

    def run(function, **options):
        torch.manual_seed(1)
        return gradients(function(critic, real, fake, group_size=2, **options), critic.parameters())

    assert_same_sums(run(fused_gradient_penalty, chunk_size=4), run(reference.fused_gradient_penalty))
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(ValueError, match=r"^chunk_size must be a multiple of group_size, 2, got 3$"),
        ):
            fused_gradient_penalty(critic, real, fake, group_size=2, chunk_size=3)


def test_labels_are_cut_with_the_samples():
    critic, (real, fake) = Conditional().double(), vectors(5)
    options = {"alpha": 0.3, "critic_args": (torch.tensor([0, 2, 1, 2, 0]),), "critic_kwargs": {"strength": 0.5}}
    ours = fused_gradient_penalty(critic, real, fake, chunk_size=2, **options)
    expected = reference.fused_gradient_penalty(critic, real, fake, **options)
    assert_same_sums(gradients(ours, critic.parameters()), gradients(expected, critic.parameters()))


def test_training_in_chunks_gives_the_same_weights():
    """Critic loss and penalty in one backward, accumulated over two batches, Adam."""
    results = []
    for chunk_size in (None, 2):
        torch.manual_seed(0)
        critic = mlp().double()
        optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
        for _ in range(3):
            for _ in range(2):
                real, fake = vectors(7)
                loss = critic(fake).mean() - critic(real).mean()
                (loss + fused_gradient_penalty(critic, real, fake, weight=10, chunk_size=chunk_size)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(critic.parameters()))
    assert_same_sums(results[1], results[0])


@pytest.mark.parametrize("method", ["double_backward", "directional"])
def test_autocast_with_a_gradscaler(method):
    """bf16 autocast, a scaled loss, gradients in fp32: those of the whole batch to the rounding of bf16, which depends
    on the chunks."""
    critic, (real, fake) = conv(), fp32_images(6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))

    def run(chunk_size):
        critic.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            penalty = fused_gradient_penalty(
                critic, real, fake, alpha=0.5, method=method, chunk_size=chunk_size, grad_scale=scaler
            )
        scaler.scale(penalty).backward()
        assert all(p.grad.dtype == torch.float32 for p in critic.parameters() if p.grad is not None)
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in critic.parameters()])

    whole, ours = run(None), run(2)
    assert relative_error(ours, whole) < 2**-6
    assert ours.norm() > 100  # it has the factor of the scale


def test_half_precision_weights_are_summed_in_fp32():
    """512 gradients of 1 + 2^-8 of a bf16 critic: a sum in bf16 would stop growing at 256."""
    critic = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    critic.weight.data.fill_(1.0)
    ones = torch.ones(512, 1, dtype=torch.bfloat16)
    fused_gradient_penalty(critic, ones, ones, target=0.0, weight=0.5, reduction="sum", chunk_size=1).backward()
    assert critic.weight.grad.item() == 512.0


def test_the_gradient_is_that_of_the_weights_in_the_call():
    """And of its random state, whatever changes before the backward."""
    critic, (real, fake) = nn.Sequential(mlp(), nn.Dropout(0.5)).double(), vectors(7)
    torch.manual_seed(1)
    expected = gradients(fused_gradient_penalty(critic, real, fake, chunk_size=2), critic.parameters())
    torch.manual_seed(1)
    penalty = fused_gradient_penalty(critic, real, fake, chunk_size=2)
    torch.manual_seed(9)
    with torch.no_grad():
        for p in critic.parameters():
            p += 1
    assert_same_sums(gradients(penalty, critic.parameters()), expected)


def test_dropout_draws_chunk_by_chunk():
    critic, (real, fake), alpha = nn.Sequential(mlp(), nn.Dropout(0.5)).double(), vectors(6), torch.rand(6).double()
    torch.manual_seed(1)
    parts = [
        reference.fused_gradient_penalty(critic, *(x[at : at + 2] for x in (real, fake)), alpha=alpha[at : at + 2])
        for at in (0, 2, 4)
    ]
    expected = gradients(sum(parts) / 3, critic.parameters())
    torch.manual_seed(1)
    ours = fused_gradient_penalty(critic, real, fake, alpha=alpha, chunk_size=2)
    assert_same_sums(gradients(ours, critic.parameters()), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_one_call_takes_one_step_of_spectral_norm(grad):
    """Gradients and buffers are those of one run on the whole batch."""
    results = []
    for chunk_size in (None, 2):
        torch.manual_seed(0)
        critic = spectrally_normalised().double()
        with torch.set_grad_enabled(grad):
            penalty = fused_gradient_penalty(critic, *vectors(7), chunk_size=chunk_size)
        grads = gradients(penalty, critic.parameters()) if grad else ()
        results.append((penalty.detach(), *grads, *critic.buffers()))
    assert_same_sums(results[1], results[0])


def test_only_one_gradient_per_parameter_is_saved():
    """The penalty has no graph behind it; and when a chunk begins, the activations of the one before are freed."""

    class WithLastActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = mlp(), None

        def forward(self, x):
            if armed:
                assert self.last is None or self.last() is None, "activations of the chunk before are not freed"
            hidden = self.body[0](x)
            self.last = weakref.ref(hidden.untyped_storage())
            return self.body[2](self.body[1](hidden))

    critic, armed = WithLastActivation().double(), False
    fused_gradient_penalty(critic, *vectors(7), chunk_size=2)  # the first call examines the critic
    critic.last, armed = None, True
    penalty = fused_gradient_penalty(critic, *vectors(7), chunk_size=2)
    names = {node.name() for node in autograd_graph.nodes([penalty])}
    assert names == {"PrecomputedGradientsBackward", "torch::autograd::AccumulateGrad"}
    saved = penalty.grad_fn.saved_tensors
    assert [g.shape for g in saved] == [p.shape for p in critic.parameters()]


def test_gradients_of_a_chunk_are_freed_before_the_next():
    """Except for their sum."""
    shape, alive = (7, 13), []

    class CountingGradients(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x):
            gc.collect()
            alive.append(sum(type(o) in (torch.Tensor, nn.Parameter) and o.shape == shape for o in gc.get_objects()))
            return torch.tanh(x @ self.weight.T).sum(1)

    critic = CountingGradients()
    real, fake = torch.randn(8, 13), torch.randn(8, 13)
    for _ in range(2):  # the first call examines the critic too
        alive.clear()
        fused_gradient_penalty(critic, real, fake, chunk_size=2)
    assert max(alive) == 2  # the weight, and the sum of its gradients


def test_parameters_without_a_gradient_get_zeros():
    """DDP waits for a gradient of every parameter."""
    critic, (real, fake) = mlp().double(), vectors(7)
    fused_gradient_penalty(critic, real, fake, chunk_size=2).backward()
    assert critic[2].bias.grad.equal(torch.zeros(1, dtype=torch.float64))


def test_frozen_parameters_get_no_gradient():
    critic, (real, fake) = mlp().double(), vectors(7)
    critic[0].requires_grad_(False)
    fused_gradient_penalty(critic, real, fake, chunk_size=2).backward()
    assert critic[0].weight.grad is None
    assert critic[2].weight.grad.any()
    critic.requires_grad_(False)
    assert not fused_gradient_penalty(critic, real, fake, chunk_size=2).requires_grad


def test_the_value_without_gradients():
    critic, (real, fake) = mlp().double(), vectors(7)
    expected, norms = fused_gradient_penalty(critic, real, fake, alpha=0.5, return_norms=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours, ours_norms = fused_gradient_penalty(critic, real, fake, alpha=0.5, chunk_size=3, return_norms=True)
            assert_same_sums((ours, ours_norms), (expected.detach(), norms))
            assert not ours.requires_grad


def test_gradient_penalty_module_in_chunks():
    critic, real = mlp().double(), vectors(7)[0]
    module = GradientPenalty(r1_penalty, every=2, chunk_size=2)
    module(critic, real).backward()
    expected = gradients(2 * reference.r1_penalty(critic, real), critic.parameters())
    assert_same_sums([p.grad for p in critic.parameters()], expected)


def test_hooks_on_parameters_run_once():
    """In the backward, on the whole gradient, as without chunks."""
    results, seen = [], []
    for chunk_size in (None, 3):
        torch.manual_seed(0)
        critic, (real, fake) = mlp().double(), vectors(7)
        for p in critic.parameters():
            p.register_hook(lambda gradient: seen.append(1) or gradient.clamp(-1e-3, 1e-3))
        penalty = fused_gradient_penalty(critic, real, fake, alpha=0.5, chunk_size=chunk_size)
        assert not seen
        (penalty * 100).backward()
        assert len(seen) == (3 if chunk_size is None else 4)  # in chunks the last bias has a gradient, of zeros
        seen.clear()
        results.append([p.grad for p in critic.parameters()][:3])
    assert_same_sums(results[1], results[0])


def test_complex_parameters():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter, self.head = nn.Parameter(torch.randn(4, dtype=torch.cdouble)), nn.Linear(6, 1).double()

        def forward(self, x):
            return self.head(torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6)))

    critic, samples = Spectrum(), vectors(7)
    ours = fused_gradient_penalty(critic, *samples, alpha=0.3, chunk_size=2)
    expected = reference.fused_gradient_penalty(critic, *samples, alpha=0.3)
    assert_same_sums(gradients(ours, critic.parameters()), gradients(expected, critic.parameters()))


@pytest.mark.compiles
def test_a_compiled_critic_in_chunks():
    """Its backward frees the graph, and raises when it is run twice."""
    critic, (real, fake) = mlp().double(), vectors(7)
    torch._dynamo.reset()
    given = torch.compile(critic, backend="aot_eager", dynamic=True)
    ours = fused_gradient_penalty(given, real, fake, alpha=0.5, method="directional", chunk_size=2)
    expected = gradients(reference.fused_gradient_penalty(critic, real, fake, alpha=0.5), critic.parameters())
    assert_same(gradients(ours, critic.parameters()), expected, rtol=1e-6, atol=1e-9)
