"""method="directional": how near the gradient comes, what it costs in orders, where it is refused."""

import copy
import functools
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._pytree import tree_map

import fused_gp
from fused_gp import GradientPenalty, fused_gradient_penalty, kernels, r1_penalty, reference
from fused_gp.critics import autograd_graph as graph
from fused_gp.methods import directional
from fused_gp.methods.directional import SPACING
from fused_gp.ops import torch_ops
from tests.support.places import PLACES
from tests.test_methods import Checkpointed, MinibatchStd, ViT, conv, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def gradient(penalty, critic):
    grads = torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads]).double()


def off(actual, truth):
    return ((actual - truth).norm() / truth.norm()).item()


def images(count=8, dtype=torch.float32):
    return torch.randn(count, 2, 8, 8, dtype=dtype), torch.randn(count, 2, 8, 8, dtype=dtype)


def samples(count=8, width=6, dtype=torch.float32):
    return torch.randn(count, width, dtype=dtype), torch.randn(count, width, dtype=dtype)


SMOOTH = {"conv": conv, "ViT": ViT}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("critic", SMOOTH)
def test_near_fp64_truth(critic, chunk_size, autocast):
    """5e-5 in fp32. Under bf16 autocast no more than five times what double backward itself is off."""
    critic = SMOOTH[critic]()
    real, fake = images()
    alpha = torch.rand(8)
    exact = copy.deepcopy(critic).double()
    with sdpa_kernel(SDPBackend.MATH):
        truth = gradient(
            reference.fused_gradient_penalty(exact, real.double(), fake.double(), alpha=alpha.double()), exact
        )

    def error(**options):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            penalty = fused_gradient_penalty(critic, real, fake, alpha=alpha, **options)
        return off(gradient(penalty, critic), truth)

    ours = error(method="directional", chunk_size=chunk_size)
    if autocast is None:
        assert ours <= 5e-5
    else:
        with sdpa_kernel(SDPBackend.MATH):
            theirs = error()
        assert theirs > 1e-4, "autocast is off"
        assert ours <= 5 * theirs


FAMILY = {
    "two-sided": ("fused_gradient_penalty", {}),
    "one-sided": ("fused_gradient_penalty", {"one_sided": True, "target": 0.5}),
    "zero-centred": ("fused_gradient_penalty", {"target": 0.0}),
    "target 3, weight 10, sum": ("fused_gradient_penalty", {"target": 3.0, "weight": 10.0, "reduction": "sum"}),
    "eps 0": ("fused_gradient_penalty", {"eps": 0.0}),
    "eps 1": ("fused_gradient_penalty", {"eps": 1.0}),
    "groups": ("fused_gradient_penalty", {"group_size": 2}),
    "each sample": ("fused_gradient_penalty", {"reduction": "none"}),
    "scaled by a number": ("fused_gradient_penalty", {"grad_scale": 1024.0}),
    "scaled by a tensor": ("fused_gradient_penalty", {"grad_scale": torch.tensor(4096.0)}),
    "R1": ("r1_penalty", {"weight": 5.0}),
    "R2": ("r2_penalty", {"weight": 5.0}),
    "DRAGAN": ("dragan_penalty", {}),
}


