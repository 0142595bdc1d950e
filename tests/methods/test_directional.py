"""method="directional": how accurate the gradient is, for every form of the penalty, and what it is computed with."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_gp
from fused_gp import GradientPenalty, fused_gradient_penalty, r1_penalty, reference
from tests.support.critics import MinibatchStd, OneScoreTooMany, Transposed, ViT, conv, mlp
from tests.support.family import batches_for
from tests.support.gradients import gradient, relative_error
from tests.support.messages import exactly
from tests.support.places import to_device
from tests.support.samples import fp32_images, fp32_vectors, images, vectors
from tests.support.tolerances import assert_same

pytestmark = pytest.mark.usefixtures("one_thread")

SMOOTH_CRITICS = {"conv": conv, "ViT": ViT}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("critic", SMOOTH_CRITICS)
def test_error_against_fp64(critic, chunk_size, autocast):
    """At most 5e-5 in fp32; under bf16 autocast at most five times that of double backward."""
    critic = SMOOTH_CRITICS[critic]()
    real, fake = fp32_images()
    alpha = torch.rand(8)
    exact = copy.deepcopy(critic).double()
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradient(
            reference.fused_gradient_penalty(exact, real.double(), fake.double(), alpha=alpha.double()), exact
        )

    def error(**options):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            penalty = fused_gradient_penalty(critic, real, fake, alpha=alpha, **options)
        return relative_error(gradient(penalty, critic), expected)

    ours = error(method="directional", chunk_size=chunk_size)
    if autocast is None:
        assert ours <= 5e-5
    else:
        with sdpa_kernel(SDPBackend.MATH):
            double_backward = error()
        assert double_backward > 1e-4, "autocast is off"
        assert ours <= 5 * double_backward


FORMS = {
    "two-sided": ("fused_gradient_penalty", {}),
    "one-sided": ("fused_gradient_penalty", {"one_sided": True, "target": 0.5}),
    "zero-centred": ("fused_gradient_penalty", {"target": 0.0}),
    "target 3, weight 10, sum": ("fused_gradient_penalty", {"target": 3.0, "weight": 10.0, "reduction": "sum"}),
    "eps 0": ("fused_gradient_penalty", {"eps": 0.0}),
    "eps 1": ("fused_gradient_penalty", {"eps": 1.0}),
    "groups": ("fused_gradient_penalty", {"group_size": 2}),
    "each sample": ("fused_gradient_penalty", {"reduction": "none"}),
    "scaled by a number": ("fused_gradient_penalty", {"grad_scale": 1024.0}),
    "scaled by a tensor": ("fused_gradient_penalty", {"grad_scale": torch.tensor(4096.0)}),
    "R1": ("r1_penalty", {"weight": 5.0}),
    "R2": ("r2_penalty", {"weight": 5.0}),
    "DRAGAN": ("dragan_penalty", {}),
}


# Chunks need one number, and refuse reduction="none": test_chunks_errors.py.
@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [(name, size) for name in FORMS for size in (None, 2) if (name, size) != ("each sample", 2)],
)
def test_every_form_of_the_penalty(place, name, chunk_size):
    """In fp64, where the difference has a relative error of some 1e-10. Two inputs, one of them channels_last; the
    upstream factors of the samples differ."""
    function, options = FORMS[name]
    options = to_device(options, place.device)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.row = conv(), mlp()

        def forward(self, x):
            image, row = x
            return 9 * self.image(image).mean((1, 2, 3)) + 5 * self.row(row).squeeze(1).tanh()

    critic = Critic().double().to(place.device)
    pairs = zip(images(4), vectors(4), strict=True)
    samples = [(image.to(memory_format=torch.channels_last), row) for image, row in pairs]
    batches = to_device(batches_for(function, *samples), place.device)

    def run(module, **more):
        torch.manual_seed(5)
        penalty, norms = getattr(module, function)(critic, *batches, return_norms=True, **options, **more)
        upstream = torch.linspace(1, 3, penalty.numel(), dtype=torch.float64, device=place.device)
        return penalty, norms, gradient((penalty * upstream.reshape(penalty.shape)).sum(), critic).cpu()

    value, norms, expected = run(reference)
    penalty, ours_norms, ours = run(fused_gp, method="directional", chunk_size=chunk_size, backend=place.backend)
    torch.testing.assert_close(penalty, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours_norms, norms, rtol=1e-12, atol=0)
    assert 0 < relative_error(ours, expected) <= 1e-8


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_samples_alpha_and_arguments_get_gradients(place, chunk_size):
    """As with autograd: the generator, both batches, alpha, and other arguments of the critic."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 1)

        def forward(self, x, labels, shift):
            return self.head(torch.tanh(self.body(x) + labels + shift))

    critic = Critic().double().to(place.device)
    generator = nn.Linear(3, 6).double().to(place.device)
    real, noise = vectors(8)[0].to(place.device), vectors(8, 3)[0].to(place.device)
    real.requires_grad_()
    table = torch.randn(8, 5, dtype=torch.float64, device=place.device, requires_grad=True)
    shift = torch.randn(5, dtype=torch.float64, device=place.device, requires_grad=True)
    alpha = torch.rand(8, dtype=torch.float64, device=place.device, requires_grad=True)

    def run(function, **options):
        penalty = function(
            critic, real, generator(noise), alpha=alpha, critic_args=(2 * table, 3 * shift), **options
        )  # fmt: skip
        wanted = [*critic.parameters(), *generator.parameters(), real, alpha, table, shift]
        return torch.autograd.grad(penalty, wanted, materialize_grads=True)

    expected = run(reference.fused_gradient_penalty)
    ours = run(fused_gradient_penalty, method="directional", chunk_size=chunk_size, backend=place.backend)
    assert_same(ours, expected, rtol=1e-6, atol=1e-9)
    assert sum(grad.any().item() for grad in ours) == len(ours) - 1  # all but the last bias


