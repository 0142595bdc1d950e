"""Whole penalties captured in CUDA graphs, and replayed."""

import pytest
import torch

from fused_gp import fused_gradient_penalty, reference
from tests.support.compiling import COMPILES
from tests.support.critics import mlp
from tests.support.gradients import value_and_gradients
from tests.support.kernels.on_device import captured
from tests.support.samples import vectors
from tests.support.tolerances import assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread"), *COMPILES]


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 2}, {"method": "compiled"}, {"grad_scale": 8.0, "target": 0.0}], ids=str
)
def test_a_captured_penalty_step_gives_the_gradients_of_its_samples(options):
    """Replayed on other samples."""
    critic = mlp().double().cuda()
    real, fake, alpha = [*(x.cuda() for x in vectors(6)), torch.rand(6, dtype=torch.float64, device="cuda")]

    def penalty_and_gradients(real, fake, alpha):
        penalty, norms = fused_gradient_penalty(critic, real, fake, alpha=alpha, return_norms=True, **options)
        return norms, *value_and_gradients(penalty, *critic.parameters())

    graph, outputs = captured(penalty_and_gradients, real, fake, alpha)
    for _ in range(3):
        for tensor in (real, fake):
            tensor.normal_()
        alpha.uniform_()
        graph.replay()
        same_penalty = {k: v for k, v in options.items() if k in ("grad_scale", "target")}
        penalty, norms = reference.fused_gradient_penalty(
            critic, real, fake, alpha=alpha, return_norms=True, **same_penalty
        )
        assert_same(outputs, (norms, *value_and_gradients(penalty, *critic.parameters())))


def test_a_captured_penalty_draws_alpha_at_each_replay():
    critic, samples = mlp().double().cuda(), [x.cuda() for x in vectors()]
    graph, penalty = captured(lambda real, fake: fused_gradient_penalty(critic, real, fake).detach(), *samples)
    values = set()
    for _ in range(5):
        graph.replay()
        values.add(penalty.item())
    assert len(values) == 5


def test_a_capture_refuses_directional():
    critic, samples = mlp().double().cuda(), [x.cuda() for x in vectors()]
    with pytest.raises(ValueError, match="a CUDA graph cannot capture critics that run again"):
        captured(lambda *xs: fused_gradient_penalty(critic, *xs, method="directional"), *samples)


@pytest.mark.alone
def test_penalty_compiled_with_reduce_overhead():
    """torch.compile's own CUDA graphs."""
    critic = mlp().double().cuda()
    compiled = torch.compile(fused_gradient_penalty, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        samples, alpha = [x.cuda() for x in vectors()], torch.rand(5, dtype=torch.float64, device="cuda")
        ours = [t.clone() for t in value_and_gradients(compiled(critic, *samples, alpha=alpha), *critic.parameters())]
        expected = reference.fused_gradient_penalty(critic, *samples, alpha=alpha)
        assert_same(ours, value_and_gradients(expected, *critic.parameters()))
