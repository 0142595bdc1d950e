"""Whatever is handed in: the oracle's result, or a ValueError or TypeError that names the argument; nothing changed.

Which of the two is decided before each call, by rules written here from the documentation alone. And 2,000 training
steps, after which no memory is gone.
"""

import gc
import math
from numbers import Real
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fused_gp
from fused_gp import GradientPenalty, fused_gradient_penalty, r1_penalty, reference
from tests.support.tolerances import TOLERANCE, assert_near
from tests.support.tolerances import table_row as row

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.uint8, torch.bool, torch.complex64]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where the interpreter meets infinities
]


def hunt(place, strategy, check):
    """Run `check` on many cases, fewer of them where kernels are interpreted."""
    examples = 150 if place.backend == "torch" else 30
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=quiet)
    @given(case=strategy)
    def run(case):
        check(case)

    run()


# ---- What may come: tensors in any shape, dtype and layout, with special values, in any structure.


def lying(values, layout):
    """These values in memory as `layout` says. What it cannot be, it is not: a 2-D tensor has no channels."""
    shape = values.shape
    if layout == "channels_last" and values.ndim in (4, 5):
        memory_format = torch.channels_last if values.ndim == 4 else torch.channels_last_3d
        return values.contiguous(memory_format=memory_format)
    if layout == "expanded" and values.ndim:
        return values[:1].clone().expand(shape) if len(values) else values
    if layout == "expanded inside" and values.ndim > 1 and shape[-1]:
        return values[..., :1].clone().expand(shape)
    if layout == "transposed" and values.ndim:
        return values.permute(*reversed(range(values.ndim))).contiguous().permute(*reversed(range(values.ndim)))
    if layout == "flipped" and values.ndim:
        return values.flip(0)
    if layout == "negative" and values.dtype in FLOATS:
        return torch._neg_view(-values)  # the negation is pending, as in the imaginary part of a conjugate
    if layout in ("sliced", "strided"):
        step = 2 if layout == "strided" else 1
        room = torch.zeros([size * step + 1 for size in shape], dtype=values.dtype)
        view = room[tuple(slice(0, size * step, step) for size in shape)]
    elif layout == "misaligned":
        view = torch.zeros(values.numel() + 1, dtype=values.dtype)[1:].view(shape)
    else:
        return values.clone()
    return view.copy_(values)


LAYOUTS = [
    "contiguous", "channels_last", "expanded", "expanded inside", "transposed", "flipped", "negative", "sliced",
    "strided", "misaligned",
]  # fmt: skip


