"""The penalties of other systems: the same numbers as the code that the call replaces, one row per system.

Each row has the formula as users of that system have it and, above it, the call that replaces it. `docs/systems.md`
is the same table to read.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_gp import (
    GradientPenalty,
    dragan_penalty,
    fused_gradient_penalty,
    input_gradient_penalty,
    interpolate,
    r1_penalty,
    r2_penalty,
)
from tests.support.systems import IMAGES, assert_same_outcome, conv_critic, outcome_of, real_and_fake, strong_critic

# For norms on both sides of the target, whatever a device draws: those of 5 samples are on one side once in 20 to 30.
MORE_IMAGES = (16, *IMAGES[1:])

GAMMA = 4.0
PAC = 3


def patch_critic():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Conv2d(6, 1, 3, 1, 1))


def wave_critic():
    return nn.Sequential(nn.Conv1d(1, 6, 7, 3, 3), nn.LeakyReLU(0.1), nn.Conv1d(6, 1, 3, 1, 1))


def flat_critic():
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 1))


class PacCritic(nn.Module):
    """Takes PAC consecutive rows of a table as one sample."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7 * PAC, 12), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(12, 1))

    def forward(self, rows):
        return self.layers(rows.view(-1, 7 * PAC))


class MultiScaleCritic(nn.Module):
    """Scores of the image and of its coarser version."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 1, 3), nn.Conv2d(3, 1, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, images):
        return self.fine(images).tanh().mean((2, 3)), self.coarse(F.avg_pool2d(self.dropout(images), 2)).tanh()


class GraphCritic(nn.Module):
    """Scores and features of graphs, given as bonds (B, V, V, kinds of bond) and atoms (B, V, kinds of atom)."""

    def __init__(self):
        super().__init__()
        self.own, self.neighbours, self.score = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 1)

    def forward(self, bonds, atoms):
        messages = torch.einsum("bijk,bjm->bim", bonds, self.neighbours(atoms))
        features = torch.tanh(self.own(atoms) + messages).mean(1)
        return self.score(features), features


GRAPHS = ((5, 4, 4, 3), (5, 4, 5))

SYSTEMS = []


def system(name, ours, critic=conv_critic, shapes=IMAGES, dtype=torch.float64):
    """A row: `ours` and, decorated, the original, both called with (critic, real, fake)."""

    def add(original):
        SYSTEMS.append(pytest.param(original, ours, critic, shapes, dtype, id=name))
        return original

    return add


@system(
    "Improved WGAN",
    lambda critic, real, fake, **on: fused_gradient_penalty(critic, real, fake, weight=10, eps=0, **on),
)
def improved_wgan(critic, real, fake):
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    differences = fake - real
    interpolates = (real + alpha * differences).requires_grad_()
    gradients = torch.autograd.grad(critic(interpolates).sum(), interpolates, create_graph=True)[0]
    slopes = gradients.square().sum([1, 2, 3]).sqrt()
    return 10 * ((slopes - 1) ** 2).mean()


def tf_gan(critic, real, fake, target, one_sided):
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    interpolates = (real + alpha * (fake - real)).requires_grad_()
    gradients = torch.autograd.grad(critic(interpolates).sum(), interpolates, create_graph=True)[0]
    slopes = torch.sqrt(gradients.square().sum([1, 2, 3]) + 1e-10)
    penalties = slopes / target - 1
    if one_sided:
        assert penalties.min() < 0 < penalties.max()  # or one side would not be tested
        penalties = penalties.clamp(min=0)
    return penalties.square().mean()


@system(
    "TF-GAN",
    lambda critic, real, fake, **on: fused_gradient_penalty(
        critic, real, fake, target=2, weight=1 / 2**2, eps=1e-10, **on
    ),
)
def tf_gan_two_sided(critic, real, fake):
    return tf_gan(critic, real, fake, target=2, one_sided=False)


@system(
    "TF-GAN one-sided",
    lambda critic, real, fake, **on: fused_gradient_penalty(
        critic, real, fake, target=2, weight=1 / 2**2, one_sided=True, eps=1e-10, **on
    ),
    critic=strong_critic,
    shapes=MORE_IMAGES,
)
def tf_gan_one_sided(critic, real, fake):
    return tf_gan(critic, real, fake, target=2, one_sided=True)


@system(
    "PyTorch collections",
    lambda critic, real, fake, **on: fused_gradient_penalty(critic, fake, real, weight=10, eps=0, **on),
)
def alpha_on_real(critic, real, fake):
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_()
    scores = critic(interpolates)
    gradients = torch.autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True)[0]
    gradients = gradients.view(len(real), -1)
    return ((gradients.norm(2, dim=1) - 1) ** 2).mean() * 10


def numpy_alpha(real):
    return torch.Tensor(np.random.random((len(real), 1, 1, 1))).to(real.device)


@system(
    "PyTorch-GAN, alpha from NumPy",
    lambda critic, real, fake, **on: fused_gradient_penalty(
        critic, fake, real, alpha=numpy_alpha(real), weight=10, eps=0, **on
    ),
    dtype=torch.float32,
)
def alpha_from_numpy(critic, real, fake):
    """In fp32, where the original rounds 1 - alpha: torch.rand gives multiples of 2^-24, NumPy does not."""
    alpha = numpy_alpha(real)
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_()
    scores = critic(interpolates)
    gradients = torch.autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True)[0]
    return 10 * ((gradients.view(len(real), -1).norm(2, dim=1) - 1) ** 2).mean()


@system(
    "WGAN-LP",
    lambda critic, real, fake, **on: fused_gradient_penalty(critic, fake, real, one_sided=True, weight=10, eps=0, **on),
    shapes=MORE_IMAGES,
)
def wgan_lp(critic, real, fake):
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_()
    gradients = torch.autograd.grad(critic(interpolates).sum(), interpolates, create_graph=True)[0]
    norms = gradients.flatten(1).norm(2, dim=1)
    assert norms.min() < 1 < norms.max()  # or one side would not be tested
    return 10 * F.relu(norms - 1).square().mean()


@system(
    "DRAGAN, noise first",
    lambda critic, real, fake, **on: dragan_penalty(critic, real, weight=10, eps=0, **on),
)
def dragan(critic, real, fake):
    noise = 0.5 * real.std() * torch.rand_like(real)
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    x_hat = (real + alpha * noise).requires_grad_()
    gradients = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)[0]
    return 10 * ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def dragan_with_alpha_first(critic, real, fake, **on):
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    return dragan_penalty(critic, real, alpha=1 - alpha, weight=10, eps=0, **on)


@system("DRAGAN, alpha first", dragan_with_alpha_first)
def dragan_pytorch(critic, real, fake):
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    x_hat = alpha * real + (1 - alpha) * (real + 0.5 * real.std() * torch.rand_like(real))
    x_hat.requires_grad_()
    gradients = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)[0]
    return 10 * ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


@system(
    "StyleGAN R1",
    lambda critic, real, fake, **on: r1_penalty(critic, real, weight=GAMMA, **on),
)
def stylegan_r1(critic, real, fake):
    real = real.detach().requires_grad_()
    real_logits = critic(real)
    r1_grads = torch.autograd.grad(outputs=[real_logits.sum()], inputs=[real], create_graph=True)[0]
    return (r1_grads.square().sum([1, 2, 3]) * (GAMMA / 2)).mean()


def r3gan_from_logits(critic, real, fake, **on):
    real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
    real_logits, fake_logits = critic(real), critic(fake)  # used by the critic's loss as well
    return input_gradient_penalty(real_logits, real, target=0, weight=GAMMA / 2, **on) + input_gradient_penalty(
        fake_logits, fake, target=0, weight=GAMMA / 2, **on
    )


@system("R3GAN, from logits", r3gan_from_logits)
@system(
    "R3GAN",
    lambda critic, real, fake, **on: (
        r1_penalty(critic, real, weight=GAMMA, **on) + r2_penalty(critic, fake, weight=GAMMA, **on)
    ),
)
def r3gan(critic, real, fake):
    def zero_centred_gradient_penalty(samples, logits):
        (gradient,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
        return gradient.square().sum([1, 2, 3])

    real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
    real_logits, fake_logits = critic(real), critic(fake)
    r1 = zero_centred_gradient_penalty(real, real_logits)
    r2 = zero_centred_gradient_penalty(fake, fake_logits)
    return (GAMMA / 2 * (r1 + r2)).mean()


def with_stylegan2_pytorch_call(critic, real, fake, **on):
    images = real.clone().requires_grad_()
    output = critic(images)
    return input_gradient_penalty(output, images, weight=10, eps=0, **on)


@system("stylegan2-pytorch", with_stylegan2_pytorch_call)
def stylegan2_pytorch(critic, real, fake):
    images = real.clone().requires_grad_()
    output = critic(images)
    gradients = torch.autograd.grad(output, images, torch.ones_like(output), create_graph=True)[0]
    gradients = gradients.reshape(len(images), -1)
    return 10 * ((gradients.norm(2, dim=1) - 1) ** 2).mean()


def gigagan(critic, real, scaler=None):
    images = real.clone().requires_grad_()
    outputs = critic(images)
    if scaler is not None:
        outputs = [scaler.scale(output) for output in outputs]
    gradients = torch.autograd.grad(
        outputs,
        images,
        [torch.ones_like(output) * weight for output, weight in zip(outputs, (1.0, 0.5), strict=True)],
        create_graph=True,
    )[0]
    if scaler is not None:
        gradients = gradients * (1 / max(scaler.get_scale(), 1e-4))
    return 10 * ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def with_gigagan_call(critic, real, grad_scale, on):
    images = real.clone().requires_grad_()
    outputs = critic(images)
    return input_gradient_penalty(
        outputs, images, output_weights=(1.0, 0.5), grad_scale=grad_scale, weight=10, eps=0, **on
    )


@system(
    "GigaGAN",
    lambda critic, real, fake, **on: with_gigagan_call(critic, real, None, on),
    critic=MultiScaleCritic,
)
def gigagan_unscaled(critic, real, fake):
    return gigagan(critic, real)


def grad_scaler(device):
    return torch.amp.GradScaler(device, init_scale=1024.0)


@system(
    "GigaGAN, scale as a number",
    lambda critic, real, fake, **on: with_gigagan_call(critic, real, 1024.0, on),
    critic=MultiScaleCritic,
)
@system(
    "GigaGAN, GradScaler",
    lambda critic, real, fake, **on: with_gigagan_call(critic, real, grad_scaler(real.device.type), on),
    critic=MultiScaleCritic,
)
def gigagan_scaled(critic, real, fake):
    return gigagan(critic, real, grad_scaler(real.device.type))


def with_audiolm_call(critic, real, fake, **on):
    wave = real.clone().requires_grad_()
    output = critic(wave)
    return input_gradient_penalty(output, wave, weight=10, eps=0, **on)


@system("AudioLM", with_audiolm_call, critic=wave_critic, shapes=(5, 1, 40))
def audiolm(critic, real, fake):
    wave = real.clone().requires_grad_()
    output = critic(wave)
    gradients = torch.autograd.grad(output, wave, torch.ones_like(output), create_graph=True)[0]
    return 10 * ((torch.linalg.vector_norm(gradients.flatten(1), dim=1) - 1) ** 2).mean()


@system(
    "CTGAN",
    lambda critic, real, fake, **on: fused_gradient_penalty(critic, fake, real, group_size=PAC, weight=10, eps=0, **on),
    critic=PacCritic,
    shapes=(4 * PAC, 7),
)
def ctgan(critic, real, fake):
    alpha = torch.rand(len(real) // PAC, 1, 1, device=real.device)
    alpha = alpha.repeat(1, PAC, real.size(1)).view(-1, real.size(1))
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_()
    scores = critic(interpolates)
    gradients = torch.autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True)[0]
    slopes = gradients.view(-1, PAC * real.size(1)).norm(2, dim=1) - 1
    return (slopes**2).mean() * 10


@system(
    "CycleGAN",
    lambda critic, real, fake, **on: fused_gradient_penalty(
        critic, fake, real, weight=10, eps=0, return_norms=True, **on
    ),
    critic=patch_critic,
    dtype=torch.float32,
)
def cyclegan(critic, real, fake):
    """Returns the gradients too, of which its users take the norms; 1e-16 on each is nothing in fp32."""
    alpha = torch.rand(len(real), 1, device=real.device)
    alpha = alpha.expand(len(real), real[0].numel()).contiguous().view(real.shape)
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_()
    patches = critic(interpolates)
    gradients = torch.autograd.grad(patches, interpolates, torch.ones_like(patches), create_graph=True)[0]
    gradients = gradients.view(len(real), -1)
    penalty = (((gradients + 1e-16).norm(2, dim=1) - 1) ** 2).mean() * 10
    return penalty, gradients.norm(2, dim=1).detach()


def with_molgan_call(critic, real, fake, **on):
    alpha = torch.rand(len(real[0]), 1, 1, 1, device=real[0].device)
    bonds, atoms = (x.requires_grad_() for x in interpolate(fake, real, alpha, **on))
    scores, features = critic(bonds, atoms)
    return input_gradient_penalty(scores, bonds, eps=0, **on) + input_gradient_penalty(features, atoms, eps=0, **on)


@system("MolGAN", with_molgan_call, critic=GraphCritic, shapes=GRAPHS)
def molgan(critic, real, fake):
    """Two norms: of the scores' gradient on the bonds, and of the features' gradient on the atoms."""

    def gradient_penalty(y, x):
        gradients = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)[0].reshape(len(x), -1)
        return ((gradients.square().sum(1).sqrt() - 1) ** 2).mean()

    eps = torch.rand(len(real[0]), 1, 1, 1, device=real[0].device)
    bonds = (eps * real[0] + (1 - eps) * fake[0]).requires_grad_()
    atoms = (eps.squeeze(-1) * real[1] + (1 - eps.squeeze(-1)) * fake[1]).requires_grad_()
    scores, features = critic(bonds, atoms)
    return gradient_penalty(scores, bonds) + gradient_penalty(features, atoms)


def named(graph):
    return {"bonds": graph[0], "atoms": graph[1]}


@system(
    "Graphs, one norm, as a dict",
    lambda critic, real, fake, **on: fused_gradient_penalty(
        lambda graph: critic(**graph)[0], named(fake), named(real), eps=1e-10, **on
    ),
    critic=GraphCritic,
    shapes=GRAPHS,
)
@system(
    "Graphs, one norm",
    lambda critic, real, fake, **on: fused_gradient_penalty(
        lambda graph: critic(*graph)[0], fake, real, eps=1e-10, **on
    ),
    critic=GraphCritic,
    shapes=GRAPHS,
)
def several_inputs(critic, real, fake):
    alpha = torch.rand(len(real[0]), 1, 1, 1, device=real[0].device)
    bonds = (alpha * real[0] + (1 - alpha) * fake[0]).requires_grad_()
    atoms = (alpha[..., 0] * real[1] + (1 - alpha[..., 0]) * fake[1]).requires_grad_()
    gradients = torch.autograd.grad(critic(bonds, atoms)[0].sum(), [bonds, atoms], create_graph=True)
    squares = sum(gradient.square().flatten(1).sum(1) for gradient in gradients)
    return ((torch.sqrt(squares + 1e-10) - 1) ** 2).mean()


@system(
    "0-GP",
    lambda critic, real, fake, **on: fused_gradient_penalty(critic, fake, real, target=0, weight=10, **on),
    critic=flat_critic,
    shapes=(6, 7),
)
def zero_gp(critic, real, fake):
    alpha = torch.rand(len(real), 1, device=real.device).expand(real.shape)
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_()
    scores = critic(interpolates)
    gradients = torch.autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True)[0]
    return (gradients.norm(2, dim=1) ** 2).mean() * 10


@pytest.mark.parametrize(("original", "ours", "make_critic", "shapes", "dtype"), SYSTEMS)
def test_same_numbers_as_the_code_it_replaces(place, original, ours, make_critic, shapes, dtype):
    """Under one seed, dropout included: value, weight gradients, and the random state afterwards."""
    critic = make_critic().to(place.device, dtype)
    real, fake = real_and_fake(shapes, dtype, place.device)
    expected = outcome_of(original, critic, real, fake)
    actual = outcome_of(ours, critic, real, fake, backend=place.backend)
    assert_same_outcome(actual, expected, dtype)
    assert actual.state.equal(expected.state)


def test_gigagan_with_a_scale_that_is_no_power_of_two(place):
    """Its inverse is rounded to fp64 for fp64 samples, as in the original, though the scaler keeps the scale in
    fp32."""
    critic = MultiScaleCritic().eval().double().to(place.device)
    real, _ = real_and_fake(IMAGES, torch.float64, place.device)
    scaler = torch.amp.GradScaler(place.device, init_scale=1000.0)
    actual = with_gigagan_call(critic, real, scaler, {"backend": place.backend})
    torch.testing.assert_close(actual, gigagan(critic, real, scaler), rtol=1e-10, atol=0)


def test_stylegan_lazy_r1_trains_the_same_weights(place):
    """Two periods of training with R1 at every 16th step, 16 times as strong: the same weights at the end."""

    def train(critic, penalise):
        torch.manual_seed(7)
        for step, real in enumerate(batches):
            loss = F.softplus(-critic(real)).mean() + penalise(critic, real, step)
            gradients = torch.autograd.grad(loss, list(critic.parameters()))
            with torch.no_grad():
                for weight, gradient in zip(critic.parameters(), gradients, strict=True):
                    weight -= 0.003 * gradient
        return list(critic.parameters())

    def original(critic, real, step):
        return 16 * stylegan_r1(critic, real, None) if step % 16 == 0 else 0

    regularise = GradientPenalty(r1_penalty, weight=GAMMA, every=16, backend=place.backend)
    critic = conv_critic().double().to(place.device)
    batches = torch.randn(32, 2, 3, 8, 8).double().to(place.device)
    expected = train(copy.deepcopy(critic), original)
    unregularised = train(copy.deepcopy(critic), lambda critic, real, step: 0)
    actual = train(critic, lambda critic, real, step: regularise(critic, real))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert (expected[0] - unregularised[0]).abs().max() > 0.01