# Chunks add up to one number, and refuse one for each sample: tests/test_chunks.py.
@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [(name, size) for name in FAMILY for size in (None, 2) if (name, size) != ("each sample", 2)],
)
def test_the_whole_family(place, name, chunk_size):
    """In fp64 the difference is off by some 1e-10. Several inputs, one of them channels_last; upstream of three."""
    function, options = FAMILY[name]
    options = tree_map(lambda value: value.to(place.device) if isinstance(value, torch.Tensor) else value, options)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.row = conv(), mlp()

        def forward(self, x):
            image, row = x
            return 9 * self.image(image).mean((1, 2, 3)) + 5 * self.row(row).squeeze(1).tanh()

    critic = Critic().double().to(place.device)
    batches = [
        tree_map(
            lambda x: x.to(place.device),
            (x.to(memory_format=torch.channels_last), y),
        )
        for x, y in zip(images(4, torch.float64), samples(4, dtype=torch.float64), strict=True)
    ]
    batches = batches if function == "fused_gradient_penalty" else batches[:1]

    def run(module, **more):
        torch.manual_seed(5)
        penalty, norms = getattr(module, function)(critic, *batches, return_norms=True, **options, **more)
        upstream = torch.linspace(1, 3, penalty.numel(), dtype=torch.float64, device=place.device)
        return penalty, norms, gradient((penalty * upstream.reshape(penalty.shape)).sum(), critic).cpu()

    value, norms, truth = run(reference)
    penalty, ours_norms, ours = run(fused_gp, method="directional", chunk_size=chunk_size, backend=place.backend)
    torch.testing.assert_close(penalty, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours_norms, norms, rtol=1e-12, atol=0)
    assert 0 < off(ours, truth) <= 1e-8


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradients_reach_attached_samples_and_labels(place, chunk_size):
    """As autograd's: into the generator, through both batches, alpha, and what else the critic was given."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 1)

        def forward(self, x, labels, shift):
            return self.head(torch.tanh(self.body(x) + labels + shift))

    critic = Critic().double().to(place.device)
    generator = nn.Linear(3, 6).double().to(place.device)
    real, noise = samples(8, 6, torch.float64)[0].to(place.device), samples(8, 3, torch.float64)[0].to(place.device)
    real.requires_grad_()
    table = torch.randn(8, 5, dtype=torch.float64, device=place.device, requires_grad=True)
    shift = torch.randn(5, dtype=torch.float64, device=place.device, requires_grad=True)
    alpha = torch.rand(8, dtype=torch.float64, device=place.device, requires_grad=True)

    def run(function, **options):
        penalty = function(
            critic, real, generator(noise), alpha=alpha, critic_args=(2 * table, 3 * shift), **options
        )  # fmt: skip
        wanted = [*critic.parameters(), *generator.parameters(), real, alpha, table, shift]
        return torch.autograd.grad(penalty, wanted, materialize_grads=True)

    truth = run(reference.fused_gradient_penalty)
    ours = run(fused_gradient_penalty, method="directional", chunk_size=chunk_size, backend=place.backend)
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    assert sum(grad.any().item() for grad in ours) == len(ours) - 1  # all but the last bias


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "lambda"])
def test_every_run_sees_the_same_state(wrapped):
    """Dropout's masks and spectral norm's vectors are those of the first run, behind a lambda too; one call leaves the
    buffers and the random state of one run."""

    def build():
        torch.manual_seed(2)
        return nn.Sequential(spectral_norm(nn.Linear(6, 40)), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 1)).double()

    real, fake = samples(dtype=torch.float64)
    results = []
    for function, options in (
        (reference.fused_gradient_penalty, {}),
        (fused_gradient_penalty, {"method": "directional"}),
    ):
        critic = build()
        owners = [critic[0].parametrizations.weight[0]]
        held = [owner._u for owner in owners]
        torch.manual_seed(3)
        penalty = function((lambda x, net=critic: net(x)) if wrapped else critic, real, fake, **options)
        assert [owner._u for owner in owners] == held, "other buffers than before"
        results.append((gradient(penalty, critic), torch.rand(3), *critic.buffers()))
    (truth, *states), (ours, *ours_states) = results
    assert off(ours, truth) <= 1e-8
    for actual, expected in zip(ours_states, states, strict=True):
        torch.testing.assert_close(actual, expected)


def test_spectral_norm_under_a_checkpoint():
    """Right in chunks, whose backward is inside the call; elsewhere it would run again from other buffers: refused."""
    real, fake = samples(dtype=torch.float64)

    def build():
        torch.manual_seed(2)
        return nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 1)).double()

    plain, critic = build(), build()
    truth = gradient(reference.fused_gradient_penalty(plain, real, fake, alpha=0.5), plain)
    given = Checkpointed(critic, use_reentrant=False)
    options = {"alpha": 0.5, "method": "directional"}
    assert off(gradient(fused_gradient_penalty(given, real, fake, chunk_size=8, **options), critic), truth) <= 1e-8
    for actual, expected in zip(critic.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="and found _SpectralNorm, which has some, under checkpointing"):
        fused_gradient_penalty(given, real, fake, **options)
    fused_gradient_penalty(given.eval(), real, fake, **options).backward()
    assert not any(part._forward_pre_hooks for part in given.modules())


def test_first_order_passes_only():
    """Not a node of the graph of a gradient: what FSDP, flash attention and fused kernels need."""
    critic, runs = mlp(), []

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            runs.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            runs.append("backward")
            assert not torch.is_grad_enabled()
            return upstream

    penalty = fused_gradient_penalty(lambda x: Once.apply(critic(x)), *samples(), method="directional")
    assert runs[:2] == ["forward", "backward"]
    assert set(runs[2:]) == {"forward"}  # the trial, and the two ends
    runs.clear()
    penalty.backward()
    assert runs == ["backward", "backward"]
    assert critic[0].weight.grad.any()


@pytest.mark.parametrize(
    "options", [{"method": "directional"}, {"chunk_size": 2}, {"method": "directional", "chunk_size": 2}]
)
def test_a_second_derivative_is_refused(options):
    """Instead of being silently wrong."""
    critic = mlp()
    penalty = fused_gradient_penalty(critic, *samples(), **options)
    name = "chunk_size" if "chunk_size" in options else "method='directional'"
    words = (
        f"{name} gives the penalty's first derivative alone, and this backward is one with create_graph=True: use "
        "method='double_backward', without chunk_size"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(words)}$"):
        torch.autograd.grad(penalty, critic[0].weight, create_graph=True)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_its_own_estimate(chunk_size):
    """The measured derivative of the scores against the norms': near 0 at a good step, large at a bad one."""
    critic, batch, alpha = conv(nn.GroupNorm(2, 4)), images(), torch.rand(8)

    def error(step=None):
        *_, found = fused_gradient_penalty(
            critic, *batch, alpha=alpha, method="directional", step=step, chunk_size=chunk_size, return_error=True
        )
        assert not found.requires_grad
        assert found.shape == ()
        return found.item()

    assert 0 < error() < 1e-4
    assert error(1.0) > 1e-2  # truncation
    assert error(1e-7) > 1e-3  # rounding
    _, norms, found = fused_gradient_penalty(
        critic, *batch, alpha=alpha, return_norms=True, return_error=True, chunk_size=chunk_size
    )
    assert found.item() == 0  # exact
    assert norms.shape == (8,)
    assert r1_penalty(critic, batch[0], method="directional", return_error=True)[1] < 1e-4
    for options in ({"eps": 1.0}, {"grad_scale": 64.0}, {"group_size": 2}, {"target": 0.0}, {"one_sided": True}):
        options = options | {"method": "directional", "chunk_size": chunk_size, "return_error": True, "weight": 10.0}
        assert fused_gradient_penalty(critic, *batch, **options)[1] < 1e-4


