"""input_gradient_penalty, of a critic that has run: several outputs with weights, several inputs, one graph."""

import pytest
import torch
from torch import nn

from fused_gp import input_gradient_penalty
from tests.support.critics import mlp
from tests.support.family import ours_and_reference
from tests.support.gradients import gradients
from tests.support.places import to_device
from tests.support.samples import doubles
from tests.support.tolerances import assert_same

pytestmark = pytest.mark.usefixtures("one_thread")


class ThreeOutputs(nn.Module):
    """Two inputs, one of them ignored by one head: scores, a patch map, and a scalar."""

    def __init__(self):
        super().__init__()
        self.image, self.row = nn.Conv2d(2, 3, 2), mlp(4)

    def forward(self, images, rows):
        features = torch.tanh(self.image(images))
        scores = self.row(rows) + features.mean((1, 2, 3))[:, None]
        return scores, features, scores.square().mean()


def critic_inputs_and_outputs(device, requires_grad=True):
    torch.manual_seed(5)
    critic = ThreeOutputs().double().to(device)
    inputs = (doubles(3, 2, 3, 3).to(device).requires_grad_(requires_grad), doubles(3, 4).to(device).requires_grad_())
    return critic, inputs, critic(*inputs)


OUTPUT_WEIGHTS = {
    "none": None,
    "numbers": (1.0, 0.5, -2),
    "tensors": (torch.rand(3, 1).double(), torch.rand(3, 3, 2, 2).double(), torch.rand(()).double()),
    "mixed": (torch.rand(3, 1).double(), 0.5, torch.tensor(3.0).double()),
    "zero": (1.0, 0.0, 0.0),
}


@pytest.mark.parametrize("options", [{}, {"one_sided": True, "target": 0.1}, {"target": 0.0, "reduction": "sum"}])
@pytest.mark.parametrize("output_weights", OUTPUT_WEIGHTS)
def test_several_outputs_and_inputs_have_one_norm(place, output_weights, options):
    """With weights for the outputs."""
    weights = to_device(OUTPUT_WEIGHTS[output_weights], place.device)
    results = []
    for function, extra in ours_and_reference("input_gradient_penalty", backend=place.backend):
        critic, inputs, outputs = critic_inputs_and_outputs(place.device)
        penalty, norms = function(outputs, inputs, output_weights=weights, return_norms=True, **options, **extra)
        parameters = [*critic.parameters(), *inputs]
        results.append((penalty.detach(), norms, *torch.autograd.grad(penalty, parameters, materialize_grads=True)))
    assert_same(*results)


def test_learned_output_weights_get_gradients(place):
    """As autograd gives them."""
    results = []
    for function, extra in ours_and_reference("input_gradient_penalty", backend=place.backend):
        _, inputs, (scores, features, _) = critic_inputs_and_outputs(place.device)
        learned = torch.full((3, 1), 0.7, dtype=torch.float64, device=place.device, requires_grad=True)
        balance = torch.tensor(0.3, dtype=torch.float64, device=place.device, requires_grad=True)
        penalty = function((scores, features), inputs, output_weights=(learned, balance), **extra)
        results.append((penalty.detach(), *torch.autograd.grad(penalty, (learned, balance))))
    assert_same(*results)


SELECTIONS = {
    "scores alone": lambda outputs, inputs: (outputs[0], inputs[1]),
    "a scalar": lambda outputs, inputs: (outputs[2], inputs[0]),
    "dicts": lambda outputs, inputs: ({"a": outputs[0], "b": outputs[2]}, {"x": inputs[0], "y": inputs[1]}),
    "an input ignored": lambda outputs, inputs: (outputs[1], inputs),
    "an output without a graph": lambda outputs, inputs: ([outputs[1].detach(), outputs[0]], inputs),
}


@pytest.mark.parametrize("part", SELECTIONS)
def test_some_outputs_of_some_inputs(place, part):
    """Gradients are zero for inputs that the outputs do not depend on, and for outputs without a graph."""
    results = []
    for function, extra in ours_and_reference("input_gradient_penalty", backend=place.backend):
        critic, inputs, outputs = critic_inputs_and_outputs(place.device)
        penalty, norms = function(*SELECTIONS[part](outputs, inputs), return_norms=True, **extra)
        grads = gradients(penalty, critic.parameters())
        results.append((penalty.detach(), norms, *grads))
    assert_same(*results)


def test_one_graph_serves_the_loss_and_two_penalties(place):
    """One run of the critic, and one backward for all."""
    results = []
    for function, extra in ours_and_reference("input_gradient_penalty", backend=place.backend):
        critic, inputs, (scores, features, _) = critic_inputs_and_outputs(place.device)
        first = function(scores, inputs, **extra)
        second = function((scores, features), inputs, target=0.0, **extra)
        assert all(x.grad is None for x in inputs)
        (scores.mean() + first + second).backward()
        results.append([p.grad for p in critic.parameters()] + [x.grad for x in inputs])
    assert_same(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_value_without_gradients(place, mode):
    """Under no_grad the penalty of an existing graph has no graph of its own, and the loss still has its backward."""
    critic, inputs, outputs = critic_inputs_and_outputs(place.device)
    expected, expected_norms = input_gradient_penalty(outputs, inputs, backend=place.backend, return_norms=True)
    with mode():
        penalty, norms = input_gradient_penalty(outputs, inputs, backend=place.backend, return_norms=True)
    assert not penalty.requires_grad
    assert_same((penalty, norms), (expected.detach(), expected_norms))
    (outputs[0].mean() + expected).backward()
    assert critic.row[0].weight.grad.isfinite().all()
