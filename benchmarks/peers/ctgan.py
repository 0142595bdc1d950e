"""The package ctgan's own method, `Discriminator.calc_gradient_penalty`, called as it is, on rows of a table.

It has alpha on real, so the two change places. It asks autograd for the gradient at the interpolated rows without
saying that they need one, and relies on fake rows that come with a graph.
"""

from collections.abc import Callable

from torch import Tensor

from .implementation import Absent, Implementation


def peer() -> Implementation:
    try:
        from ctgan.synthesizers.ctgan import Discriminator
    except ImportError as error:
        raise Absent(f"needs the package ctgan (pip install '.[peers]'): {error}") from error

    def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, group_size: int = 1) -> Tensor:
        attached = fake.detach().requires_grad_()
        return Discriminator.calc_gradient_penalty(critic, attached, real, real.device, group_size, lambda_=1)

    return Implementation(gradient_penalty, groups=True)
