"""The same numbers as the code it replaces, one row per system; and other numbers than the well-known mistakes.

Each row has the formula as that system's users have it and, above it, the call that takes its place. `docs/systems.md`
is the same table to read.
"""

import copy
import pathlib
import re
from typing import NamedTuple

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
    reference,
)

IMAGES = (5, 3, 8, 8)
GAMMA = 4.0
PAC = 3


def conv_critic():
    """Gradient norms around 1, on both sides of it, and other ones at another place or under another dropout mask."""
    critic = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(128, 1))
    critic[-1].weight.data.mul_(5.5)
    return critic


def strong_critic():
    """Gradient norms around 2."""
    critic = conv_critic()
    critic[-1].weight.data.mul_(2)
    return critic


def patch_critic():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Conv2d(6, 1, 3, 1, 1))


def wave_critic():
    return nn.Sequential(nn.Conv1d(1, 6, 7, 3, 3), nn.LeakyReLU(0.1), nn.Conv1d(6, 1, 3, 1, 1))


def flat_critic():
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 1))


class PacCritic(nn.Module):
    """PAC consecutive rows of a table are one sample to it."""

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
    """A row: `ours` and, decorated, theirs, both called with (critic, real, fake)."""

    def add(theirs):
        SYSTEMS.append(pytest.param(theirs, ours, critic, shapes, dtype, id=name))
        return theirs

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
        assert penalties.min() < 0 < penalties.max()  # else one side would not be seen
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
    """In fp32, where theirs rounds 1 - alpha: torch.rand gives multiples of 2^-24, NumPy does not."""
    alpha = numpy_alpha(real)
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_()
    scores = critic(interpolates)
    gradients = torch.autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True)[0]
    return 10 * ((gradients.view(len(real), -1).norm(2, dim=1) - 1) ** 2).mean()


@system(
    "WGAN-LP",
    lambda critic, real, fake, **on: fused_gradient_penalty(critic, fake, real, one_sided=True, weight=10, eps=0, **on),
)
def wgan_lp(critic, real, fake):
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_()
    gradients = torch.autograd.grad(critic(interpolates).sum(), interpolates, create_graph=True)[0]
    norms = gradients.flatten(1).norm(2, dim=1)
    assert norms.min() < 1 < norms.max()  # else one side would not be seen
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
    real_logits, fake_logits = critic(real), critic(fake)  # the critic's loss needs them too
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
    """Gives the gradients back too, from which their users take the norms; 1e-16 on each is nothing in fp32."""
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


def batch_of(shapes, dtype, device):
    """Real and fake samples, not alike, so that it matters where between them the critic is asked."""

    def draw(shape):
        return torch.randn(shape, dtype=dtype).to(device)

    if isinstance(shapes[0], int):
        return draw(shapes), 2 * draw(shapes) + 1
    return tuple(map(draw, shapes)), tuple(2 * draw(shape) + 1 for shape in shapes)


class Outcome(NamedTuple):
    values: list  # the penalty, and what else was returned
    gradients: list  # of the weights
    state: torch.Tensor  # of the generators, afterwards


def outcome(penalise, critic, real, fake, **on):
    device = next(critic.parameters()).device.type
    torch.manual_seed(7)
    np.random.seed(7)
    returned = penalise(critic, real, fake, **on)
    values = list(returned) if isinstance(returned, tuple) else [returned]
    gradients = torch.autograd.grad(values[0], list(critic.parameters()), materialize_grads=True)
    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    numpy_state = torch.from_numpy(np.random.get_state()[1].astype("int64"))
    return Outcome(values, list(gradients), torch.cat([state, numpy_state]))


def assert_same(actual, wanted, dtype=torch.float64):
    tolerance = {"rtol": 1e-10, "atol": 0} if dtype == torch.float64 else {}
    torch.testing.assert_close(actual.values, wanted.values, **tolerance)
    torch.testing.assert_close(actual.gradients, wanted.gradients, **tolerance)
    assert max(gradient.abs().max() for gradient in wanted.gradients) > 1e-3


@pytest.mark.parametrize(("theirs", "ours", "make_critic", "shapes", "dtype"), SYSTEMS)
def test_same_numbers_as_the_code_it_replaces(place, theirs, ours, make_critic, shapes, dtype):
    """Draw for draw under one seed, dropout included: value, weight gradients, and the random state after."""
    critic = make_critic().to(place.device, dtype)
    real, fake = batch_of(shapes, dtype, place.device)
    wanted = outcome(theirs, critic, real, fake)
    actual = outcome(ours, critic, real, fake, backend=place.backend)
    assert_same(actual, wanted, dtype)
    assert actual.state.equal(wanted.state)


