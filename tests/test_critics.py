"""Every kind of critic people have, against plain autograd in fp64: value, norms, weight gradients, random state."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import fused_gp
from fused_gp import GradientPenalty, fused_gradient_penalty, input_gradient_penalty, r1_penalty, reference
from fused_gp.critics.critic import Critic

FAMILY = ["fused_gradient_penalty", "r1_penalty", "r2_penalty", "dragan_penalty"]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(function, critic, *samples, weights=None, **options):
    """What a fresh copy of the critic gives: value, norms, weight gradients, buffers after, next random numbers."""
    if isinstance(critic, nn.Module):
        critic = copy.deepcopy(critic)
        weights = [p for p in critic.parameters() if p.requires_grad]
    torch.manual_seed(3)
    penalty, norms = function(critic, *samples, return_norms=True, **options)
    grads = torch.autograd.grad(penalty, weights, materialize_grads=True)
    assert any(grad.any() for grad in grads), "a penalty that moves nothing shows nothing"
    buffers = critic.buffers() if isinstance(critic, nn.Module) else ()
    return penalty.detach(), norms, *grads, *buffers, torch.rand(3, device=norms.device)


def assert_same(ours, truth):
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def on(device, things):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), things)


def assert_same_as_the_oracle(place, name, critic, samples, **options):
    """`name` is a function of the family; those around one batch get the first of the two."""
    critic = critic.to(place.device)
    samples = on(place.device, samples if name == "fused_gradient_penalty" else samples[:1])
    options = on(place.device, options)
    ours = run(getattr(fused_gp, name), critic, *samples, backend=place.backend, **options)
    assert_same(ours, run(getattr(reference, name), critic, *samples, **options))


def batch(*shape):
    return torch.randn(shape, dtype=torch.float64)


class Then(nn.Sequential):
    """Layers, and a function of what comes out of them."""

    def __init__(self, *layers, then):
        super().__init__(*layers)
        self.then = then

    def forward(self, x):
        return self.then(super().forward(x))


class Conditional(nn.Module):
    """A projection discriminator: the label's embedding meets the features."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(3, 5), nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x, labels, *, embedding, strength=1.0):
        features = torch.tanh(self.body(x) + embedding)
        return self.head(features).squeeze(1) + strength * (features * self.embed(labels)).sum(1)


class MinibatchStd(nn.Module):
    """StyleGAN's layer: the batch's standard deviation is a feature of each sample, so samples see one another."""

    def forward(self, x):
        deviation = (x.var(0, correction=0) + 1e-8).sqrt().mean()
        return torch.cat((x, deviation.expand(len(x), 1)), 1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """Math attention: the fused kernels have no double backward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        with sdpa_kernel(SDPBackend.MATH):
            return self.head(self.layer(x).mean(1))


class Graph(nn.Module):
    """Images with a graph each: nodes, and edges as weights between them."""

    def __init__(self):
        super().__init__()
        self.image, self.node = nn.Conv2d(2, 3, 3), nn.Linear(3, 4)

    def forward(self, x):
        nodes, edges = x["graph"]
        messages = torch.tanh(edges @ self.node(nodes)).sum((1, 2))
        return self.image(x["image"]).square().mean((1, 2, 3)) + messages


class FirstOnly(nn.Module):
    """A critic of two inputs that ignores the second."""

    def __init__(self):
        super().__init__()
        self.body = mlp(4)

    def forward(self, x):
        used, _ = x
        return self.body(used)


class Checkpointed(nn.Module):
    """Activations are made again in the backward."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3)), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def mlp(width, *, out=1):
    return nn.Sequential(nn.Linear(width, 6), nn.SiLU(), nn.Linear(6, out))


def normalised(norm):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm, nn.Tanh(), nn.Conv2d(4, 1, 2))


def first_frozen():
    critic = mlp(4)
    critic[0].requires_grad_(False)
    return critic


def images():
    return batch(4, 2, 4, 4), batch(4, 2, 4, 4)


def rows():
    return batch(4, 4), batch(4, 4)


def sequences():
    return batch(3, 5, 3), batch(3, 5, 3)