@st.composite
def tensors(draw, shape, dtype):
    """Numbers of about one; sometimes a row of zeros, an infinity or a NaN."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    special = draw(st.sampled_from([None] * 14 + [0.0, 0.0, math.inf, -math.inf, math.nan]))
    if special is not None and values.numel() and dtype in FLOATS:
        if special == 0:
            values[draw(st.integers(0, shape[0] - 1)) if shape else ()] = 0
        else:
            values.view(-1)[draw(st.integers(0, values.numel() - 1))] = special
    values = values.clamp(0, 1).round() if dtype in (torch.bool, torch.uint8) else values
    return lying(values.to(dtype), draw(st.sampled_from(LAYOUTS)))


def shapes(batch):
    return (
        st.lists(st.integers(1, 5), max_size=4).filter(lambda rest: math.prod(rest) <= 120).map(lambda r: (batch, *r))
    )


STRUCTURES = {
    "tensor": (1, lambda t: t[0]),
    "tuple": (2, tuple),
    "list": (2, list),
    "dict": (2, lambda t: {"image": t[0], "mask": t[1]}),
    "nested": (3, lambda t: {"image": t[0], "graph": (t[1], [t[2]])}),
    "tuple of one": (1, tuple),
}

FAULTS = [
    "shape", "dtype", "fake dtype", "empty", "no dimension", "no tensors", "batch of one", "structure", "not a tensor",
    "batches differ",
]  # fmt: skip


@st.composite
def sample_pairs(draw):
    """real and fake, most of them fit for each other."""
    fault = draw(st.sampled_from([None] * 50 + FAULTS))
    batch = draw(st.integers(1, 6))
    structure = draw(st.sampled_from(list(STRUCTURES)))
    count, build = STRUCTURES[structure]
    dtype = draw(st.sampled_from(FLOATS))
    dtypes = [dtype if draw(st.integers(0, 4)) else draw(st.sampled_from(FLOATS)) for _ in range(count)]
    sizes = [draw(shapes(batch)) for _ in range(count)]
    at = draw(st.integers(0, count - 1))
    if fault == "dtype":
        dtypes[at] = draw(st.sampled_from(OTHERS))
    elif fault == "empty":
        cut = draw(st.integers(0, len(sizes[at]) - 1))
        sizes[at] = tuple(0 if axis == cut else size for axis, size in enumerate(sizes[at]))
    elif fault == "no dimension":
        sizes[at] = ()
    elif fault == "batches differ":
        sizes[at] = (draw(st.integers(0, 6)), *sizes[at][1:])
    fake_dtypes, fake_sizes = list(dtypes), list(sizes)
    if fault == "fake dtype":
        fake_dtypes[at] = draw(st.sampled_from(FLOATS + OTHERS))
    elif fault == "shape":
        fake_sizes[at] = draw(st.sampled_from([(*sizes[at], 1), sizes[at][::-1], (1, *sizes[at][1:])]))
    elif fault == "batch of one":
        fake_sizes = [(1, *size[1:]) for size in sizes]
    real = build([draw(tensors(size, kind)) for size, kind in zip(sizes, dtypes, strict=True)])
    parts = [draw(tensors(size, kind)) for size, kind in zip(fake_sizes, fake_dtypes, strict=True)]
    fake = build(parts)
    if fault == "structure":
        fake = draw(st.sampled_from([tuple(parts), list(parts), parts[0], {"image": parts[0], "mask": parts[-1]}]))
    elif fault == "no tensors":
        real, fake = draw(st.sampled_from([((), ()), ([], []), ({}, {})]))
    elif fault == "not a tensor":
        other = draw(st.sampled_from([None, 1.0, "real", [[1.0, 2.0]], object()]))
        real, fake = draw(st.sampled_from([(other, fake), (real, other), ((*parts, other), (*parts, other))]))
    return real, fake


def mostly(usual, wrong):
    """One of the usual values, and once in forty times one that is not allowed, or odd."""
    return st.integers(0, 39).flatmap(lambda draw: st.sampled_from(wrong if draw == 39 else usual))


FORM = {
    "target": mostly([0.0, 0.5, 1.0, 1, 3.0], [-1.0, math.nan, math.inf, True, "1", None, torch.tensor(1.0), 1j]),
    "one_sided": mostly([False, True], [0, None, "yes"]),
    "eps": mostly([1e-12, 0.0, 0, 0.1], [-1e-12, math.nan, math.inf, True, "0", None]),
    "weight": mostly([1.0, 10.0, 0, -2.0, 0.5], [math.nan, -math.inf, False, "10", None, 10**400]),
    "reduction": mostly(["mean", "sum", "none"], ["max", None, 1, "Mean"]),
    "grad_scale": mostly(
        [None, None, 8.0, 0.25, torch.tensor(8.0), torch.tensor([0.5], dtype=torch.float64)],
        [0, -1.0, math.inf, math.nan, True, "8", torch.ones(2), torch.tensor(8), torch.ones(0)],
    ),
}


@st.composite
def alphas(draw, batch, *, random):
    """Numbers and tensors, of right and wrong shapes. `random`: None, drawn anew, is allowed."""
    kind = draw(
        st.sampled_from(
            ["number", "column", "column", "column", "many dims", "one for all", "number", "wrong"] + ["none"] * random
        )
    )
    if kind == "none":
        return None
    if kind == "number":
        return draw(st.sampled_from([0.0, 0, 1, 1.0, 0.25, 0.7]))
    if kind == "wrong":
        sizes = draw(st.sampled_from([(batch + 1,), (1, batch), (batch, 2), (0,), (1,)]))
        values = [-0.1, 1.5, 10, math.nan, math.inf, True, "0.5", [0.5] * batch, torch.ones(batch, dtype=torch.int64)]
        return draw(st.sampled_from([*values, torch.full(sizes, 0.5), torch.full(sizes, 0.5)]))
    dtype = draw(st.sampled_from(FLOATS))
    shape = {"column": (batch,), "many dims": (batch, 1, 1), "one for all": ()}[kind]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return lying(torch.rand(shape, generator=generator).to(dtype), draw(st.sampled_from(["contiguous", "strided"])))


def batch_of(real):
    """A batch size to draw alpha and groups for, even where there is none."""
    sizes = [len(t) for t in tree_leaves(real) if isinstance(t, torch.Tensor) and t.ndim]
    return sizes[0] if sizes else 2


@st.composite
def calls(draw, *, random_alpha=True, groups=True):
    real, fake = draw(sample_pairs())
    options = {name: draw(values) for name, values in FORM.items()}
    batch = batch_of(real)
    fitting = [p for p in (1, 1, 1, 2, 3) if batch % p == 0]
    options["group_size"] = draw(mostly(fitting, [4, 0, -1, 2.0, True, None])) if groups else 1
    size = options["group_size"]
    rows = batch // size if type(size) is int and size > 0 else batch
    alpha = draw(alphas(max(rows, 1), random=random_alpha))
    return real, fake, alpha, options, draw(st.integers(0, 99))


# ---- The rules: which of it is refused.


def number(value, least=-math.inf):
    plain = isinstance(value, Real) and not isinstance(value, bool)
    return plain and abs(value) < 10**308 and least <= value


def batches_fit(real):
    """A tensor or more, floating, not empty, with one batch size."""
    leaves = tree_leaves(real)
    if not leaves or not all(isinstance(t, torch.Tensor) for t in leaves):
        return False
    if not all(t.dtype in FLOATS and t.ndim and t.numel() for t in leaves):
        return False
    return len({t.shape[0] for t in leaves}) == 1


def pairs_fit(real, fake):
    if not (batches_fit(real) and batches_fit(fake)):
        return False
    (xs, one), (ys, two) = tree_flatten(real), tree_flatten(fake)
    return one == two and all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(xs, ys, strict=True))


def alpha_fits(alpha, rows):
    if alpha is None:
        return True
    if isinstance(alpha, torch.Tensor):
        return alpha.dtype in FLOATS and alpha.shape in ((), *[(rows, *[1] * dims) for dims in range(alpha.ndim)])
    return number(alpha, 0) and alpha <= 1


def scale_fits(scale):
    if isinstance(scale, torch.Tensor):
        return scale.dtype in FLOATS and scale.numel() == 1
    return scale is None or (number(scale) and scale > 0)


def form_fits(form):
    return (
        number(form["target"], 0)
        and number(form["eps"], 0)
        and number(form["weight"])
        and isinstance(form["one_sided"], bool)
        and form["reduction"] in ("mean", "sum", "none")
        and scale_fits(form["grad_scale"])
    )


def groups_fit(size, batch):
    return type(size) is int and size >= 1 and batch % size == 0


# ---- What must hold of every call.


def fingerprint(things):
    """All that can be seen of the tensors: bits, strides, version, requires_grad, .grad."""
    return [
        (t, t._version, t.requires_grad, t.stride(), t.detach().clone(), t.grad)
        for t in tree_leaves(things)
        if isinstance(t, torch.Tensor)
    ]


def assert_untouched(before):
    for tensor, version, requires_grad, stride, bits, grad in before:
        assert tensor._version == version
        assert tensor.requires_grad == requires_grad
        assert tensor.stride() == stride
        assert tensor.grad is grad is None
        assert tensor.dtype == bits.dtype
        one, two = (torch.cat([t.detach().resolve_neg().reshape(-1)]).view(torch.uint8) for t in (tensor, bits))
        assert one.equal(two)


NAMES = r"\b(real|fake|alpha|target|one_sided|eps|weight|reduction|group_size|grad_scale|gradients|noise_scale)\b"


def outcome(must_succeed, inputs, call):
    """The call's result, or None where it was to be refused, and was."""
    before = fingerprint(inputs)
    if must_succeed:
        result = call()
    else:
        result = None
        with pytest.raises((ValueError, TypeError), match=NAMES) as caught:
            call()
        assert type(caught.value) in (ValueError, TypeError)
    assert_untouched(before)
    return result


