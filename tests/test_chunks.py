"""chunk_size: the same penalty and gradient as in one go, whatever is done with them, and nothing kept on the way."""

import copy
import gc
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import fused_gp
from fused_gp import GradientPenalty, fused_gradient_penalty, r1_penalty, reference
from fused_gp.critics import autograd_graph as graph
from tests.test_methods import ONCE, TOGETHER, UNKNOWN, Conditional, MinibatchStd, conv, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(count=7, width=6):
    return torch.randn(count, width, dtype=torch.float64), torch.randn(count, width, dtype=torch.float64)


def gradients(penalty, inputs):
    return torch.autograd.grad(penalty, list(inputs), materialize_grads=True)


def assert_same(actual, expected):
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"reduction": "sum", "weight": 10.0}, {"one_sided": True, "target": 0.1}, {"target": 0.0}, {"eps": 0.0},
        {"grad_scale": 64.0}, {"grad_scale": torch.tensor(64.0)},
    ],
    ids=str,
)  # fmt: skip
def test_any_size_and_form(place, options, chunk_size):
    critic = mlp(nn.LeakyReLU).double().to(place.device)
    real, fake = (x.to(place.device) for x in batch())
    if isinstance(options.get("grad_scale"), torch.Tensor):
        options = options | {"grad_scale": options["grad_scale"].to(place.device)}

    def run(function, **more):
        torch.manual_seed(1)
        penalty, norms = function(critic, real, fake, return_norms=True, **options, **more)
        return penalty.detach(), norms, *gradients(3 * penalty, critic.parameters())

    ours = run(fused_gradient_penalty, chunk_size=chunk_size, backend=place.backend)
    assert_same(ours, run(reference.fused_gradient_penalty))