CRITICS = {
    "conditional": (
        Conditional, lambda: (batch(4, 6), batch(4, 6)),
        {"critic_args": (torch.tensor([0, 2, 1, 2]),),
         "critic_kwargs": {"embedding": torch.ones(4, 5, dtype=torch.float64), "strength": 0.5}},
    ),
    "patch map": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 1, 2)), images, {}),
    "packed": (
        lambda: nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(1), mlp(8)),
        lambda: (batch(6, 4), batch(6, 4)), {"group_size": 2},
    ),
    "a sum per pair": (
        lambda: Then(mlp(4), then=lambda scores: scores.view(-1, 2).sum(1)),
        lambda: (batch(6, 4), batch(6, 4)), {"group_size": 2, "reduction": "sum"},
    ),
    "(B,)": (lambda: Then(mlp(4), then=lambda scores: scores.squeeze(1)), rows, {}),
    "(B, 3)": (lambda: mlp(4, out=3), rows, {"weight": 10.0}),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 1)), rows, {}),
    "spectral norm": (
        lambda: nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.SiLU(), spectral_norm(nn.Linear(6, 1))), rows, {},
    ),
    "layer norm": (lambda: normalised(nn.LayerNorm([4, 4, 4])), images, {}),
    "group norm": (lambda: normalised(nn.GroupNorm(2, 4)), images, {}),
    "instance norm": (lambda: normalised(nn.InstanceNorm2d(4, affine=True)), images, {}),
    "minibatch stddev": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), MinibatchStd(), mlp(6)), rows, {}),
    "lstm": (Recurrent, sequences, {}),
    "transformer": (Attention, lambda: (batch(3, 5, 4), batch(3, 5, 4)), {}),
    "pytree": (
        Graph,
        lambda: tuple({"image": batch(3, 2, 4, 4), "graph": (batch(3, 5, 3), batch(3, 5, 5))} for _ in range(2)),
        {},
    ),
    "an input ignored": (FirstOnly, lambda: ([batch(4, 4), batch(4, 7)], [batch(4, 4), batch(4, 7)]), {}),
    "first layer frozen": (first_frozen, rows, {}),
    "checkpointed": (Checkpointed, rows, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["fused_gradient_penalty", "r1_penalty", "dragan_penalty"])
@pytest.mark.parametrize("critic", CRITICS)
def test_critic(place, critic, name):
    """Each of the family sees the critic, its arguments and its randomness as plain autograd does."""
    build, samples, options = CRITICS[critic]
    assert_same_as_the_oracle(place, name, build().double(), samples(), **options)


def test_checkpointing_changes_nothing():
    """The oracle runs checkpointed critics too, so this holds them to the same critic with its activations kept."""
    critic, samples = Checkpointed().double(), rows()
    kept = nn.Sequential(critic.body, critic.head)
    assert_same(run(fused_gradient_penalty, critic, *samples), run(fused_gradient_penalty, kept, *samples))


class Owner:
    """Not a module, but has one: called, or asked for its method."""

    def __init__(self, net):
        self.net = net

    def score(self, x):
        return self.net(x)

    __call__ = score


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "partial": lambda net: functools.partial(net),
    "partial of a function": lambda net: functools.partial(lambda scale, x: scale * net(x), 1.0),
    "lambda": lambda net: lambda x: net(x),
    "bound method": lambda net: net.forward,
    "bound method of an owner": lambda net: Owner(net).score,
    "callable object": Owner,
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_critic(place, wrapper, name):
    """Any callable around a critic gives the critic's own penalty, and its weights the same gradients."""
    net = mlp(4).double().to(place.device)
    samples = on(place.device, rows()[: 2 if name == "fused_gradient_penalty" else 1])
    weights = list(net.parameters())
    ours = run(getattr(fused_gp, name), WRAPPERS[wrapper](net), *samples, weights=weights, backend=place.backend)
    assert_same(ours, run(getattr(reference, name), lambda x: net(x), *samples, weights=weights))


def test_dict_of_another_order(place):
    """fake's keys are matched by name; the critic gets real's order."""
    critic = Graph().double().to(place.device)
    real, fake = on(place.device, CRITICS["pytree"][1]())
    shuffled = {"graph": fake["graph"], "image": fake["image"]}
    ours = run(fused_gradient_penalty, critic, real, shuffled, backend=place.backend)
    assert_same(ours, run(reference.fused_gradient_penalty, critic, real, fake))


def test_frozen_critic_sends_gradients_to_the_samples(place):
    """A generator's step: nothing for the weights, and for both batches what autograd sends."""
    critic = mlp(4).double().to(place.device).requires_grad_(False)
    results = []
    for function, options in (
        (fused_gradient_penalty, {"backend": place.backend}),
        (reference.fused_gradient_penalty, {}),
    ):
        torch.manual_seed(0)
        real, fake = (t.requires_grad_() for t in on(place.device, rows()))
        penalty, norms = function(critic, real, fake, alpha=0.3, return_norms=True, **options)
        results.append((penalty.detach(), norms, *torch.autograd.grad(penalty, (real, fake))))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fused_gradient_penalty", "r1_penalty"])
