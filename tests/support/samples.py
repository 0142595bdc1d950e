"""Random samples. Functions that give two batches give real and fake, with the batch size first."""

import torch


def doubles(*shape):
    return torch.randn(shape, dtype=torch.float64)


def vectors(count=5, width=6, dtype=torch.float64):
    return tuple(torch.randn(count, width, dtype=dtype) for _ in range(2))


def images(count=5, size=8, dtype=torch.float64):
    return tuple(torch.randn(count, 2, size, size, dtype=dtype) for _ in range(2))


def fp32_vectors(count=8, width=6):
    return vectors(count, width, torch.float32)


def fp32_images(count=8):
    return images(count, dtype=torch.float32)


def quarters(shape, dtype, device):
    """Multiples of 1/4 up to 2: they, and the points half-way between them, are exact in every floating dtype."""
    return tuple((torch.randint(-8, 9, shape) / 4).to(device, dtype) for _ in range(2))