@pytest.mark.parametrize("name", ["r1_penalty", "r2_penalty", "dragan_penalty"])
def test_the_family(name):
    critic, (real, _) = mlp().double(), batch()

    def run(module, **options):
        torch.manual_seed(1)
        return gradients(getattr(module, name)(critic, real, **options), critic.parameters())

    assert_same(run(fused_gp, chunk_size=3), run(reference))


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_attached_samples_alpha_and_labels(chunk_size):
    """Cut, where the batch is in front, and whole, where it is not; each gets what autograd gives it."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 1)

        def forward(self, x, labels, *, shifts):
            return self.head(torch.tanh(self.body(x) + labels + shifts["a"] * shifts["b"][0]))

    critic, generator = Critic().double(), nn.Linear(3, 6).double()
    real, noise = batch()[0].requires_grad_(), batch(width=3)[0]
    table, shift = torch.randn(7, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    alpha = torch.rand(7, dtype=torch.float64, requires_grad=True)
    wanted = [*critic.parameters(), *generator.parameters(), real, table, shift, alpha]

    def run(function, **options):
        kwargs = {"shifts": {"a": 3 * shift, "b": [torch.ones(1).double(), "a word", None]}}
        penalty = function(
            critic, real, generator(noise), alpha=alpha, critic_args=(2 * table,), critic_kwargs=kwargs, **options
        )
        return gradients(penalty, wanted)

    ours = run(fused_gradient_penalty, chunk_size=chunk_size)
    assert_same(ours, run(reference.fused_gradient_penalty))
    assert sum(gradient.any().item() for gradient in ours) == len(ours) - 1  # all but the last bias


def test_groups_are_never_cut():
    critic = nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(1), mlp(width=12)).double()
    real, fake = batch(10)

    def run(function, **options):
        torch.manual_seed(1)
        return gradients(function(critic, real, fake, group_size=2, **options), critic.parameters())

    assert_same(run(fused_gradient_penalty, chunk_size=4), run(reference.fused_gradient_penalty))
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(ValueError, match=r"^chunk_size must be a multiple of group_size, got 3 for groups of 2$"),
        ):
            fused_gradient_penalty(critic, real, fake, group_size=2, chunk_size=3)


def test_labels_are_cut_with_the_samples():
    critic, (real, fake) = Conditional().double(), batch(5)
    options = {"alpha": 0.3, "critic_args": (torch.tensor([0, 2, 1, 2, 0]),), "critic_kwargs": {"strength": 0.5}}
    ours = fused_gradient_penalty(critic, real, fake, chunk_size=2, **options)
    truth = reference.fused_gradient_penalty(critic, real, fake, **options)
    assert_same(gradients(ours, critic.parameters()), gradients(truth, critic.parameters()))


def test_training_step_for_step():
    """Critic terms and penalty in one backward, accumulated over two batches, Adam: the same weights after."""
    results = []
    for chunk_size in (None, 2):
        torch.manual_seed(0)
        critic = mlp().double()
        optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
        for _ in range(3):
            for _ in range(2):
                real, fake = batch()
                loss = critic(fake).mean() - critic(real).mean()
                (loss + fused_gradient_penalty(critic, real, fake, weight=10, chunk_size=chunk_size)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(critic.parameters()))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("method", ["double_backward", "directional"])
def test_autocast_and_gradscaler(method):
    """bf16 autocast, a scaled loss, gradients in fp32: as in one go, to the rounding of bf16, which chunks move."""
    critic, (real, fake) = conv(), (torch.randn(6, 2, 8, 8), torch.randn(6, 2, 8, 8))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))

    def run(chunk_size):
        critic.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            penalty = fused_gradient_penalty(
                critic, real, fake, alpha=0.5, method=method, chunk_size=chunk_size, grad_scale=scaler
            )
        scaler.scale(penalty).backward()
        assert all(p.grad.dtype == torch.float32 for p in critic.parameters() if p.grad is not None)
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in critic.parameters()])

    one_go, ours = run(None), run(2)
    assert ((ours - one_go).norm() / one_go.norm()).item() < 2**-6
    assert ours.norm() > 100  # the scale is in it


def test_half_precision_weights_are_summed_in_fp32():
    """512 gradients of 1 + 2^-8 of a bf16 critic: added in bf16 they would stop growing at 256."""
    critic = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    critic.weight.data.fill_(1.0)
    ones = torch.ones(512, 1, dtype=torch.bfloat16)
    fused_gradient_penalty(critic, ones, ones, target=0.0, weight=0.5, reduction="sum", chunk_size=1).backward()
    assert critic.weight.grad.item() == 512.0


def test_a_change_between_call_and_backward_spoils_nothing():
    """The gradient is that of the weights and the random state of the call."""
    critic, (real, fake) = nn.Sequential(mlp(), nn.Dropout(0.5)).double(), batch()
    torch.manual_seed(1)
    truth = gradients(fused_gradient_penalty(critic, real, fake, chunk_size=2), critic.parameters())
    torch.manual_seed(1)
    penalty = fused_gradient_penalty(critic, real, fake, chunk_size=2)
    torch.manual_seed(9)
    with torch.no_grad():
        for p in critic.parameters():
            p += 1
    assert_same(gradients(penalty, critic.parameters()), truth)


def test_dropout_draws_chunk_by_chunk():
    critic, (real, fake), alpha = nn.Sequential(mlp(), nn.Dropout(0.5)).double(), batch(6), torch.rand(6).double()
    torch.manual_seed(1)
    parts = [
        reference.fused_gradient_penalty(critic, *(x[at : at + 2] for x in (real, fake)), alpha=alpha[at : at + 2])
        for at in (0, 2, 4)
    ]
    truth = gradients(sum(parts) / 3, critic.parameters())
    torch.manual_seed(1)
    ours = fused_gradient_penalty(critic, real, fake, alpha=alpha, chunk_size=2)
    assert_same(gradients(ours, critic.parameters()), truth)


@pytest.mark.parametrize("grad", [True, False])
def test_one_call_is_one_step_of_spectral_norm(grad):
    """Gradients and buffers are those of one run over the whole batch."""
    results = []
    for chunk_size in (None, 2):
        torch.manual_seed(0)
        critic = nn.Sequential(spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 1)).double()
        with torch.set_grad_enabled(grad):
            penalty = fused_gradient_penalty(critic, *batch(), chunk_size=chunk_size)
        found = gradients(penalty, critic.parameters()) if grad else ()
        results.append((penalty.detach(), *found, *critic.buffers()))
    assert_same(results[1], results[0])


def test_nothing_is_kept_but_one_gradient_per_parameter():
    """No graph behind the penalty; and when a chunk begins, what the critic made of the one before is gone."""

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = mlp(), None

        def forward(self, x):
            if armed:
                assert self.last is None or self.last() is None, "the chunk before is still alive"
            hidden = self.body[0](x)
            self.last = weakref.ref(hidden.untyped_storage())
            return self.body[2](self.body[1](hidden))

    critic, armed = Watched().double(), False
    fused_gradient_penalty(critic, *batch(), chunk_size=2)  # looks at the critic once
    critic.last, armed = None, True
    penalty = fused_gradient_penalty(critic, *batch(), chunk_size=2)
    names = {node.name() for node in graph.nodes([penalty])}
    assert names == {"PrecomputedGradientsBackward", "torch::autograd::AccumulateGrad"}
    saved = penalty.grad_fn.saved_tensors
    assert [g.shape for g in saved] == [p.shape for p in critic.parameters()]


def test_no_gradient_of_one_chunk_is_alive_in_the_next():
    """But the sum of them all."""
    shape, alive = (7, 13), []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x):
            gc.collect()
            alive.append(sum(type(o) in (torch.Tensor, nn.Parameter) and o.shape == shape for o in gc.get_objects()))
            return torch.tanh(x @ self.weight.T).sum(1)

    critic = Counting()
    real, fake = torch.randn(8, 13), torch.randn(8, 13)
    for _ in range(2):  # the first call looks at the critic as well
        alive.clear()
        fused_gradient_penalty(critic, real, fake, chunk_size=2)
    assert max(alive) == 2  # the weight, and its sum


def test_parameters_without_a_gradient_get_zeros():
    """DDP waits for all of them."""
    critic, (real, fake) = mlp().double(), batch()
    fused_gradient_penalty(critic, real, fake, chunk_size=2).backward()
    assert critic[2].bias.grad.equal(torch.zeros(1, dtype=torch.float64))


def test_frozen_parameters_are_left_alone():
    critic, (real, fake) = mlp().double(), batch()
    critic[0].requires_grad_(False)
    fused_gradient_penalty(critic, real, fake, chunk_size=2).backward()
    assert critic[0].weight.grad is None
    assert critic[2].weight.grad.any()
    critic.requires_grad_(False)
    assert not fused_gradient_penalty(critic, real, fake, chunk_size=2).requires_grad


def test_without_gradients_it_is_the_value_alone():
    critic, (real, fake) = mlp().double(), batch()
    truth, norms = fused_gradient_penalty(critic, real, fake, alpha=0.5, return_norms=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours, found = fused_gradient_penalty(critic, real, fake, alpha=0.5, chunk_size=3, return_norms=True)
            assert_same((ours, found), (truth.detach(), norms))
            assert not ours.requires_grad


def test_the_module():
    critic, real = mlp().double(), batch()[0]
    lazy = GradientPenalty(r1_penalty, every=2, chunk_size=2)
    lazy(critic, real).backward()
    truth = gradients(2 * reference.r1_penalty(critic, real), critic.parameters())
    assert_same([p.grad for p in critic.parameters()], truth)


def mean(x):
    return x.mean(1)


class Reaching(nn.Module):
    """Uses a weight that is not registered with it."""

    def __init__(self):
        super().__init__()
        self.body, self.hidden = nn.Linear(6, 5), [torch.ones(5, 1, requires_grad=True)]

    def forward(self, x):
        return torch.tanh(self.body(x)) @ self.hidden[0]


class Transposed(nn.Module):
    """Scores that do not lie sample by sample."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 2)

    def forward(self, x):
        return torch.tanh(self.body(x)).T


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 1)

    def forward(self, x):
        scores = torch.tanh(self.body(x)).flatten()
        return torch.cat((scores, scores[:1]))