class Quadratic:
    """D(x) = sum of w x^2 / 2 + w x over all tensors, computed in fp64: its gradient w (x + 1) is rounded once."""

    def __init__(self, samples, seed, *, group_size=1, magnitude=False):
        draw = torch.Generator().manual_seed(seed)
        leaves = tree_leaves(samples)
        self.group_size = group_size
        self.weights = []
        for x in leaves:
            weight = torch.randn(x.shape[1:], dtype=torch.float64, generator=draw).to(x.device)
            self.weights.append((weight.abs() if magnitude else weight).requires_grad_())

    def __call__(self, samples):
        scores = 0
        for weight, x in zip(self.weights, tree_leaves(samples), strict=True):
            x = x.double()
            scores = scores + (weight * (x.square() / 2 + x)).flatten(1).sum(1) if x.ndim > 1 else (
                scores + weight * (x.square() / 2 + x)
            )  # fmt: skip
        return scores.view(-1, self.group_size).sum(1)


def attached(samples, cast, requires_grad=True):
    """The samples, or what `cast` makes of them, as leaves of a graph or as plain data; the layout stays."""
    return tree_map(lambda t: cast(t).detach().requires_grad_(requires_grad), samples)


def coarsest(place, samples):
    rows = [row(place, t.dtype) for t in tree_leaves(samples)]
    return max(rows, key=lambda r: TOLERANCE[r][1])