def test_gigagan_scale_that_is_no_power_of_two(place):
    """Its inverse is rounded: to fp64 for fp64 samples, as theirs is, though the scaler keeps the scale in fp32."""
    critic = MultiScaleCritic().eval().double().to(place.device)
    real, _ = batch_of(IMAGES, torch.float64, place.device)
    scaler = torch.amp.GradScaler(place.device, init_scale=1000.0)
    actual = with_gigagan_call(critic, real, scaler, {"backend": place.backend})
    torch.testing.assert_close(actual, gigagan(critic, real, scaler), rtol=1e-10, atol=0)


def test_stylegan_lazy_r1(place):
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

    def theirs(critic, real, step):
        return 16 * stylegan_r1(critic, real, None) if step % 16 == 0 else 0

    regularise = GradientPenalty(r1_penalty, weight=GAMMA, every=16, backend=place.backend)
    critic = conv_critic().double().to(place.device)
    batches = torch.randn(32, 2, 3, 8, 8).double().to(place.device)
    wanted = train(copy.deepcopy(critic), theirs)
    unregularised = train(copy.deepcopy(critic), lambda critic, real, step: 0)
    actual = train(critic, lambda critic, real, step: regularise(critic, real))
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=0)
    assert (wanted[0] - unregularised[0]).abs().max() > 0.01


def weak_critic():
    """Gradients of norm 0.03, as early in training."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Tanh(), nn.Linear(4, 1))
    critic[1].weight.data.mul_(0.1)
    return critic


def input_gradient(critic, real, fake, alpha, **options):
    x_hat = (alpha * fake + (1 - alpha) * real).requires_grad_()
    return torch.autograd.grad(critic(x_hat).sum(), x_hat, **(options or {"create_graph": True}))[0]


def alpha_per_sample(real):
    return torch.rand(len(real), 1, 1, 1, device=real.device)


def one_alpha(real):
    return torch.rand(1, 1, device=real.device)


def alpha_per_element(real):
    return torch.rand(real.shape, device=real.device)


def normal_alpha(real):
    return torch.randn(len(real), 1, 1, 1, device=real.device)


MISTAKES = []


def mistake(name, margin, critic=strong_critic, shapes=IMAGES):
    """A row: the mistaken formula, and by how much, relatively, its value is off at least."""

    def add(mistaken):
        MISTAKES.append(pytest.param(mistaken, margin, critic, shapes, id=name))
        return mistaken

    return add


@mistake("norm over dim 1 of an unflattened gradient", margin=0.1)
def norm_over_channels(critic, real, fake):
    """(B, H, W) norms over the channels of each pixel, instead of (B,) norms."""
    gradients = input_gradient(critic, real, fake, alpha_per_sample(real))
    return ((gradients.norm(2, dim=1) - 1) ** 2).mean()


@mistake("norm of the whole batch", margin=0.1)
def norm_of_the_batch(critic, real, fake):
    """One norm over all samples, sqrt(B) times too large, which lets one sample's slope make up for another's."""
    gradients = input_gradient(critic, real, fake, alpha_per_sample(real))
    return (gradients.norm(2) - 1) ** 2


@mistake("one alpha for the batch", margin=0.01)
def alpha_of_the_batch(critic, real, fake):
    """All samples are asked at the same distance from real."""
    gradients = input_gradient(critic, real, fake, one_alpha(real))
    return ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


@mistake("alpha for each element", margin=0.01)
def alpha_of_the_element(critic, real, fake):
    """The points are in the box between real and fake, not on the line, and lie close to its middle."""
    gradients = input_gradient(critic, real, fake, alpha_per_element(real))
    return ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


@mistake("normal alpha", margin=0.01)
def alpha_from_a_normal(critic, real, fake):
    """Two thirds of the points lie beyond real or fake."""
    gradients = input_gradient(critic, real, fake, normal_alpha(real))
    return ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


@mistake("epsilon added to each element", margin=0.01, critic=weak_critic, shapes=(3, 3, 32, 32))
def epsilon_in_the_sum(critic, real, fake):
    """It counts N times under the root: 1e-6 on 3 x 32 x 32 elements is a slope of 0.055 that is not there."""
    gradients = input_gradient(critic, real, fake, alpha_per_sample(real))
    norms = torch.sqrt((gradients.flatten(1) ** 2 + 1e-6).sum(1))
    return ((norms - 1) ** 2).mean()


def right(critic, real, fake):
    return reference.fused_gradient_penalty(critic, real, fake, eps=0)


def fused(critic, real, fake, **on):
    return fused_gradient_penalty(critic, real, fake, eps=0, **on)


@pytest.mark.parametrize(("mistaken", "margin", "make_critic", "shapes"), MISTAKES)
def test_mistake_not_made(place, mistaken, margin, make_critic, shapes):
    """Ours is the oracle's, and the mistaken formula gives something else, by more than the margin."""
    critic = make_critic().eval().to(place.device, torch.float64)
    real, fake = batch_of(shapes, torch.float64, place.device)
    wrong = outcome(mistaken, critic, real, fake)
    wanted = outcome(right, critic, real, fake)
    actual = outcome(fused, critic, real, fake, backend=place.backend)
    assert_same(actual, wanted)
    assert (wrong.values[0] - actual.values[0]).abs() > margin * actual.values[0]


