"""The warning of batch normalisation in training mode: once per critic, and by name, behind any callable."""

import functools
import warnings

import pytest
import torch
from torch import nn

import fused_gp
from fused_gp import GradientPenalty, fused_gradient_penalty, r1_penalty
from tests.support.critics import (
    CallableOwner,
    LoggingOwner,
    OwnerWithSlots,
    ScoringModule,
    Trainer,
    mlp,
    nested_batch_norm,
)
from tests.support.samples import fp32_vectors

pytestmark = pytest.mark.usefixtures("one_thread")

GLOBAL_CRITIC = nested_batch_norm()

OWNERS = {
    "an object that does more": LoggingOwner,
    "a method that calls another": lambda critic: OwnerWithSlots(critic).by_method,
    "a method that takes a property": lambda critic: OwnerWithSlots(critic).by_property,
    "a trainer's method": lambda critic: Trainer(critic).score,
    "a lambda over a trainer": lambda critic: Trainer(critic).as_lambda(),
    "a callable object": CallableOwner,
    "a method of an object": lambda critic: CallableOwner(critic).__call__,
}

BATCH_NORMALISED = {
    "a module": (nested_batch_norm, "1.0"),
    "partial": (lambda: functools.partial(nested_batch_norm()), "1.0"),
    "a bound method": (lambda: ScoringModule().score, "net.1.0"),
    "a partial of a bound method": (lambda: functools.partial(ScoringModule().score), "net.1.0"),
    "a lambda over a closure": (lambda: (lambda net: lambda x: net(x))(nested_batch_norm()), "1.0"),
    "a lambda over a global": (lambda: lambda x: GLOBAL_CRITIC(x), "1.0"),
    "a lambda in a lambda over a global": (lambda: lambda x: (lambda y: GLOBAL_CRITIC(y))(x), "1.0"),
    "DataParallel": (lambda: nn.DataParallel(nested_batch_norm()), "module.1.0"),
}


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="DataParallel would send a CPU critic to the devices")
@pytest.mark.parametrize("kind", BATCH_NORMALISED)
def test_the_warning_names_the_layer_behind_any_callable(kind):
    """By its path in the critic, and once."""
    build, path = BATCH_NORMALISED[kind]
    critic = build()
    with pytest.warns(UserWarning, match=rf"batch normalisation in training mode \({path}\)") as caught:
        fused_gradient_penalty(critic, *fp32_vectors(4, 4))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            fused_gradient_penalty(critic, *fp32_vectors(4, 4))
            r1_penalty(critic, fp32_vectors(4, 4)[0])


@pytest.mark.parametrize("owner", OWNERS)
def test_batch_norm_of_an_owners_generator_is_not_warned_of(owner):
    """Of an object that owns both, only the part that runs counts."""
    fused_gradient_penalty(OWNERS[owner](mlp(4)), *fp32_vectors(4, 4))
    with pytest.warns(UserWarning, match=r"batch normalisation in training mode \(critic\.1\.0\)") as caught:
        fused_gradient_penalty(OWNERS[owner](nested_batch_norm()), *fp32_vectors(4, 4))
    assert len(caught) == 1


def test_batch_norm_without_running_statistics_is_warned_of_in_evaluation_too():
    critic = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).eval()
    with pytest.warns(UserWarning, match=r"\(0\)"):
        fused_gradient_penalty(critic, *fp32_vectors(4, 4))


def test_each_critic_has_its_own_warning():
    """It names all layers of the critic; a critic without batch normalisation has none."""
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"\(1\.0\)"):
            fused_gradient_penalty(nested_batch_norm(), *fp32_vectors(4, 4))
    fused_gradient_penalty(mlp(4), *fp32_vectors(4, 4))
    twice = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.SyncBatchNorm(4).eval(), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match=r"\(0, 3\)"):
        fused_gradient_penalty(twice, *fp32_vectors(4, 4))


@pytest.mark.parametrize(
    "nets", [(mlp, nested_batch_norm), (nested_batch_norm, nested_batch_norm)], ids=["none", "one"]
)
def test_lambdas_of_one_line_over_two_critics_are_two_critics(nets):
    """A training loop makes its lambda anew for each critic: the code is the same, the closure is not."""

    def penalty_of(net):
        return fused_gradient_penalty(lambda x: net(x), *fp32_vectors(4, 4))

    first, second = (net(4) if net is mlp else net() for net in nets)
    if nets[0] is mlp:
        penalty_of(first)
    else:
        with pytest.warns(UserWarning, match="batch normalisation"):
            penalty_of(first)
    with pytest.warns(UserWarning, match="batch normalisation"):
        penalty_of(second)


def test_the_warning_comes_with_the_first_call_in_training_mode():
    """In evaluation mode batch normalisation is a fixed affine map."""
    critic = nested_batch_norm().eval()
    for _ in range(2):
        fused_gradient_penalty(critic, *fp32_vectors(4, 4))
    critic.train()
    with pytest.warns(UserWarning, match=r"\(1\.0\)"):
        fused_gradient_penalty(critic, *fp32_vectors(4, 4))
    critic.eval()
    fused_gradient_penalty(critic, *fp32_vectors(4, 4))
    critic.train()
    fused_gradient_penalty(critic, *fp32_vectors(4, 4))


def test_there_is_one_warning_per_critic():
    batch = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_gradient_penalty(critic, *batch)  # in evaluation mode it is a fixed affine map
    critic.train()
    with pytest.warns(UserWarning, match=r"batch normalisation in training mode \(1\)") as caught:
        fused_gradient_penalty(critic, *batch)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_gradient_penalty(critic, *batch)


CALLS = {
    "fused": lambda critic: fused_gradient_penalty(critic, *fp32_vectors(4, 4)),
    "r1": lambda critic: r1_penalty(critic, fp32_vectors(4, 4)[0]),
    "r2": lambda critic: fused_gp.r2_penalty(critic, fp32_vectors(4, 4)[0]),
    "dragan": lambda critic: fused_gp.dragan_penalty(critic, fp32_vectors(4, 4)[0]),
    "GradientPenalty": lambda critic: GradientPenalty()(critic, *fp32_vectors(4, 4)),
    "GradientPenalty of DRAGAN": lambda critic: GradientPenalty(fused_gp.dragan_penalty)(critic, fp32_vectors(4, 4)[0]),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_warning_has_the_file_of_the_caller(call):
    with pytest.warns(UserWarning, match="batch normalisation") as caught:
        CALLS[call](nested_batch_norm())
    assert caught[0].filename == __file__