def test_half_precision_weights(place, dtype, name):
    """The points between these samples are numbers of the dtype, so the critic runs the same; only the gradient of the
    norm is rounded, and once. The interpreter cuts bf16 off."""
    critic = mlp(4).to(place.device, dtype)
    samples = [(torch.randint(-8, 9, (5, 4)) / 4).to(place.device, dtype) for _ in range(2)]
    samples = samples[: 2 if name == "fused_gradient_penalty" else 1]
    options = {"alpha": 0.5} if name == "fused_gradient_penalty" else {}
    ours = run(getattr(fused_gp, name), critic, *samples, backend=place.backend, **options)
    truth = run(getattr(reference, name), critic, *samples, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    torch.testing.assert_close(ours[:2], truth[:2])
    step = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    largest = max(grad.abs().max().item() for grad in truth[2:-1])
    for actual, expected in zip(ours[2:], truth[2:], strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=2 * step * largest)


class Heads(nn.Module):
    """Two inputs, one of them ignored by one head: scores, a patch map, and a scalar."""

    def __init__(self):
        super().__init__()
        self.image, self.row = nn.Conv2d(2, 3, 2), mlp(4)

    def forward(self, images, rows):
        features = torch.tanh(self.image(images))
        scores = self.row(rows) + features.mean((1, 2, 3))[:, None]
        return scores, features, scores.square().mean()


def heads_case(device, requires_grad=True):
    torch.manual_seed(5)
    critic = Heads().double().to(device)
    inputs = (batch(3, 2, 3, 3).to(device).requires_grad_(requires_grad), batch(3, 4).to(device).requires_grad_())
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
def test_input_gradient(place, output_weights, options):
    """Several outputs with weights, several inputs, one joint norm."""
    weights = on(place.device, OUTPUT_WEIGHTS[output_weights])
    results = []
    for function, extra in (
        (input_gradient_penalty, {"backend": place.backend}),
        (reference.input_gradient_penalty, {}),
    ):
        critic, inputs, outputs = heads_case(place.device)
        penalty, norms = function(outputs, inputs, output_weights=weights, return_norms=True, **options, **extra)
        parameters = [*critic.parameters(), *inputs]
        results.append((penalty.detach(), norms, *torch.autograd.grad(penalty, parameters, materialize_grads=True)))
    assert_same(*results)


def test_learned_output_weights(place):
    """A weight that requires grad gets the gradient that autograd gives it."""
    results = []
    for function, extra in (
        (input_gradient_penalty, {"backend": place.backend}),
        (reference.input_gradient_penalty, {}),
    ):
        _, inputs, (scores, features, _) = heads_case(place.device)
        learned = torch.full((3, 1), 0.7, dtype=torch.float64, device=place.device, requires_grad=True)
        balance = torch.tensor(0.3, dtype=torch.float64, device=place.device, requires_grad=True)
        penalty = function((scores, features), inputs, output_weights=(learned, balance), **extra)
        results.append((penalty.detach(), *torch.autograd.grad(penalty, (learned, balance))))
    assert_same(*results)


PARTS = {
    "scores alone": lambda outputs, inputs: (outputs[0], inputs[1]),
    "a scalar": lambda outputs, inputs: (outputs[2], inputs[0]),
    "dicts": lambda outputs, inputs: ({"a": outputs[0], "b": outputs[2]}, {"x": inputs[0], "y": inputs[1]}),
    "an input ignored": lambda outputs, inputs: (outputs[1], inputs),
    "an output without a graph": lambda outputs, inputs: ([outputs[1].detach(), outputs[0]], inputs),
}


@pytest.mark.parametrize("part", PARTS)
def test_input_gradient_of_parts(place, part):
    """What an input does not reach, or an output does not depend on, counts as gradient zero."""
    results = []
    for function, extra in (
        (input_gradient_penalty, {"backend": place.backend}),
        (reference.input_gradient_penalty, {}),
    ):
        critic, inputs, outputs = heads_case(place.device)
        penalty, norms = function(*PARTS[part](outputs, inputs), return_norms=True, **extra)
        grads = torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True)
        results.append((penalty.detach(), norms, *grads))
    assert_same(*results)


