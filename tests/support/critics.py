"""Small critics, layers of critics, and objects that own a critic. All parameters are fp32 until `.double()`."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint


def mlp(width=6, activation=nn.SiLU, *, out=1):
    return nn.Sequential(nn.Linear(width, 7), activation(), nn.Linear(7, out))


def conv(*middle):
    """For images of two channels; scores are a map of patches."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), *middle, nn.SiLU(), nn.Conv2d(4, 1, 2))


def spectrally_normalised(width=6):
    """Its buffers take a step of the power iteration at each run in training mode."""
    return nn.Sequential(spectral_norm(nn.Linear(width, 8)), nn.Tanh(), nn.Linear(8, 1))


def nested_batch_norm():
    """Batch normalisation by the name 1.0, for vectors of four elements."""
    return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.BatchNorm1d(3)), nn.Linear(3, 1))


def unused_critic(x):
    raise AssertionError("the critic ran before its arguments were checked")


class ViT(nn.Module):
    """Four patches, one block. Attention is a flash kernel, on CPUs too, where sdpa_kernel does not forbid it."""

    def __init__(self):
        super().__init__()
        self.patches, self.qkv, self.head = nn.Conv2d(2, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 1)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.gelu(tokens + attended).mean(1))


class MathAttention(nn.Module):
    """Its critic with attention in separate operations, which autograd differentiates twice."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        with sdpa_kernel(SDPBackend.MATH):
            return self.critic(x)


class WithoutCudnn(nn.Module):
    """Its critic with recurrent layers of torch's own, which autograd differentiates twice, and cuDNN's once."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        with torch.backends.cudnn.flags(enabled=False):
            return self.critic(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Conditional(nn.Module):
    """A projection discriminator: its scores depend on labels, an embedding of the samples, and a strength."""

    def __init__(self):
        super().__init__()
        self.body, self.embed, self.head = nn.Linear(6, 5), nn.Embedding(3, 5), nn.Linear(5, 1)

    def forward(self, x, labels, *, embedding=0.0, strength=1.0):
        features = torch.tanh(self.body(x) + embedding)
        return self.head(features).squeeze(1) + strength * (features * self.embed(labels)).sum(1)


class MinibatchStd(nn.Module):
    """StyleGAN's layer: the standard deviation over the batch becomes a feature of each sample, which couples them."""

    def forward(self, x):
        deviation = (x.var(0, correction=0) + 1e-8).sqrt().mean()
        return torch.cat((x, deviation.expand(len(x), 1)), 1)


class Transposed(nn.Module):
    """A layer after which the batch is the last dimension."""

    def forward(self, x):
        return x.T


class OneScoreTooMany(nn.Module):
    """Its critic's scores, and the first of them again."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        scores = self.critic(x).flatten()
        return torch.cat((scores, scores[:1]))


class Checkpointed(nn.Module):
    """Its part without stored activations: the backward pass computes them again."""

    def __init__(self, part, use_reentrant=False):
        super().__init__()
        self.part, self.use_reentrant = part, use_reentrant

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.use_reentrant)


class FusedTanh(torch.autograd.Function):
    """As a fused kernel: its backward has no derivative."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return upstream * (1 - ctx.saved_tensors[0] ** 2)


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# Objects that own a critic, and most of them a generator with batch normalisation too.


class ScoringModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nested_batch_norm()

    def score(self, x):
        return self.net(x)


class Trainer(nn.Module):
    """A module that owns a generator with batch normalisation, as most generators have, beside a critic."""

    def __init__(self, critic):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.critic = critic

    def score(self, x):
        return self.critic(x)

    def as_lambda(self):
        return lambda x: self.critic(x)


class CallableOwner:
    """Not a module, but callable."""

    def __init__(self, critic):
        self.generator = nn.BatchNorm1d(4)
        self.critic = critic

    def __call__(self, x):
        return self.critic(x)


class OwnerWithSlots:
    """Calls the critic through methods and properties of its own, and keeps it in a slot."""

    __slots__ = ("__weakref__", "critic", "generator")

    def __init__(self, critic):
        self.generator = nn.BatchNorm1d(4)
        self.critic = critic

    @property
    def scored(self):
        return self._score

    def _score(self, x):
        return self.critic(x)

    def by_method(self, x):
        return self._score(x)

    def by_property(self, x):
        return self.scored(x)


class LoggingOwner:
    """Other methods of it write a log and train the generator, and its class has an attribute of an odd type."""

    odd = type("AttributeDict", (dict,), {"__getattr__": dict.__getitem__})(one=1)

    def __init__(self, critic):
        self.generator = nn.BatchNorm1d(4)
        self.critic, self.history = critic, []

    def train(self):
        self.generator.train()

    def log(self, value):
        self.history.append(value)

    def __call__(self, x):
        self.critic.train()
        scores = self.critic(x)
        self.log(float(scores.detach().sum()))
        return scores * len(self.odd)