def test_first_order_passes_only():
    """No graph of a gradient is built, which FSDP, flash attention and fused kernels do not allow."""
    critic, runs = mlp(), []

    class FirstOrder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            runs.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            runs.append("backward")
            assert not torch.is_grad_enabled()
            return upstream

    penalty = fused_gradient_penalty(lambda x: FirstOrder.apply(critic(x)), *fp32_vectors(), method="directional")
    # One input gradient. Before it a run in which compiled parts are eager, if anything is compiled in this process;
    # after it those to choose the step, and the two ends of the difference.
    assert runs.count("backward") == 1
    assert runs.index("backward") in (1, 2)
    runs.clear()
    penalty.backward()
    assert runs == ["backward", "backward"]
    assert critic[0].weight.grad.any()


@pytest.mark.parametrize(
    "options", [{"method": "directional"}, {"chunk_size": 2}, {"method": "directional", "chunk_size": 2}]
)
def test_a_second_derivative_is_refused(options):
    """It would be silently wrong."""
    critic = mlp()
    penalty = fused_gradient_penalty(critic, *fp32_vectors(), **options)
    name = "chunk_size" if "chunk_size" in options else "method='directional'"
    message = (
        f"{name} gives the penalty's first derivative alone, and this backward is one with create_graph=True: use "
        "method='double_backward', without chunk_size"
    )
    with pytest.raises(RuntimeError, match=exactly(message)):
        torch.autograd.grad(penalty, critic[0].weight, create_graph=True)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_the_estimated_error(chunk_size):
    """From the derivative of the scores, which the norms give too: near 0 at a good step, large at a bad one."""
    critic, batch, alpha = conv(nn.GroupNorm(2, 4)), fp32_images(), torch.rand(8)

    def error(step=None):
        *_, estimate = fused_gradient_penalty(
            critic, *batch, alpha=alpha, method="directional", step=step, chunk_size=chunk_size, return_error=True
        )
        assert not estimate.requires_grad
        assert estimate.shape == ()
        return estimate.item()

    assert 0 < error() < 1e-4
    assert error(1.0) > 1e-2  # truncation
    assert error(1e-7) > 1e-3  # rounding
    _, norms, estimate = fused_gradient_penalty(
        critic, *batch, alpha=alpha, return_norms=True, return_error=True, chunk_size=chunk_size
    )
    assert estimate.item() == 0  # double backward is exact
    assert norms.shape == (8,)
    assert r1_penalty(critic, batch[0], method="directional", return_error=True)[1] < 1e-4
    for options in ({"eps": 1.0}, {"grad_scale": 64.0}, {"group_size": 2}, {"target": 0.0}, {"one_sided": True}):
        options = options | {"method": "directional", "chunk_size": chunk_size, "return_error": True, "weight": 10.0}
        assert fused_gradient_penalty(critic, *batch, **options)[1] < 1e-4