def test_the_graph_of_the_outputs_is_kept(place):
    """One run of the critic serves its loss, a second penalty, and one backward for all."""
    results = []
    for function, extra in (
        (input_gradient_penalty, {"backend": place.backend}),
        (reference.input_gradient_penalty, {}),
    ):
        critic, inputs, (scores, features, _) = heads_case(place.device)
        first = function(scores, inputs, **extra)
        second = function((scores, features), inputs, target=0.0, **extra)
        assert all(x.grad is None for x in inputs)
        (scores.mean() + first + second).backward()
        results.append([p.grad for p in critic.parameters()] + [x.grad for x in inputs])
    assert_same(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_input_gradient_without_gradients(place, mode):
    """Where the graph was made before, the value comes without one of its own, and the loss can still go back."""
    critic, inputs, outputs = heads_case(place.device)
    wanted, wanted_norms = input_gradient_penalty(outputs, inputs, backend=place.backend, return_norms=True)
    with mode():
        penalty, norms = input_gradient_penalty(outputs, inputs, backend=place.backend, return_norms=True)
    assert not penalty.requires_grad
    assert_same((penalty, norms), (wanted.detach(), wanted_norms))
    (outputs[0].mean() + wanted).backward()
    assert critic.row[0].weight.grad.isfinite().all()


def with_batch_norm():
    return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.BatchNorm1d(3)), nn.Linear(3, 1))


GLOBAL_CRITIC = with_batch_norm()


class Scored(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = with_batch_norm()

    def score(self, x):
        return self.net(x)


class Trainer(nn.Module):
    """Owns a generator with batch normalisation, as most have, beside a critic."""

    def __init__(self, critic):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.critic = critic

    def score(self, x):
        return self.critic(x)

    def as_lambda(self):
        return lambda x: self.critic(x)


class Scorer:
    """No module, but callable."""

    def __init__(self, critic):
        self.generator = nn.BatchNorm1d(4)
        self.critic = critic

    def __call__(self, x):
        return self.critic(x)


class Indirect:
    """Reaches the critic through methods and properties of its own, and keeps it in a slot."""

    __slots__ = ("__weakref__", "critic", "generator")

    def __init__(self, critic):
        self.generator = nn.BatchNorm1d(4)
        self.critic = critic

    @property
    def scored(self):
        return self._scored_by_method

    def _scored_by_method(self, x):
        return self.critic(x)

    def by_method(self, x):
        return self._scored_by_method(x)

    def by_property(self, x):
        return self.scored(x)


class Busy:
    """Its other methods keep a log and train the generator, and its class has attributes of odd kinds."""

    odd = type("Answers", (dict,), {"__getattr__": dict.__getitem__})(one=1)

    def __init__(self, critic):
        self.generator = nn.BatchNorm1d(4)
        self.critic, self.history = critic, []

    def train(self):
        self.generator.train()

    def log(self, value):
        self.history.append(value)

    def __call__(self, x):
        self.critic.train()
        scores = self.critic(x)
        self.log(float(scores.detach().sum()))
        return scores * len(self.odd)


OWNERS = {
    "an object that does more": Busy,
    "a method that calls another": lambda critic: Indirect(critic).by_method,
    "a method that takes a property": lambda critic: Indirect(critic).by_property,
    "a trainer's method": lambda critic: Trainer(critic).score,
    "a lambda over a trainer": lambda critic: Trainer(critic).as_lambda(),
    "a callable object": Scorer,
    "a method of an object": lambda critic: Scorer(critic).__call__,
}


BATCH_NORMALISED = {
    "a module": (with_batch_norm, "1.0"),
    "partial": (lambda: functools.partial(with_batch_norm()), "1.0"),
    "a bound method": (lambda: Scored().score, "net.1.0"),
    "a partial of a bound method": (lambda: functools.partial(Scored().score), "net.1.0"),
    "a lambda over a closure": (lambda: (lambda net: lambda x: net(x))(with_batch_norm()), "1.0"),
    "a lambda over a global": (lambda: lambda x: GLOBAL_CRITIC(x), "1.0"),
    "a lambda in a lambda over a global": (lambda: lambda x: (lambda y: GLOBAL_CRITIC(y))(x), "1.0"),
    "DataParallel": (lambda: nn.DataParallel(with_batch_norm()), "module.1.0"),
}


def flat(size):
    """Batches, for critics that were not asked to move from the CPU."""
    return torch.randn(4, size), torch.randn(4, size)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="DataParallel would send a CPU critic to the devices")
@pytest.mark.parametrize("kind", BATCH_NORMALISED)
def test_batch_norm_is_found_and_named(kind):
    """Through whatever wraps it, by its path, and once."""
    build, path = BATCH_NORMALISED[kind]
    critic = build()
    with pytest.warns(UserWarning, match=rf"batch normalisation in training mode \({path}\)") as caught:
        fused_gradient_penalty(critic, *flat(4))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            fused_gradient_penalty(critic, *flat(4))
            r1_penalty(critic, flat(4)[0])