REFUSED = {
    "minibatch statistics": (lambda: nn.Sequential(mlp(), MinibatchStd()), {}, TOGETHER),
    "transposed scores": (Transposed, {}, TOGETHER),
    "an odd number of scores": (
        Odd, {}, "critic must return as many scores for each sample with chunk_size, got (3,) for 2"
    ),
    "a hidden parameter": (
        Reaching, {},
        "critic must reach no parameters but its own with chunk_size, got one that reaches another, of shape (5, 1): "
        "make it a part of the critic, or hand it in critic_args",
    ),
    "a function": (lambda: mean, {}, UNKNOWN),
    "each sample's own": (
        mlp, {"reduction": "none"},
        "reduction must be 'mean' or 'sum' with chunk_size, which needs one number, got 'none'",
    ),
    "an input that is not used": (
        lambda: Constant(), {},
        "critic must return scores that depend on the samples it is given, got scores that do not: is there a detach() "
        "or no_grad() inside it?",
    ),
}  # fmt: skip


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.bias.expand(len(x))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, options, words = REFUSED[name]
    torch.manual_seed(0)
    critic = build()
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        fused_gradient_penalty(critic, torch.randn(5, 6), torch.randn(5, 6), chunk_size=2, **options)


def test_a_batch_of_one_proves_nothing():
    """A critic whose samples see one another is refused as soon as there are two."""
    critic = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), MinibatchStd(), mlp())
    fused_gradient_penalty(critic, torch.randn(1, 6), torch.randn(1, 6), chunk_size=2)
    with pytest.raises(ValueError, match=f"^{re.escape(TOGETHER)}$"):
        fused_gradient_penalty(critic, torch.randn(5, 6), torch.randn(5, 6), chunk_size=2)


