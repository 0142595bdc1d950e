"""No op and no penalty synchronises with the device."""

import pytest
import torch

from fused_gp import fused_gradient_penalty, r1_penalty
from tests.support.compiling import COMPILES
from tests.support.critics import mlp
from tests.support.gradients import value_and_gradients
from tests.support.kernels.on_device import DEVICE_SHAPES, all_orders, assert_equal_bits, device_inputs
from tests.support.places import to_device
from tests.support.samples import vectors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]


@pytest.fixture
def no_synchronisation():
    """After it is called, an operation that synchronises with the device raises an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_a_synchronisation_is_detected(no_synchronisation):
    no_synchronisation()
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
def test_ops_do_not_synchronise(shape, no_synchronisation):
    inputs = device_inputs(shape)
    expected = all_orders(*inputs)  # the first call loads the kernels
    no_synchronisation()
    results = [all_orders(*inputs) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("default")
    for each in results:
        assert_equal_bits(each, expected)


OPTIONS = {
    "plain": {},
    "a number for alpha": {"alpha": 0.3},
    "one-sided, none": {"one_sided": True, "reduction": "none"},
    "a scale": {"grad_scale": 8.0},
    "chunks": {"chunk_size": 2},
}


@pytest.mark.parametrize("way", [*OPTIONS, "a scale on the device"])
@pytest.mark.parametrize("name", ["fused_gradient_penalty", "r1_penalty"])
def test_penalties_do_not_synchronise(name, way, no_synchronisation):
    """The whole call and its backward, once the critic has been examined."""
    options = OPTIONS.get(way, {"grad_scale": torch.full((), 8.0, device="cuda")})
    if name == "r1_penalty":
        options = {k: v for k, v in options.items() if k not in ("alpha", "one_sided")}
    critic, (real, fake) = mlp().double().to("cuda"), to_device(vectors(6), "cuda")

    def step():
        if name == "r1_penalty":
            return value_and_gradients(r1_penalty(critic, real, **options), *critic.parameters())
        return value_and_gradients(fused_gradient_penalty(critic, real, fake, **options), *critic.parameters())

    for _ in range(2):
        step()
    no_synchronisation()
    step()


@pytest.mark.parametrize(
    "options", [pytest.param(each, marks=COMPILES, id=str(each)) for each in ({}, {"grad_scale": 8.0})]
)
def test_compiled_penalties_do_not_synchronise(options, no_synchronisation):
    critic, samples = mlp().double().to("cuda"), to_device(vectors(6), "cuda")
    for index in range(4):
        if index == 3:
            no_synchronisation()
        penalty = fused_gradient_penalty(critic, *samples, method="compiled", **options)
        value_and_gradients(penalty, *critic.parameters())