def same_within_a_sample(alpha):
    return bool((alpha.amin((1, 2, 3)) == alpha.amax((1, 2, 3))).all())


def another_in_each_sample(alpha):
    return len(alpha.mean((1, 2, 3)).unique()) == len(alpha)


def within_0_and_1(alpha):
    return bool(((alpha >= 0) & (alpha < 1)).all())


@pytest.mark.parametrize(
    ("mistaken", "broken"),
    [
        pytest.param(one_alpha, another_in_each_sample, id="one alpha for the batch"),
        pytest.param(alpha_per_element, same_within_a_sample, id="alpha for each element"),
        pytest.param(normal_alpha, within_0_and_1, id="normal alpha"),
    ],
)
def test_where_the_critic_is_asked(place, mistaken, broken):
    """Whatever the critic: between zeros and ones the points are alpha itself, which each mistake gives away."""
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.square().sum((1, 2, 3))

    real, fake = torch.zeros(40, 1, 2, 2, device=place.device), torch.ones(40, 1, 2, 2, device=place.device)
    fused_gradient_penalty(critic, real, fake, backend=place.backend)
    input_gradient(critic, real, fake, mistaken(real))
    ours, theirs = seen
    assert same_within_a_sample(ours)
    assert another_in_each_sample(ours)
    assert within_0_and_1(ours)
    assert not broken(theirs)


def test_no_create_graph(place):
    """Without create_graph the value is right, and the penalty trains nothing; ours reaches the weights."""
    critic = strong_critic().eval().double().to(place.device)
    real, fake = batch_of(IMAGES, torch.float64, place.device)
    torch.manual_seed(7)
    gradients = input_gradient(critic, real, fake, alpha_per_sample(real), create_graph=False)
    wrong = ((gradients.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
    wanted = outcome(right, critic, real, fake)
    actual = outcome(fused, critic, real, fake, backend=place.backend)
    torch.testing.assert_close(wrong, actual.values[0].detach(), rtol=1e-10, atol=0)
    assert not wrong.requires_grad
    assert_same(actual, wanted)


def test_no_epsilon_at_a_zero_gradient(place):
    """sqrt has no slope at 0: one sample of gradient zero, and every weight is NaN. Ours has zero there, even so."""
    critic = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double().to(place.device)
    real, fake = batch_of((5, 4), torch.float64, place.device)
    with torch.no_grad():
        critic[0].bias.fill_(-1)
        real[2] = fake[2] = 0  # no unit is active here
    torch.manual_seed(7)
    gradients = input_gradient(critic, real, fake, torch.rand(5, 1, device=place.device))
    wrong = ((gradients.square().sum(1).sqrt() - 1) ** 2).mean()
    assert torch.autograd.grad(wrong, critic[0].weight)[0].isnan().any()
    wanted = outcome(right, critic, real, fake)
    actual = outcome(fused, critic, real, fake, backend=place.backend)
    assert_same(actual, wanted)
    assert all(gradient.isfinite().all() for gradient in actual.gradients)


def test_the_page_names_every_row():
    """docs/systems.md has a row for each row here, under the same name, and no other."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "systems.md").read_text()
    named = re.findall(r"^\| \*\*(.+?)\*\*", page, re.MULTILINE)
    rows = [row.id for row in SYSTEMS + MISTAKES]
    rows += ["StyleGAN lazy R1", "no create_graph", "no epsilon at a zero gradient"]
    assert sorted(named) == sorted(rows)