def test_hooks_on_parameters_run_once():
    """On the whole gradient, in its backward, as without chunks."""
    results, seen = [], []
    for chunk_size in (None, 3):
        torch.manual_seed(0)
        critic, (real, fake) = mlp().double(), batch()
        for p in critic.parameters():
            p.register_hook(lambda gradient: seen.append(1) or gradient.clamp(-1e-3, 1e-3))
        penalty = fused_gradient_penalty(critic, real, fake, alpha=0.5, chunk_size=chunk_size)
        assert not seen
        (penalty * 100).backward()
        assert len(seen) == (3 if chunk_size is None else 4)  # the last bias has a gradient of zeros in chunks
        seen.clear()
        results.append([p.grad for p in critic.parameters()][:3])
    assert_same(results[1], results[0])


def test_a_last_layer_of_zeros_proves_nothing():
    """Nothing depends on anything yet; looked at again when it does."""
    critic = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), MinibatchStd(), mlp())
    nn.init.zeros_(critic[3][2].weight)
    fused_gradient_penalty(critic, torch.randn(5, 6), torch.randn(5, 6), chunk_size=2)
    nn.init.ones_(critic[3][2].weight)
    with pytest.raises(ValueError, match=f"^{re.escape(TOGETHER)}$"):
        fused_gradient_penalty(critic, torch.randn(5, 6), torch.randn(5, 6), chunk_size=2)


def test_evaluation_mode_proves_nothing_of_training():
    """Batch normalisation is harmless in the one and refused in the other."""
    critic = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).eval()
    fused_gradient_penalty(critic, torch.randn(5, 6), torch.randn(5, 6), chunk_size=2).backward()
    critic.train()
    with (
        pytest.warns(UserWarning, match="batch normalisation in training mode"),
        pytest.raises(ValueError, match=f"^{re.escape(TOGETHER)}$"),
    ):
        fused_gradient_penalty(critic, torch.randn(5, 6), torch.randn(5, 6), chunk_size=2)


def assert_exact(critic, real, fake, chunk_size=2, args=(), exact_args=()):
    ours = fused_gradient_penalty(critic, real, fake, alpha=0.3, critic_args=args, chunk_size=chunk_size)
    truth = reference.fused_gradient_penalty(critic, real, fake, alpha=0.3, critic_args=exact_args)
    assert_same(gradients(ours, critic.parameters()), gradients(truth, critic.parameters()))


def changes(critic):
    """Changes it, and says whether its samples see one another then."""
    critic.train()
    critic[1].eval()
    yield False  # frozen batch normalisation
    critic.train()
    yield True
    critic.eval()
    yield False
    critic[1].train()
    yield True
    critic[1] = nn.Tanh()
    yield False
    critic[1] = nn.Sequential(MinibatchStd(), nn.Linear(6, 5).double())
    yield True