@pytest.mark.parametrize("critic", ["flat", "steep", "curved"])
def test_the_step_found_by_trial_is_near_the_best(critic):
    """Critics whose best steps are far apart, which no one fraction serves."""
    critic = {
        "flat": lambda: mlp(nn.Tanh),
        "steep": lambda: enlarged(mlp(nn.Tanh), 30.0),
        "curved": lambda: conv(nn.GroupNorm(2, 4)),
    }[critic]()
    batch = images() if isinstance(critic[0], nn.Conv2d) else samples()
    alpha = torch.rand(8)
    exact = copy.deepcopy(critic).double()
    double = [x.double() for x in batch]
    truth = gradient(reference.fused_gradient_penalty(exact, *double, alpha=alpha.double()), exact)

    def error(step=None):
        penalty = fused_gradient_penalty(critic, *batch, alpha=alpha, method="directional", step=step)
        return off(gradient(penalty, critic), truth)

    sweep = [error(SPACING[torch.float32] ** (1 / 3) * 2.0**power) for power in range(-9, 4)]
    assert error() <= 3 * min(sweep)
    assert sweep[0] > 10 * min(sweep) < sweep[-1]


def enlarged(critic, factor):
    with torch.no_grad():
        critic[0].weight *= factor
    return critic


@pytest.mark.parametrize(
    ("quotients", "chosen"),
    [
        ((9.0, 5.0, 3.0, 2.1, 2.0, 2.05, 2.5, 4.0), 4),
        ((9.0, 4.0, 2.0, 1.0, 1.1, 5.0, 5.0, 9.0), 3),  # two that agree by luck, far from their neighbours
        ((math.inf, math.nan, 3.0, 2.1, 2.0, 2.05, 2.5, 4.0), 4),
        ((math.nan,) * 8, None),
    ],
)
def test_which_step_the_trial_takes(quotients, chosen):
    """The middle one of three steps whose quotients agree best."""
    steps = dict(zip(directional.STEP_LADDER, quotients, strict=True))

    class Stencil:
        def ends(self, column, attached):
            assert not attached
            return column.item(), -column.item()

    class Question:
        def scores(self, end):
            return torch.tensor([end * steps[abs(end)]])

    found = directional._best_step(Question(), Stencil(), torch.ones(()), spacing=1.0)
    assert math.isnan(found) if chosen is None else found == directional.STEP_LADDER[chosen]