def magnitudes(truth, bound):
    """How large the terms of each result are, of which it may be a small difference."""
    pairs = zip(truth, bound, strict=True)
    return [max((t[t.isfinite()].abs().max().item() for t in pair if t.isfinite().any()), default=0) for pair in pairs]


def assert_as_the_oracle(place, name, samples, options, seed, *, oracle=None, roundings=3, **extra):
    """`name` on these samples (one batch or two), with gradients, against fp64.

    The points, the gradients there and what goes back are rounded to the dtype; each result is as far off as a few such
    roundings of its terms. Their size is the oracle's result where nothing cancels: all positive, the target negative.
    Another `oracle` has no gradient for the samples.
    """
    device_options = {
        key: value.to(place.device) if isinstance(value, torch.Tensor) else value for key, value in options.items()
    }

    learned = oracle is None and seed % 3 > 0  # else the samples are plain data, as in a critic's step

    def run(module, inputs, magnitude=False, **more):
        critic = Quadratic(inputs[0], seed, group_size=options["group_size"], magnitude=magnitude)
        torch.manual_seed(seed)
        merged = device_options | extra | more
        function = oracle if oracle and module is reference else getattr(module, name)
        penalty, norms = function(critic, *inputs, return_norms=True, **merged)
        leaves = [*critic.weights, *(tree_leaves(inputs) if learned else [])]
        return [penalty.detach(), norms, *torch.autograd.grad(penalty.sum(), leaves, materialize_grads=True)]

    inputs = attached(samples, lambda t: t, learned)
    ours = outcome(True, (inputs, options, extra), lambda: run(fused_gp, inputs, backend=place.backend))
    truth = run(reference, attached(samples, torch.Tensor.double, learned))
    sign = {"target": -options["target"], "one_sided": False} if "target" in options else {}
    bound = run(reference, attached(samples, lambda t: t.double().abs(), learned), magnitude=True, **sign)
    judge = coarsest(place, samples)
    wanted = torch.float64 if any(t.dtype == torch.float64 for t in tree_leaves(samples)) else torch.float32
    assert ours[0].dtype == ours[1].dtype == wanted
    for actual, expected, scale in zip(ours, truth, magnitudes(truth, bound), strict=True):
        assert_near(actual, expected, judge, 1, roundings * scale)


