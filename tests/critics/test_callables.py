"""Critics inside containers and objects, behind lambdas."""

import pytest
import torch

from tests.support.critics import mlp, spectrally_normalised
from tests.support.family import ours_and_reference
from tests.support.gradients import gradient, relative_error
from tests.support.samples import vectors

pytestmark = pytest.mark.usefixtures("one_thread")


def test_buffers_of_critics_in_containers_are_restored():
    """As those of a critic that is the closure's own variable."""

    class Nets:
        pass

    def helper(x):
        return models["D"](x)

    real, fake = vectors(8)
    for behind in (
        lambda models, nets: lambda x: models["D"](x), lambda models, nets: lambda x: helper(x),
        lambda models, nets: lambda x: nets.inner.D(x),
        lambda models, nets: lambda x: sum(nets.inner.D(y) for y in (x,)),
        lambda models, nets: lambda x: sum(d(x) for d in models["all"]),
    ):  # fmt: skip
        results = []
        for function, options in ours_and_reference("fused_gradient_penalty", method="directional"):
            torch.manual_seed(2)
            critic = spectrally_normalised().double()
            models, nets = {"D": critic, "G": mlp(), "all": [critic]}, Nets()
            nets.inner, nets.inner.D = Nets(), critic
            penalty = function(behind(models, nets), real, fake, alpha=0.5, **options)
            results.append((gradient(penalty, critic), *critic.buffers()))
        ours, expected = results
        assert relative_error(ours[0], expected[0]) <= 1e-8
        for buffer, expected_buffer in zip(ours[1:], expected[1:], strict=True):
            torch.testing.assert_close(buffer, expected_buffer)