def test_the_trial_is_made_again_when_the_critic_has_changed(monkeypatch):
    """At the first call and every TRIAL_EVERY-th, of 16 runs without a graph; not of points that are not finite."""
    monkeypatch.setattr(directional, "TRIAL_EVERY", 3)
    runs = []
    net = mlp()
    net.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    trial = 2 * len(directional.STEP_LADDER)

    def call(scale=1.0):
        runs.clear()
        real, fake = samples()
        fused_gradient_penalty(net, real * scale, fake, method="directional")
        return len(runs) - 3, runs.count(False)

    assert call(math.inf) == (trial, trial)
    assert [call() for _ in range(7)] == [(trial, trial), (0, 0), (0, 0)] * 2 + [(trial, trial)]


class InBf16(nn.Module):
    """Computes in bf16, though what goes in and comes out is fp32."""

    def __init__(self):
        super().__init__()
        self.net = conv().bfloat16()

    def forward(self, x):
        return self.net(x.bfloat16()).float()


class InFp32(nn.Module):
    """Computes in fp32, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.net = conv()

    def forward(self, x):
        return self.net(x.float())


def test_the_step_follows_the_type_that_the_critic_computes_in(monkeypatch):
    """Seen in the graph where it is not the type of the points; autocast may come and go."""
    steps = []
    original = torch_ops.perturb

    def noting(points, gradients, column):
        lengths = (gradients.double() * column).norm(dim=1)
        steps.append((lengths.max() / points.double().norm(dim=1).mean()).item())
        return original(points, gradients, column)

    monkeypatch.setattr(torch_ops, "perturb", noting)

    def step(critic, dtype=torch.float32, autocast=None, **options):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            fused_gradient_penalty(critic, *images(dtype=dtype), method="directional", **options)
        return steps.pop()

    plain = conv()
    monkeypatch.setattr(directional, "STEP_LADDER", [0.3, 0.3, 0.3])  # the trial has one choice
    default = {dtype: pytest.approx(0.3 * spacing ** (1 / 3), rel=0.05) for dtype, spacing in SPACING.items()}
    assert step(plain) == default[torch.float32]
    assert step(plain, autocast=torch.bfloat16) == default[torch.bfloat16]
    assert step(plain) == default[torch.float32]
    assert step(conv().double(), torch.float64) == default[torch.float64]
    assert step(conv().bfloat16(), torch.bfloat16) == default[torch.bfloat16]
    assert step(InBf16()) == default[torch.bfloat16]
    assert step(InFp32(), torch.bfloat16) == default[torch.bfloat16]  # the points themselves are rounded
    assert step(plain, step=0.01) == pytest.approx(0.01, rel=0.01)


KINKED = {
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

ROUNDED = [nn.SiLU(), nn.GELU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.ELU(), nn.CELU(2.0),
           nn.LogSigmoid(), nn.Softmax(1), nn.GLU(1), nn.LayerNorm(6)]  # fmt: skip


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.before, self.after = nn.Linear(6, 6), nn.LazyLinear(1)

    def forward(self, x):
        return self.after(self.function(self.before(x)))


@pytest.mark.parametrize("name", KINKED)
def test_kinks_are_refused_by_name(name):
    """In the words that name the operation; allow_kinks insists, and the next call without it is refused again."""
    function, named = KINKED[name]
    critic = Apply(function)
    critic(samples()[0])
    words = (
        f"method='directional' needs a smooth critic, and found {named}: a difference across its kink is off by half "
        "at any step. Use method='double_backward', or a smooth activation such as SiLU; allow_kinks=True insists."
    )
    for _ in range(2):
        fused_gradient_penalty(critic, *samples(), method="directional", allow_kinks=True).backward()
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            fused_gradient_penalty(critic, *samples(), method="directional")


@pytest.mark.parametrize("layer", ROUNDED, ids=lambda layer: type(layer).__name__)
def test_smooth_layers_are_not(layer):
    critic = Apply(layer)
    critic(samples()[0])
    fused_gradient_penalty(critic, *samples(), method="directional").backward()


class Image(torch.Tensor):
    pass


def test_kinks_are_seen_in_samples_of_a_class_of_their_own():
    critic, (real, fake) = Apply(nn.ReLU()), samples()
    critic(real)
    with pytest.raises(ValueError, match="needs a smooth critic, and found Relu"):
        fused_gradient_penalty(critic, real.as_subclass(Image), fake.as_subclass(Image), method="directional")


def test_scattered_means_are_smooth():
    critic = Apply(lambda x: torch.zeros(len(x), 1).scatter_reduce(1, torch.zeros(x.shape, dtype=torch.long), x, "sum"))
    critic(samples()[0])
    fused_gradient_penalty(critic, *samples(), method="directional").backward()


def test_a_difference_across_kinks_is_what_it_is_refused_for():
    """Off by a large part at every step: the reason to refuse, and that allow_kinks has no hidden cure."""
    layers = [nn.Linear(6, 512), nn.LeakyReLU(0.2), nn.Linear(512, 512), nn.LeakyReLU(0.2), nn.Linear(512, 1)]
    critic, (real, fake), alpha = nn.Sequential(*layers), samples(64), torch.rand(64)
    truth = gradient(reference.fused_gradient_penalty(critic, real, fake, alpha=alpha), critic)
    for step in (None, 0.1, 1e-2, 1e-4):
        penalty = fused_gradient_penalty(
            critic, real, fake, alpha=alpha, method="directional", step=step, allow_kinks=True
        )
        assert off(gradient(penalty, critic), truth) > 0.1


def test_a_kink_that_the_samples_do_not_pass_is_none():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.embed, self.head = nn.Linear(6, 5), nn.Linear(3, 5), nn.Linear(5, 1)

        def forward(self, x, labels):
            return self.head(torch.tanh(self.body(x)) + torch.relu(self.embed(labels)))

    labels = torch.rand(8, 3)
    fused_gradient_penalty(Labelled(), *samples(), critic_args=(labels,), method="directional").backward()


@pytest.mark.parametrize("method", ["double_backward", "directional", "auto"])
def test_the_graph_is_looked_at_once_per_critic(monkeypatch, method):
    looks = []
    original = graph.nodes
    monkeypatch.setattr(graph, "nodes", lambda outputs: looks.append(1) or original(outputs))
    critic = mlp()
    fused_gradient_penalty(critic, *samples(), method=method)
    assert looks
    looks.clear()
    for _ in range(3):
        fused_gradient_penalty(critic, *samples(), method=method)
        fused_gradient_penalty(lambda x: critic(x), *samples(), method="double_backward")
    assert len(looks) <= 2  # the lambda is a critic of its own, once
    critic.train(False)  # where other operations may run
    fused_gradient_penalty(critic, *samples(), method=method)
    looks.clear()
    fused_gradient_penalty(critic, *samples(), method=method)
    assert not looks


class Switched(nn.Module):
    """Smooth in evaluation, or unless it is told otherwise."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x, activation="silu"):
        x = self.before(x)
        return self.after(torch.relu(x) if self.training or activation == "relu" else nn.functional.silu(x))