@pytest.mark.filterwarnings("ignore:critic has batch normalisation")
def test_a_critic_that_is_changed_is_looked_at_again():
    critic = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()
    real, fake = batch()
    for together in changes(critic):
        if together:
            with pytest.raises(ValueError, match=f"^{re.escape(TOGETHER)}$"):
                fused_gradient_penalty(critic, real, fake, chunk_size=2)
        else:
            assert_exact(critic, real, fake)


def test_a_flag_among_the_arguments_may_make_it_another():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.separate, self.together = mlp(), nn.Sequential(MinibatchStd(), nn.Linear(7, 1))

        def forward(self, x, compare):
            return self.separate(x) + self.together(x) if compare else self.separate(x)

    critic = Flagged().double()
    fused_gradient_penalty(critic, *batch(), critic_args=(False,), chunk_size=2)
    with pytest.raises(ValueError, match=f"^{re.escape(TOGETHER)}$"):
        fused_gradient_penalty(critic, *batch(), critic_args=(True,), chunk_size=2)


def test_complex_parameters():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter, self.head = nn.Parameter(torch.randn(4, dtype=torch.cdouble)), nn.Linear(6, 1).double()

        def forward(self, x):
            return self.head(torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6)))

    assert_exact(Spectrum(), *batch())


def test_arrays_of_the_samples_must_be_tensors():
    """Every chunk would be given those of the first samples. In one chunk there is nothing to cut."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, weights):
            scores = self.net(x)
            return torch.stack([score * float(weight) for score, weight in zip(scores, weights, strict=False)])

    critic, (real, fake), weights = Weighted().double(), batch(4), np.array([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="in tensors with chunk_size, which cuts them, got a NumPy array of 4"):
        fused_gradient_penalty(critic, real, fake, critic_args=(weights,), chunk_size=2)
    for given, chunk_size in ((weights, 4), (torch.tensor(weights), 2)):
        assert_exact(critic, real, fake, chunk_size, args=(given,), exact_args=(weights,))


def test_looking_leaves_no_trace():
    """The look at a new critic draws no numbers, steps no buffers and writes no gradient."""
    critic = nn.Sequential(spectral_norm(nn.Linear(6, 5)), nn.Dropout(0.5), nn.Linear(5, 1)).double()
    known = copy.deepcopy(critic)
    real, fake = batch()
    state = [buffer.clone() for buffer in known.buffers()]
    fused_gradient_penalty(known, real, fake, chunk_size=2)  # known now
    for buffer, before in zip(known.buffers(), state, strict=True):
        buffer.copy_(before)
    results = []
    for each in (known, critic):
        torch.manual_seed(1)
        penalty = fused_gradient_penalty(each, real, fake, chunk_size=2)
        results.append((*gradients(penalty, each.parameters()), *each.buffers(), torch.rand(3)))
        assert all(p.grad is None for p in each.parameters())
    assert_same(results[1], results[0])


@pytest.mark.compiles
def test_no_graph_is_kept_for_a_second_backward():
    """A compiled critic gives its buffers away in its backward, and raises where somebody wants to come back."""
    critic, (real, fake) = mlp().double(), batch()
    torch._dynamo.reset()
    given = torch.compile(critic, backend="aot_eager", dynamic=True)
    ours = fused_gradient_penalty(given, real, fake, alpha=0.5, method="directional", chunk_size=2)
    truth = gradients(reference.fused_gradient_penalty(critic, real, fake, alpha=0.5), critic.parameters())
    for actual, expected in zip(gradients(ours, critic.parameters()), truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def test_double_backward_is_looked_at_in_chunks_too():
    once = (
        "the autograd Function Once, whose backward is once_differentiable",
        "method='directional' where the critic is smooth",
    )

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, upstream):
            return upstream

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return Once.apply(self.body(x))

    with pytest.raises(ValueError, match=f"^{re.escape(ONCE.format(*once))}$"):
        fused_gradient_penalty(Critic().double(), *batch(), chunk_size=2)
