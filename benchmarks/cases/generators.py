"""The generators of the training steps."""

from torch import nn

LATENTS = 128


def dcgan(size: int, width: int = 64) -> nn.Sequential:
    """Transposed convolutions of stride 2 from 4 x 4 up."""
    levels = size.bit_length() - 3
    widest = width << (levels - 1)
    layers: list[nn.Module] = [nn.Linear(LATENTS, widest * 16), nn.Unflatten(1, (widest, 4, 4)), nn.ReLU()]
    for level in range(levels - 1):
        layers += [nn.ConvTranspose2d(widest >> level, widest >> (level + 1), 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())


def points() -> nn.Sequential:
    return nn.Sequential(nn.Linear(LATENTS, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