def swap(critic):
    critic[1] = nn.ReLU()


def test_a_critic_that_changes_is_looked_at_again():
    """Layers swapped, training and evaluation, a word among its arguments, another function behind a partial."""
    critic = mlp()
    fused_gradient_penalty(critic, *samples(), method="directional")
    swap(critic)
    with pytest.raises(ValueError, match="found Relu"):
        fused_gradient_penalty(critic, *samples(), method="directional")

    critic = Switched().eval()
    fused_gradient_penalty(critic, *samples(), method="directional")
    with pytest.raises(ValueError, match="found Relu"):
        fused_gradient_penalty(critic, *samples(), method="directional", critic_kwargs={"activation": "relu"})
    with pytest.raises(ValueError, match="found Relu"):
        fused_gradient_penalty(critic.train(), *samples(), method="directional")

    net = nn.Linear(6, 1)

    def activated(x, activation):
        return activation(net(x))

    fused_gradient_penalty(functools.partial(activated, activation=torch.tanh), *samples(), method="directional")
    with pytest.raises(ValueError, match="found Relu"):
        fused_gradient_penalty(functools.partial(activated, activation=torch.relu), *samples(), method="directional")


def growing(critic, share, data):
    return lambda x: critic(x) * (1 + share) + data[0]


def test_numbers_behind_a_lambda_may_change(monkeypatch):
    """The alpha of a growing critic, say: no new critic at each step, with a trial for each."""
    looks = []
    original = graph.nodes
    monkeypatch.setattr(graph, "nodes", lambda outputs: looks.append(1) or original(outputs))
    critic, data = mlp(), list(range(1000))
    for step in range(4):
        fused_gradient_penalty(growing(critic, step / 10, data), *samples(), method="directional")
        if step == 0:
            looks.clear()
    assert not looks


