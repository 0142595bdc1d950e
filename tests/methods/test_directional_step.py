"""method="directional": the step of the difference, chosen by reruns, for the dtype that the critic computes in."""

import copy
import math

import pytest
import torch
from torch import nn

from fused_gp import fused_gradient_penalty, reference
from fused_gp.methods import directional
from fused_gp.methods.directional import SPACING
from fused_gp.ops import torch_ops
from tests.support.critics import conv, mlp
from tests.support.gradients import gradient, relative_error
from tests.support.samples import fp32_images, fp32_vectors, images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("critic", ["flat", "steep", "curved"])
def test_the_chosen_step_is_near_the_best(critic):
    """For critics whose best steps are so far apart that no one fraction is good for all."""
    critic = {
        "flat": lambda: mlp(activation=nn.Tanh),
        "steep": lambda: with_larger_weights(mlp(activation=nn.Tanh), 30.0),
        "curved": lambda: conv(nn.GroupNorm(2, 4)),
    }[critic]()
    batch = fp32_images() if isinstance(critic[0], nn.Conv2d) else fp32_vectors()
    alpha = torch.rand(8)
    exact = copy.deepcopy(critic).double()
    double = [x.double() for x in batch]
    expected = gradient(reference.fused_gradient_penalty(exact, *double, alpha=alpha.double()), exact)

    def error(step=None):
        penalty = fused_gradient_penalty(critic, *batch, alpha=alpha, method="directional", step=step)
        return relative_error(gradient(penalty, critic), expected)

    sweep = [error(SPACING[torch.float32] ** (1 / 3) * 2.0**power) for power in range(-9, 4)]
    assert error() <= 3 * min(sweep)
    assert sweep[0] > 10 * min(sweep) < sweep[-1]


def with_larger_weights(critic, factor):
    with torch.no_grad():
        critic[0].weight *= factor
    return critic


@pytest.mark.parametrize(
    ("quotients", "chosen"),
    [
        ((9.0, 5.0, 3.0, 2.1, 2.0, 2.05, 2.5, 4.0), 4),
        ((9.0, 4.0, 2.0, 1.0, 1.1, 5.0, 5.0, 9.0), 3),  # two that agree by chance, far from their neighbours
        ((math.inf, math.nan, 3.0, 2.1, 2.0, 2.05, 2.5, 4.0), 4),
        ((math.nan,) * 8, None),
    ],
)
def test_the_chosen_step_is_in_the_middle_of_three_quotients_that_agree(quotients, chosen):
    """Best of all, and not of two that agree by chance."""
    steps = dict(zip(directional.STEP_LADDER, quotients, strict=True))

    class Stencil:
        def ends(self, column, attached):
            assert not attached
            return column.item(), -column.item()

    class CriticCall:
        def scores(self, end):
            return torch.tensor([end * steps[abs(end)]])

    step = directional._best_step(CriticCall(), Stencil(), torch.ones(()), spacing=1.0)
    assert math.isnan(step) if chosen is None else step == directional.STEP_LADDER[chosen]


def test_the_step_is_chosen_again_after_a_number_of_calls(monkeypatch):
    """At the first call and every TRIAL_EVERY-th, by 16 runs without a graph; not by points that are not finite."""
    monkeypatch.setattr(directional, "TRIAL_EVERY", 3)
    runs = []
    net = mlp()
    net.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    reruns = 2 * len(directional.STEP_LADDER)

    def call(scale=1.0):
        runs.clear()
        real, fake = fp32_vectors()
        fused_gradient_penalty(net, real * scale, fake, method="directional")
        return len(runs) - 3, runs.count(False)

    assert call(math.inf) == (reruns, reruns)
    assert [call() for _ in range(7)] == [(reruns, reruns), (0, 0), (0, 0)] * 2 + [(reruns, reruns)]


class InBf16(nn.Module):
    """Computes in bf16, with fp32 inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.net = conv().bfloat16()

    def forward(self, x):
        return self.net(x.bfloat16()).float()


class InFp32(nn.Module):
    """Computes in fp32, whatever its input's dtype."""

    def __init__(self):
        super().__init__()
        self.net = conv()

    def forward(self, x):
        return self.net(x.float())


def test_the_step_depends_on_the_dtype_that_the_critic_computes_in(monkeypatch):
    """Found in the graph where it is not the dtype of the points; autocast may change from call to call."""
    steps = []
    original = torch_ops.perturb

    def recording(points, gradients, column):
        lengths = (gradients.double() * column).norm(dim=1)
        steps.append((lengths.max() / points.double().norm(dim=1).mean()).item())
        return original(points, gradients, column)

    monkeypatch.setattr(torch_ops, "perturb", recording)

    def step(critic, dtype=torch.float32, autocast=None, **options):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            fused_gradient_penalty(critic, *images(8, dtype=dtype), method="directional", **options)
        return steps.pop()

    plain = conv()
    monkeypatch.setattr(directional, "STEP_LADDER", [0.3, 0.3, 0.3])  # a single step to choose from
    default_step = {dtype: pytest.approx(0.3 * spacing ** (1 / 3), rel=0.05) for dtype, spacing in SPACING.items()}
    assert step(plain) == default_step[torch.float32]
    assert step(plain, autocast=torch.bfloat16) == default_step[torch.bfloat16]
    assert step(plain) == default_step[torch.float32]
    assert step(conv().double(), torch.float64) == default_step[torch.float64]
    assert step(conv().bfloat16(), torch.bfloat16) == default_step[torch.bfloat16]
    assert step(InBf16()) == default_step[torch.bfloat16]
    assert step(InFp32(), torch.bfloat16) == default_step[torch.bfloat16]  # the points themselves are rounded to bf16
    assert step(plain, step=0.01) == pytest.approx(0.01, rel=0.01)


def test_another_dtype_of_the_critic_has_another_step():
    """A critic in fp64, then in fp32."""
    critic, alpha = conv().double(), torch.rand(8)
    fused_gradient_penalty(critic, *images(8), method="directional")
    critic, batch = critic.float(), fp32_images()
    expected = gradient(reference.fused_gradient_penalty(critic, *batch, alpha=alpha), critic)
    ours = gradient(fused_gradient_penalty(critic, *batch, alpha=alpha, method="directional"), critic)
    assert relative_error(ours, expected) <= 5e-5