# ---- The functions.


def test_interpolate(place):
    def check(case):
        real, fake, alpha, _, _ = case
        fits = pairs_fit(real, fake) and alpha_fits(alpha, batch_of(real))
        on_device = [to_device(place, thing) for thing in (real, fake, alpha)]
        result = outcome(fits, on_device, lambda: fused_gp.interpolate(*on_device, backend=place.backend))
        if not fits:
            return
        truth = reference.interpolate(*tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) else t, on_device))
        assert tree_flatten(result)[1] == tree_flatten(real)[1]
        for actual, expected, x in zip(*map(tree_leaves, (result, truth, real)), strict=True):
            assert actual.dtype == x.dtype
            assert_near(actual, expected, row(place, x.dtype), 1)

    hunt(place, calls(random_alpha=False, groups=False), check)


def to_device(place, things):
    return tree_map(lambda t: t.to(place.device) if isinstance(t, torch.Tensor) else t, things)


def test_fused_gradient_penalty(place):
    def check(case):
        real, fake, alpha, options, seed = case
        real, fake, alpha = (to_device(place, thing) for thing in (real, fake, alpha))
        batch, size = batch_of(real), options["group_size"]
        fits = pairs_fit(real, fake) and form_fits(options) and groups_fit(size, batch)
        fits = fits and alpha_fits(alpha, batch // size)
        if fits:
            assert_as_the_oracle(place, "fused_gradient_penalty", (real, fake), options, seed, alpha=alpha)
            return
        outcome(
            False,
            (real, fake, alpha, options),
            lambda: fused_gradient_penalty(never, real, fake, alpha=alpha, backend=place.backend, **options),
        )

    hunt(place, calls(), check)


def never(x):
    raise AssertionError("the critic ran before its arguments were checked")


def test_r1_penalty(place):
    def check(case):
        real, _, _, options, seed = case
        real = to_device(place, real)
        options = {name: options[name] for name in ("weight", "reduction", "group_size", "grad_scale")}
        rest = {"target": 0.0, "eps": 0.0, "one_sided": False}
        fits = batches_fit(real) and form_fits(options | rest) and groups_fit(options["group_size"], batch_of(real))
        if fits:
            assert_as_the_oracle(place, "r1_penalty", (real,), options, seed)
            return
        outcome(False, (real, options), lambda: r1_penalty(never, real, backend=place.backend, **options))

    hunt(place, calls(), check)


def test_dragan_penalty(place):
    def check(case):
        real, _, alpha, options, seed = case
        real, alpha = to_device(place, real), to_device(place, alpha)
        batch, size = batch_of(real), options["group_size"]
        fits = batches_fit(real) and form_fits(options) and groups_fit(size, batch)
        fits = fits and alpha_fits(alpha, batch // size) and all(t.numel() >= 2 for t in tree_leaves(real))
        if not fits:
            outcome(
                False,
                (real, alpha, options),
                lambda: fused_gp.dragan_penalty(never, real, alpha=alpha, backend=place.backend, **options),
            )
            return
        more = {"alpha": alpha}
        if any(t.dtype != torch.float64 for t in tree_leaves(real)):
            more |= {"oracle": oracle_with_the_noise_of(real), "roundings": 8}
        assert_as_the_oracle(place, "dragan_penalty", (real,), options, seed, **more)

    hunt(place, calls(), check)


def oracle_with_the_noise_of(samples):
    """DRAGAN in fp64, its noise drawn in the dtype of the samples: that of another dtype is other noise."""

    def noisy(x, sample):
        return x + 0.5 * x.std().detach() * torch.empty_like(sample).uniform_().double()

    def oracle(critic, real, **options):
        return reference.fused_gradient_penalty(critic, real, tree_map(noisy, real, samples), **options)

    return oracle


def test_gradient_norm_penalty(place):
    """Here the same infinities and NaN in value and norms, and derivatives that are finite at the same places."""

    def check(case):
        gradients, _, _, options, _ = case
        gradients = to_device(place, gradients)
        options = {name: value for name, value in to_device(place, options).items() if name != "group_size"}
        fits = batches_fit(gradients) and form_fits(options)

        def run(module, cast, absolute=False, **more):
            g = attached(gradients, lambda t: cast(t).abs() if absolute else cast(t))
            penalty, norms = module.gradient_norm_penalty(g, return_norms=True, **(options | more))
            return [penalty.detach(), norms, *torch.autograd.grad(penalty.sum(), tree_leaves(g))]

        if not fits:
            call = fused_gp.gradient_norm_penalty
            outcome(False, (gradients, options), lambda: call(gradients, backend=place.backend, **options))
            return
        ours = outcome(True, (gradients, options), lambda: run(fused_gp, lambda t: t, backend=place.backend))
        truth = run(reference, torch.Tensor.double)
        bound = run(reference, torch.Tensor.double, absolute=True, target=-options["target"], one_sided=False)
        sizes = magnitudes(truth, bound)
        judges = [max((row(place, t.dtype) for t in tree_leaves(gradients)), key=lambda r: TOLERANCE[r][0])] * 2
        judges += [row(place, t.dtype) for t in tree_leaves(gradients)]
        orders = [0, 0] + [1] * len(sizes[2:])
        for actual, expected, judge, order, size in zip(ours, truth, judges, orders, sizes, strict=True):
            assert_near(actual, expected, judge, order, size)
        for actual, expected in zip(ours[:2], truth[:2], strict=True):
            assert actual.isnan().equal(expected.isnan())
            assert actual.isinf().equal(expected.isinf())

    hunt(place, calls(random_alpha=False, groups=False), check)


# ---- Memory.


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_is_flat():
    """2,000 steps, each with a penalty of another kind, its backward and the optimizer's. A (64, 256) fp32 tensor left
    behind at each of the last 1,600 would be 100 MiB; a graph's worth of them several times that."""
    torch.manual_seed(0)
    critic = torch.nn.Sequential(torch.nn.Linear(256, 32), torch.nn.LeakyReLU(0.2), torch.nn.Linear(32, 1))
    optimizer = torch.optim.Adam(critic.parameters(), 1e-4)
    every, lazy = GradientPenalty(weight=10.0), GradientPenalty(r1_penalty, every=4)
    real, fake = torch.randn(64, 256), torch.randn(64, 256)
    penalties = [
        lambda: fused_gradient_penalty(critic, real, fake, return_norms=True)[0],
        lambda: r1_penalty(critic, real),
        lambda: every(critic, real, fake),
        lambda: lazy(critic, real) + fused_gradient_penalty(lambda x: critic(x), real, fake, grad_scale=8.0),
    ]

    def steps(count):
        for step in range(count):
            optimizer.zero_grad()
            penalties[step % len(penalties)]().backward()
            optimizer.step()
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return tensors, resident_bytes()

    tensors, resident = steps(400)
    tensors_after, resident_after = steps(1600)
    assert tensors_after <= tensors  # fewer, when another test's were freed on the way
    leak = 1600 * real.numel() * real.element_size()
    assert resident_after - resident < leak / 5, f"{(resident_after - resident) / 2**20:.1f} MiB more"