@pytest.mark.parametrize("first", ["lambda", "module"])
def test_a_module_and_a_lambda_over_it(first):
    critic = mlp()
    calls = [lambda x: critic(x), critic]
    for each in calls if first == "lambda" else calls[::-1]:
        fused_gradient_penalty(each, *samples(), method="directional").backward()
        with torch.no_grad():
            fused_gradient_penalty(each, *samples())


def test_another_type_has_another_step():
    """A critic in fp64, then in fp32."""
    critic, alpha = conv().double(), torch.rand(8)
    fused_gradient_penalty(critic, *images(dtype=torch.float64), method="directional")
    critic, batch = critic.float(), images()
    truth = gradient(reference.fused_gradient_penalty(critic, *batch, alpha=alpha), critic)
    ours = gradient(fused_gradient_penalty(critic, *batch, alpha=alpha, method="directional"), critic)
    assert off(ours, truth) <= 5e-5


def test_critics_in_containers_are_found():
    """Their buffers are kept, as those of a critic that is named outright."""

    class Nets:
        pass

    def helper(x):
        return models["D"](x)

    real, fake = samples(dtype=torch.float64)
    for behind in (
        lambda models, nets: lambda x: models["D"](x), lambda models, nets: lambda x: helper(x),
        lambda models, nets: lambda x: nets.inner.D(x),
        lambda models, nets: lambda x: sum(nets.inner.D(y) for y in (x,)),
        lambda models, nets: lambda x: sum(d(x) for d in models["all"]),
    ):  # fmt: skip
        results = []
        for function, options in (
            (reference.fused_gradient_penalty, {}), (fused_gradient_penalty, {"method": "directional"})
        ):  # fmt: skip
            torch.manual_seed(2)
            critic = nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 1)).double()
            models, nets = {"D": critic, "G": mlp(), "all": [critic]}, Nets()
            nets.inner, nets.inner.D = Nets(), critic
            penalty = function(behind(models, nets), real, fake, alpha=0.5, **options)
            results.append((gradient(penalty, critic), *critic.buffers()))
        assert off(results[1][0], results[0][0]) <= 1e-8
        for actual, expected in zip(results[1][1:], results[0][1:], strict=True):
            torch.testing.assert_close(actual, expected)


