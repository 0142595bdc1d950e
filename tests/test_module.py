"""GradientPenalty: a penalty function with its options as a module, computed at every k-th call."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_gp import (
    GradientPenalty,
    dragan_penalty,
    fused_gradient_penalty,
    input_gradient_penalty,
    r1_penalty,
    r2_penalty,
)


@pytest.fixture
def critic():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


@pytest.fixture
def batch():
    return torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


def test_it_is_the_function_with_its_options(place, critic, batch):
    """Options of a call replace those of the module."""
    critic = critic.to(place.device)
    real, fake = (t.to(place.device) for t in batch)
    module = GradientPenalty(weight=10.0, one_sided=True, backend=place.backend)
    assert module(critic, real, fake, alpha=0.3).equal(
        fused_gradient_penalty(critic, real, fake, alpha=0.3, weight=10.0, one_sided=True, backend=place.backend)
    )
    penalty, norms = module(critic, real, fake, alpha=0.3, weight=2.0, return_norms=True)
    expected = fused_gradient_penalty(
        critic, real, fake, alpha=0.3, weight=2.0, one_sided=True, return_norms=True, backend=place.backend
    )
    assert penalty.equal(expected[0])
    assert norms.equal(expected[1])


@pytest.mark.parametrize("compensate", [True, False])
def test_every_third_call_computes(place, critic, batch, compensate):
    """Times three where compensated, so that the sum over three calls is that of computing each."""
    critic = critic.to(place.device)
    real = batch[0].to(place.device)
    module = GradientPenalty(r1_penalty, every=3, compensate=compensate, weight=5.0, backend=place.backend)
    each = r1_penalty(critic, real, weight=5.0, backend=place.backend)
    factor = 3 if compensate else 1
    calls = []
    critic.register_forward_hook(lambda *_: calls.append(1))
    values = [module(critic, real) for _ in range(7)]
    assert len(calls) == 3
    for step, value in enumerate(values):
        expected = each * factor if step % 3 == 0 else torch.zeros_like(each)
        torch.testing.assert_close(value.double(), expected)


def test_a_skipped_penalty_has_a_backward_that_reaches_nothing(critic, batch):
    """As a loss, or as a part of one."""
    module = GradientPenalty(every=2, weight=10.0)
    module(critic, *batch)
    skipped = module(critic, *batch)
    assert skipped.item() == 0
    skipped.backward()
    assert all(p.grad is None for p in critic.parameters())
    module(critic, *batch)
    (critic(batch[0]).mean() + module(critic, *batch)).backward()
    assert all(p.grad is not None for p in critic.parameters())


def test_a_skipped_call_returns_what_a_computed_one_does(critic, batch):
    module = GradientPenalty(every=2, return_norms=True)
    penalty, norms = module(critic, *batch)
    assert norms.shape == (4,)
    penalty, norms = module(critic, *batch)
    assert penalty.item() == 0
    assert norms is None
    with torch.no_grad():
        module(critic, *batch)
        penalty, _ = module(critic, *batch)
    assert not penalty.requires_grad


def test_a_skipped_call_draws_no_random_numbers(critic, batch):
    module = GradientPenalty(every=2)
    module(critic, *batch)
    before = torch.get_rng_state()
    module(critic, *batch)
    assert torch.get_rng_state().equal(before)


def test_compensation_changes_no_norms(critic, batch):
    module = GradientPenalty(every=4, return_norms=True)
    penalty, norms = module(critic, *batch, alpha=0.5)
    expected, expected_norms = fused_gradient_penalty(critic, *batch, alpha=0.5, return_norms=True)
    torch.testing.assert_close(penalty, 4 * expected)
    assert norms.equal(expected_norms)


def test_evaluation_mode_computes_and_does_not_count(critic, batch):
    """So a validation penalty is comparable from step to step, and does not change which training steps are skipped."""
    module = GradientPenalty(every=2)
    module(critic, *batch)
    module.eval()
    expected = fused_gradient_penalty(critic, *batch, alpha=0.5)
    for _ in range(3):
        assert module(critic, *batch, alpha=0.5).equal(expected)
    module.train()
    assert module(critic, *batch).item() == 0
    assert module(critic, *batch).item() != 0


@pytest.mark.parametrize("steps", [0, 1, 3, 4])
def test_the_state_dict_has_the_count(critic, batch, steps):
    """Training that was stopped and resumed skips the same steps as training that was not."""
    straight, stopped = GradientPenalty(every=4), GradientPenalty(every=4)
    values = [straight(critic, *batch, alpha=0.5).item() for _ in range(9)]
    model = nn.ModuleDict({"penalty": stopped})
    before = [stopped(critic, *batch, alpha=0.5).item() for _ in range(steps)]
    saved = pickle.loads(pickle.dumps(model.state_dict()))
    resumed = nn.ModuleDict({"penalty": GradientPenalty(every=4)})
    resumed.load_state_dict(saved)
    after = [resumed["penalty"](critic, *batch, alpha=0.5).item() for _ in range(9 - steps)]
    assert before + after == values


def test_state_dict_is_saved_and_loaded_by_torch(tmp_path):
    module = GradientPenalty(every=4)
    module.calls = 7
    torch.save(module.state_dict(), tmp_path / "penalty.pt")
    fresh = GradientPenalty(every=4)
    fresh.load_state_dict(torch.load(tmp_path / "penalty.pt", weights_only=True))
    assert fresh.calls == 7


def test_a_call_that_raises_does_not_count(critic, batch):
    module = GradientPenalty(every=2)
    with pytest.raises(ValueError, match="one shape"):
        module(critic, batch[0], batch[1][:2])
    assert module(critic, *batch).item() != 0


def test_every_function_of_the_family(critic, batch):
    real, fake = batch
    assert GradientPenalty(r2_penalty, weight=2.0)(critic, fake).equal(r2_penalty(critic, fake, weight=2.0))
    module = GradientPenalty(dragan_penalty, noise_scale=0.1)
    torch.manual_seed(1)
    value = module(critic, real)
    torch.manual_seed(1)
    assert value.equal(dragan_penalty(critic, real, noise_scale=0.1))
    real.requires_grad_()
    scores = critic(real)
    assert GradientPenalty(input_gradient_penalty)(scores, real).equal(input_gradient_penalty(scores, real))


def test_it_is_a_module(critic, batch):
    module = GradientPenalty(r1_penalty, every=16, weight=10.0)
    assert repr(module) == "GradientPenalty(r1_penalty, every=16, compensate=True, weight=10.0)"
    assert not list(module.parameters())
    twin = copy.deepcopy(module)
    twin(critic, batch[0])
    assert module.calls == 0
    pickle.loads(pickle.dumps(module))(critic, batch[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 2.0}, TypeError, "every must be an int, got float"),
        ({"every": True}, TypeError, "every must be an int, got bool"),
        ({"compensate": 1}, TypeError, "compensate must be True or False, got 1"),
        ({"penalty": "r1"}, TypeError, "penalty must be callable, got str"),
        ({"lambda_": 10}, TypeError, "options must be of fused_gradient_penalty: alpha, .*; got lambda_"),
        ({"penalty": r1_penalty, "target": 1.0}, TypeError, "options must be of r1_penalty: weight, .*; got target"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        GradientPenalty(**options)