def test_samples_on_the_target_have_gradient_zero(place):
    """There is no direction for the difference; the gradient is zero, not NaN."""
    weight = torch.tensor([0.6, 0.8], dtype=torch.float64, device=place.device, requires_grad=True)
    real, fake = (torch.randn(3, 2, dtype=torch.float64, device=place.device) for _ in range(2))
    for options in ({"eps": 0.0}, {"eps": 0.0, "one_sided": True, "target": 2.0}):
        penalty = fused_gradient_penalty(
            lambda x: x @ weight, real, fake, method="directional", backend=place.backend, **options
        )
        (grad,) = torch.autograd.grad(penalty, weight)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-9)


def test_a_zero_row_changes_no_other(place):
    """A sample with gradient zero, with eps = 0, beside one with another gradient."""
    critic = mlp().double().to(place.device)
    real, fake = to_device(vectors(4), place.device)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64, device=place.device)[:, None]

    def run(function, **options):
        penalty = function(lambda x: critic(x) * mask, real, fake, alpha=0.5, eps=0.0, **options)
        return gradient(penalty, critic)

    ours = run(fused_gradient_penalty, method="directional", backend=place.backend)
    assert 0 < relative_error(ours, run(reference.fused_gradient_penalty)) <= 1e-8


def test_samples_at_the_origin_have_an_absolute_step():
    """The norm of the points, of which the step is a fraction, is zero there."""
    critic, zeros = mlp().double(), torch.zeros(4, 6, dtype=torch.float64)
    ours = gradient(fused_gradient_penalty(critic, zeros, zeros, method="directional"), critic)
    assert relative_error(ours, gradient(reference.fused_gradient_penalty(critic, zeros, zeros), critic)) <= 1e-8


def test_nan_is_not_masked():
    real, fake = fp32_vectors()
    real[2, 3] = math.nan
    penalty, norms = fused_gradient_penalty(mlp(), real, fake, method="directional", return_norms=True)
    assert penalty.isnan()
    assert norms.isnan().tolist() == [index == 2 for index in range(8)]


def test_a_frozen_critic_gives_gradients_to_the_samples():
    critic = mlp().requires_grad_(False)
    real, fake = fp32_vectors()
    assert not fused_gradient_penalty(critic, real, fake, method="directional").requires_grad
    fake.requires_grad_()
    penalty = fused_gradient_penalty(critic, real, fake, method="directional")
    assert torch.autograd.grad(penalty, fake)[0].any()


def test_tensors_of_the_caller_are_not_changed():
    critic, (real, fake) = mlp(), fp32_vectors()
    fake.requires_grad_()
    before = [p.clone() for p in critic.parameters()]
    for chunk_size in (None, 3):
        fused_gradient_penalty(critic, real, fake, method="directional", chunk_size=chunk_size)
        assert all(p.grad is None and p.equal(was) for p, was in zip(critic.parameters(), before, strict=True))
        assert fake.grad is None
        assert not real.requires_grad


def test_reduction_none_needs_scores_per_sample():
    """Each sample needs its own difference."""
    real, fake = fp32_vectors(4)
    critic = OneScoreTooMany(nn.Sequential(mlp(), nn.Flatten(0), nn.Unflatten(0, (1, 4))))
    message = (
        "critic must score each sample by itself, with the samples in front, for reduction='none' with "
        "method='directional', got scores of shape (5,) for 4 of them that do not"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fused_gradient_penalty(critic, real, fake, method="directional", reduction="none")


@pytest.mark.parametrize("layer", [MinibatchStd(), Transposed()], ids=["minibatch statistics", "(3, B)"])
def test_reduction_none_is_refused_for_coupled_samples(layer):
    """With reduction='mean' samples need no differences of their own."""
    critic = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), layer).double()
    batch = vectors(4)
    expected = gradient(reference.fused_gradient_penalty(critic, *batch, alpha=0.5), critic)
    ours = gradient(fused_gradient_penalty(critic, *batch, alpha=0.5, method="directional"), critic)
    assert relative_error(ours, expected) <= 1e-8
    with pytest.raises(ValueError, match="must score each sample by itself, with the samples in front"):
        fused_gradient_penalty(critic, *batch, method="directional", reduction="none")


def test_gradient_penalty_module_of_every_second_call():
    critic = mlp()
    gradient_penalty = GradientPenalty(every=2, method="directional", return_norms=True, return_error=True)
    assert len(gradient_penalty(critic, *fp32_vectors())) == 3
    skipped, norms, error = gradient_penalty(critic, *fp32_vectors())
    assert skipped == 0
    assert norms is None
    assert error is None