def test_all_samples_on_the_target(place):
    """No direction, and no gradient: zero, not NaN."""
    weight = torch.tensor([0.6, 0.8], dtype=torch.float64, device=place.device, requires_grad=True)
    real, fake = (torch.randn(3, 2, dtype=torch.float64, device=place.device) for _ in range(2))
    for options in ({"eps": 0.0}, {"eps": 0.0, "one_sided": True, "target": 2.0}):
        penalty = fused_gradient_penalty(
            lambda x: x @ weight, real, fake, method="directional", backend=place.backend, **options
        )
        (grad,) = torch.autograd.grad(penalty, weight)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-9)


def test_zero_rows_leave_their_neighbours_alone(place):
    """A sample without a gradient, with eps = 0, beside one that has one."""
    critic = mlp().double().to(place.device)
    real, fake = (x.to(place.device) for x in samples(4, dtype=torch.float64))
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64, device=place.device)[:, None]

    def run(function, **options):
        penalty = function(lambda x: critic(x) * mask, real, fake, alpha=0.5, eps=0.0, **options)
        return gradient(penalty, critic)

    ours = run(fused_gradient_penalty, method="directional", backend=place.backend)
    assert 0 < off(ours, run(reference.fused_gradient_penalty)) <= 1e-8


def test_samples_at_the_origin():
    """Where all points are zero there is no norm to take a fraction of: the step is absolute."""
    critic, zeros = mlp().double(), torch.zeros(4, 6, dtype=torch.float64)
    ours = gradient(fused_gradient_penalty(critic, zeros, zeros, method="directional"), critic)
    assert off(ours, gradient(reference.fused_gradient_penalty(critic, zeros, zeros), critic)) <= 1e-8


def test_nan_shows():
    real, fake = samples()
    real[2, 3] = math.nan
    penalty, norms = fused_gradient_penalty(mlp(), real, fake, method="directional", return_norms=True)
    assert penalty.isnan()
    assert norms.isnan().tolist() == [index == 2 for index in range(8)]


def test_frozen_critic_has_no_gradient_and_its_samples_do():
    critic = mlp().requires_grad_(False)
    real, fake = samples()
    assert not fused_gradient_penalty(critic, real, fake, method="directional").requires_grad
    fake.requires_grad_()
    penalty = fused_gradient_penalty(critic, real, fake, method="directional")
    assert torch.autograd.grad(penalty, fake)[0].any()


def test_nothing_of_the_callers_is_written():
    critic, (real, fake) = mlp(), samples()
    fake.requires_grad_()
    before = [p.clone() for p in critic.parameters()]
    for chunk_size in (None, 3):
        fused_gradient_penalty(critic, real, fake, method="directional", chunk_size=chunk_size)
        assert all(p.grad is None and p.equal(was) for p, was in zip(critic.parameters(), before, strict=True))
        assert fake.grad is None
        assert not real.requires_grad