@pytest.mark.parametrize("owner", OWNERS)
def test_the_generators_batch_norm_is_not_the_critics(owner):
    """Of an owner that has both, the part that the code names is looked at: no warning for the other one's."""
    fused_gradient_penalty(OWNERS[owner](mlp(4)), *flat(4))
    with pytest.warns(UserWarning, match=r"batch normalisation in training mode \(critic\.1\.0\)") as caught:
        fused_gradient_penalty(OWNERS[owner](with_batch_norm()), *flat(4))
    assert len(caught) == 1


def test_a_critic_that_keeps_a_log_stays_the_one_that_it_was():
    """What its other methods write is no part of what it is known by."""
    critic = Busy(mlp(4))
    fused_gradient_penalty(critic, *flat(4))  # a callable is known once it has run
    known = Critic(critic).profile
    for _ in range(2):
        fused_gradient_penalty(critic, *flat(4))
        assert Critic(critic).profile is known
    assert len(critic.history) == 3


def test_batch_norm_without_running_statistics_sees_the_batch_in_evaluation_too():
    critic = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1)).eval()
    with pytest.warns(UserWarning, match=r"\(0\)"):
        fused_gradient_penalty(critic, *flat(4))


def test_each_critic_has_its_own_batch_norm_warning():
    """A second critic is warned of, a third without batch normalisation is not; all that one has are named."""
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"\(1\.0\)"):
            fused_gradient_penalty(with_batch_norm(), *flat(4))
    fused_gradient_penalty(mlp(4), *flat(4))
    twice = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.SyncBatchNorm(4).eval(), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match=r"\(0, 3\)"):
        fused_gradient_penalty(twice, *flat(4))


@pytest.mark.parametrize("nets", [(mlp, with_batch_norm), (with_batch_norm, with_batch_norm)], ids=["none", "one"])
def test_lambdas_of_one_line_over_two_critics(nets):
    """A training loop makes its lambda anew for each critic: what the first closes over says nothing of the second."""

    def penalise(net):
        return fused_gradient_penalty(lambda x: net(x), *flat(4))

    first, second = (net(4) if net is mlp else net() for net in nets)
    if nets[0] is mlp:
        penalise(first)
    else:
        with pytest.warns(UserWarning, match="batch normalisation"):
            penalise(first)
    with pytest.warns(UserWarning, match="batch normalisation"):
        penalise(second)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x)], ids=["module", "lambda"])
@pytest.mark.parametrize("build", [with_batch_norm, lambda: mlp(4)], ids=["with", "without"])
def test_the_modules_are_walked_once(monkeypatch, build, wrap):
    """Walking a critic at every call would cost more than a small penalty."""
    critic, walks = wrap(build().eval()), []
    named_modules = nn.Module.named_modules

    def counted(self, *args, **kwargs):
        walks.append(self)
        return named_modules(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    fused_gradient_penalty(critic, *flat(4))
    assert walks
    walks.clear()
    for _ in range(3):
        fused_gradient_penalty(critic, *flat(4))
        r1_penalty(critic, flat(4)[0])
    assert not walks


def test_batch_norm_back_in_training_is_warned_of():
    """Evaluation mode is a fixed affine map; the first call in training mode is not, whenever it comes."""
    critic = with_batch_norm().eval()
    for _ in range(2):
        fused_gradient_penalty(critic, *flat(4))
    critic.train()
    with pytest.warns(UserWarning, match=r"\(1\.0\)"):
        fused_gradient_penalty(critic, *flat(4))
    critic.eval()
    fused_gradient_penalty(critic, *flat(4))
    critic.train()
    fused_gradient_penalty(critic, *flat(4))


CALLS = {
    "fused": lambda critic: fused_gradient_penalty(critic, *flat(4)),
    "r1": lambda critic: r1_penalty(critic, flat(4)[0]),
    "r2": lambda critic: fused_gp.r2_penalty(critic, flat(4)[0]),
    "dragan": lambda critic: fused_gp.dragan_penalty(critic, flat(4)[0]),
    "GradientPenalty": lambda critic: GradientPenalty()(critic, *flat(4)),
    "GradientPenalty of DRAGAN": lambda critic: GradientPenalty(fused_gp.dragan_penalty)(critic, flat(4)[0]),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_batch_norm_warning_points_at_the_caller(call):
    with pytest.warns(UserWarning, match="batch normalisation") as caught:
        CALLS[call](with_batch_norm())
    assert caught[0].filename == __file__
