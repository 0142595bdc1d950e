"""method="directional": critics with a kink are refused, by the name of the operation; smooth ones are not."""

import math

import pytest
import torch
from torch import nn

from fused_gp import fused_gradient_penalty, reference
from tests.support.gradients import gradient, relative_error
from tests.support.messages import NOT_SMOOTH, exactly
from tests.support.samples import fp32_vectors

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_SMOOTH_FUNCTIONS = {
    "ReLU": (nn.ReLU(), "Relu"), "LeakyReLU": (nn.LeakyReLU(0.2), "LeakyRelu"), "PReLU": (nn.PReLU(), "PreluKernel"),
    "RReLU": (nn.RReLU(), "RreluWithNoise"), "ReLU6": (nn.ReLU6(), "Hardtanh"), "Hardtanh": (nn.Hardtanh(), "Hardtanh"),
    "Hardswish": (nn.Hardswish(), "Hardswish"), "Hardsigmoid": (nn.Hardsigmoid(), "Hardsigmoid"),
    "Softshrink": (nn.Softshrink(), "Softshrink"), "Hardshrink": (nn.Hardshrink(), "Hardshrink"),
    "Threshold": (nn.Threshold(0.1, 0.0), "Threshold"),
    "SELU": (nn.SELU(), "Elu with two slopes at zero (SELU, or alpha other than 1)"),
    "ELU of 2": (nn.ELU(2.0), "Elu with two slopes at zero (SELU, or alpha other than 1)"),
    "abs": (torch.abs, "Abs"), "clamp": (lambda x: x.clamp(-1, 1), "Clamp"),
    "clamp from below": (lambda x: x.clamp(min=0), "Clamp"), "clamp_min": (lambda x: x.clamp_min(0), "ClampMin"),
    "maximum": (lambda x: torch.maximum(x, x.flip(1)), "Maximum"),
    "minimum": (lambda x: torch.minimum(x, x.flip(1)), "Minimum"),
    "amax": (lambda x: x.amax(1, keepdim=True), "Amax"), "max": (lambda x: x.max(1, keepdim=True).values, "Max"),
    "sort": (lambda x: x.sort(1).values, "Sort"), "topk": (lambda x: x.topk(2).values, "Topk"),
    "median": (lambda x: x.median(1, keepdim=True).values, "Median"),
    "round": (lambda x: x + x.round(), "Round"), "sign": (lambda x: x + x.sign(), "Sign"),
    "copysign": (lambda x: torch.copysign(x, torch.ones(())), "Copysign"),
    "1-distance": (lambda x: torch.cdist(x, torch.zeros(1, 6), 1), "Cdist of order 1"),
    "scatter": (
        lambda x: torch.zeros(len(x), 1).scatter_reduce(1, torch.zeros(x.shape, dtype=torch.long), x, "amax"),
        "ScatterReduce with amax",
    ),
    "1-norm": (lambda x: torch.linalg.vector_norm(x, 1, 1, keepdim=True), "LinalgVectorNorm of order 1"),
    "max-norm": (lambda x: torch.linalg.vector_norm(x, math.inf, 1, keepdim=True), "LinalgVectorNorm of order inf"),
    "max-pool": (lambda x: nn.functional.max_pool2d(x[:, None, None], (1, 2)).flatten(1), "MaxPool2DWithIndices"),
    "adaptive max-pool": (
        lambda x: nn.functional.adaptive_max_pool2d(x[:, None, None], (1, 2)).flatten(1), "AdaptiveMaxPool2D"
    ),
}  # fmt: skip

SMOOTH_LAYERS = [nn.SiLU(), nn.GELU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.ELU(), nn.CELU(2.0),
           nn.LogSigmoid(), nn.Softmax(1), nn.GLU(1), nn.LayerNorm(6)]  # fmt: skip


class BetweenLayers(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.before, self.after = nn.Linear(6, 6), nn.LazyLinear(1)

    def forward(self, x):
        return self.after(self.function(self.before(x)))


@pytest.mark.parametrize("name", NOT_SMOOTH_FUNCTIONS)
def test_operations_with_a_kink_are_refused_by_name(name):
    """allow_kinks=True allows them, for that call alone."""
    function, operation = NOT_SMOOTH_FUNCTIONS[name]
    critic = BetweenLayers(function)
    critic(fp32_vectors()[0])
    for _ in range(2):
        fused_gradient_penalty(critic, *fp32_vectors(), method="directional", allow_kinks=True).backward()
        with pytest.raises(ValueError, match=exactly(NOT_SMOOTH.format(operation))):
            fused_gradient_penalty(critic, *fp32_vectors(), method="directional")


@pytest.mark.parametrize("layer", SMOOTH_LAYERS, ids=lambda layer: type(layer).__name__)
def test_smooth_layers_are_allowed(layer):
    critic = BetweenLayers(layer)
    critic(fp32_vectors()[0])
    fused_gradient_penalty(critic, *fp32_vectors(), method="directional").backward()


class TensorSubclass(torch.Tensor):
    pass


def test_kinks_are_found_with_samples_of_a_tensor_subclass():
    critic, (real, fake) = BetweenLayers(nn.ReLU()), fp32_vectors()
    critic(real)
    with pytest.raises(ValueError, match="needs a smooth critic, and found Relu"):
        fused_gradient_penalty(
            critic, real.as_subclass(TensorSubclass), fake.as_subclass(TensorSubclass), method="directional"
        )


def test_scattered_sums_are_allowed():
    critic = BetweenLayers(
        lambda x: torch.zeros(len(x), 1).scatter_reduce(1, torch.zeros(x.shape, dtype=torch.long), x, "sum")
    )
    critic(fp32_vectors()[0])
    fused_gradient_penalty(critic, *fp32_vectors(), method="directional").backward()


def test_a_difference_across_kinks_has_a_large_error():
    """At every step, with allow_kinks too: the reason to refuse."""
    layers = [nn.Linear(6, 512), nn.LeakyReLU(0.2), nn.Linear(512, 512), nn.LeakyReLU(0.2), nn.Linear(512, 1)]
    critic, (real, fake), alpha = nn.Sequential(*layers), fp32_vectors(64), torch.rand(64)
    expected = gradient(reference.fused_gradient_penalty(critic, real, fake, alpha=alpha), critic)
    for step in (None, 0.1, 1e-2, 1e-4):
        penalty = fused_gradient_penalty(
            critic, real, fake, alpha=alpha, method="directional", step=step, allow_kinks=True
        )
        assert relative_error(gradient(penalty, critic), expected) > 0.1


def test_a_kink_beside_the_path_of_the_samples_is_allowed():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.embed, self.head = nn.Linear(6, 5), nn.Linear(3, 5), nn.Linear(5, 1)

        def forward(self, x, labels):
            return self.head(torch.tanh(self.body(x)) + torch.relu(self.embed(labels)))

    labels = torch.rand(8, 3)
    fused_gradient_penalty(Labelled(), *fp32_vectors(), critic_args=(labels,), method="directional").backward()