def test_scores_of_a_shape_that_says_nothing_of_samples():
    """For reduction='none' each sample needs its own difference."""
    real, fake = samples(4)
    critic = nn.Sequential(mlp(), nn.Flatten(0), nn.Unflatten(0, (1, 4)))
    critic = Widened(critic)
    words = (
        "critic must judge each sample by itself, with the samples in front, for reduction='none' with "
        "method='directional', got scores of shape (5,) for 4 of them that do not"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        fused_gradient_penalty(critic, real, fake, method="directional", reduction="none")


class Transposed(nn.Module):
    def forward(self, x):
        return x.T


@pytest.mark.parametrize("layer", [MinibatchStd(), Transposed()], ids=["minibatch statistics", "(3, B)"])
def test_samples_that_see_one_another_have_no_differences_of_their_own(layer):
    """With reduction='mean' they need none."""
    critic = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), layer).double()
    batch = samples(4, dtype=torch.float64)
    truth = gradient(reference.fused_gradient_penalty(critic, *batch, alpha=0.5), critic)
    ours = gradient(fused_gradient_penalty(critic, *batch, alpha=0.5, method="directional"), critic)
    assert off(ours, truth) <= 1e-8
    with pytest.raises(ValueError, match="must judge each sample by itself, with the samples in front"):
        fused_gradient_penalty(critic, *batch, method="directional", reduction="none")


class Widened(nn.Module):
    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        scores = self.critic(x).flatten()
        return torch.cat((scores, scores[:1]))


def test_lazy_module():
    critic, gradient_penalty = (
        mlp(),
        GradientPenalty(every=2, method="directional", return_norms=True, return_error=True),
    )
    assert len(gradient_penalty(critic, *samples())) == 3
    skipped, norms, error = gradient_penalty(critic, *samples())
    assert skipped == 0
    assert norms is None
    assert error is None


BAD = {
    "method": ({"method": "exact"}, ValueError,
               "method must be one of 'double_backward', 'compiled', 'directional', 'auto', got 'exact'"),
    "step of another": ({"step": 0.1}, ValueError,
                        "step is of method='directional', got it with method='double_backward'"),
    "step": ({"method": "directional", "step": 0.0}, ValueError, "step must be a finite number > 0, got 0.0"),
    "step's type": ({"method": "directional", "step": "1"}, TypeError, "step must be a number, got str"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    "chunk_size's type": ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int, got float"),
    "allow_kinks": ({"allow_kinks": 1}, TypeError, "allow_kinks must be True or False, got 1"),
    "return_error": ({"return_error": None}, TypeError, "return_error must be True or False, got None"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    options, kind, words = BAD[name]
    with pytest.raises(kind, match=f"^{re.escape(words)}$"):
        fused_gradient_penalty(mlp(), *samples(), **options)
    with pytest.raises(kind, match=f"^{re.escape(words)}$"):
        r1_penalty(mlp(), samples()[0], **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (5, 33), (2, 5000), (300, 3)], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("where", [place for place in PLACES if place.id != "torch"])
def test_the_fused_perturbation(where, shape, dtype, strided):
    """x + c g and x - c g in one launch, against torch's, to a rounding (which the interpreter does not do in bf16)."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    points, gradients = (torch.randn(shape[0], shape[1] * 2).to(where.device, dtype) for _ in range(2))
    points, gradients = (x[:, : shape[1]] if strided else x[:, : shape[1]].contiguous() for x in (points, gradients))
    column = torch.randn(shape[0], 1).to(where.device, acc)
    ours = kernels.perturb(points, gradients, column)
    x, g, c = points.double(), gradients.double(), column.double()
    for actual, truth in zip(ours, (x + c * g, x - c * g), strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        size = (x.abs() + (c * g).abs()).max().item()
        spacing = SPACING[dtype] * (2 if dtype == torch.bfloat16 else 1)
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=spacing * size)
    for actual, theirs in zip(torch_ops.perturb(points, gradients, column), (x + c * g, x - c * g), strict=True):
        torch.testing.assert_close(actual.double(), theirs, rtol=0, atol=SPACING[dtype] * size)
