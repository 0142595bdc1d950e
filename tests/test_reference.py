"""The reference itself."""

import torch

from fused_gp import reference


def test_interpolation_is_exact_in_fp64():
    """Compared with the formula written out, with a number and with a tensor for alpha."""
    real, fake = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    expected = 0.3 * fake + 0.7 * real
    for alpha in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)):
        torch.testing.assert_close(reference.interpolate(real, fake, alpha), expected, rtol=1e-15, atol=1e-15)
