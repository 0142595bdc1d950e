"""The critics that people train with a gradient penalty."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


def mlp(inputs: int, width: int = 512, hidden: int = 3) -> nn.Sequential:
    """Three hidden layers, as in the WGAN-GP paper's toy problems, or two of 1024, as imitation learning has them."""
    widths = [inputs, *[width] * hidden]
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 1))


def dcgan(
    size: int = 64, width: int = 64, activation: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2)
) -> nn.Module:
    """Convolutions of stride 2 down to 4 x 4, without batch normalisation, as WGAN-GP has it."""
    widths = [3, *(width << level for level in range(size.bit_length() - 3))]
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 4, 2, 1), activation()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 1))


class Residual(nn.Module):
    """The pre-activation block of the WGAN-GP paper's ResNets; down-sampling is a mean."""

    def __init__(
        self, inputs: int, outputs: int, down: bool, first: bool, wrap: Callable[[nn.Module], nn.Module]
    ) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.one, self.two = wrap(nn.Conv2d(inputs, outputs, 3, 1, 1)), wrap(nn.Conv2d(outputs, outputs, 3, 1, 1))
        self.shortcut = wrap(nn.Conv2d(inputs, outputs, 1)) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(F.relu(self.one(x if self.first else F.relu(x))))
        if not self.down:
            return y + x
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))


def resnet(width: int = 128, wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> nn.Sequential:
    """The WGAN-GP paper's critic for CIFAR-10: four blocks, the first two down-sampling, then a mean over places."""
    blocks = [
        Residual(3 if level == 0 else width, width, down=level < 2, first=level == 0, wrap=wrap) for level in range(4)
    ]
    return nn.Sequential(*blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(width, 1)))


def spectral_resnet(width: int = 128) -> nn.Sequential:
    """The same under spectral normalisation, as SNGAN has it."""
    return resnet(width, spectral_norm)


class GroupedResidual(nn.Module):
    """R3GAN's block: a convolution in groups of 16 channels, between two that widen and narrow it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.layers = nn.Sequential(
            nn.Conv2d(width, wide, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide // 16), nn.LeakyReLU(0.2),
            nn.Conv2d(wide, width, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def grouped(size: int = 64, width: int = 48, widest: int = 192) -> nn.Sequential:
    """R3GAN's critic, narrowed four times: two blocks a level down to 4 x 4, and a depthwise convolution at the end."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 1)]
    for _ in range(size.bit_length() - 3):
        wider = min(2 * width, widest)
        layers += [GroupedResidual(width), GroupedResidual(width), nn.AvgPool2d(2), nn.Conv2d(width, wider, 1)]
        width = wider
    layers += [GroupedResidual(width), GroupedResidual(width), nn.Conv2d(width, width, 4, groups=width)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class ViT(nn.Module):
    """Images in patches of 4 x 4: 64 x 64 are 256 tokens."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 16, tokens: int = 256) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.places).mean(1))


class Packed(nn.Module):
    """The layers of CTGAN's discriminator, which judges `pac` rows of a table as one; without dropout, whose masks
    would have to be the same for all."""

    def __init__(self, columns: int, pac: int = 10, width: int = 256) -> None:
        super().__init__()
        self.columns = columns * pac
        self.layers = nn.Sequential(
            nn.Linear(columns * pac, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows.reshape(-1, self.columns))
