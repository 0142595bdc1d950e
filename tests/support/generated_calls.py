"""Generated calls of the penalties, most of them allowed, and the rules of the documentation for which of them are."""

import math
from numbers import Real

import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_leaves

from tests.support.tolerances import DTYPES

WRONG_DTYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64]


def in_layout(values, layout):
    """These values in this memory layout, or as they are where the layout does not apply: a 2-D tensor has no
    channels."""
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
    if layout == "negative" and values.dtype in DTYPES:
        return torch._neg_view(-values)  # negated by a flag, as the imaginary part of a conjugate is
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
    """Values of about one; sometimes a row of zeros, an infinity or a NaN."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    special = draw(st.sampled_from([None] * 14 + [0.0, 0.0, math.inf, -math.inf, math.nan]))
    if special is not None and values.numel() and dtype in DTYPES:
        if special == 0:
            values[draw(st.integers(0, shape[0] - 1)) if shape else ()] = 0
        else:
            values.view(-1)[draw(st.integers(0, values.numel() - 1))] = special
    values = values.clamp(0, 1).round() if dtype in (torch.bool, torch.uint8) else values
    return in_layout(values.to(dtype), draw(st.sampled_from(LAYOUTS)))


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

MISTAKES_IN_SAMPLES = [
    "shape", "dtype", "fake dtype", "empty", "no dimension", "no tensors", "batch of one", "structure", "not a tensor",
    "batches differ",
]  # fmt: skip


@st.composite
def sample_pairs(draw):
    """real and fake, most of them fit for each other."""
    mistake = draw(st.sampled_from([None] * 50 + MISTAKES_IN_SAMPLES))
    batch = draw(st.integers(1, 6))
    structure = draw(st.sampled_from(list(STRUCTURES)))
    count, build = STRUCTURES[structure]
    dtype = draw(st.sampled_from(DTYPES))
    dtypes = [dtype if draw(st.integers(0, 4)) else draw(st.sampled_from(DTYPES)) for _ in range(count)]
    sizes = [draw(shapes(batch)) for _ in range(count)]
    at = draw(st.integers(0, count - 1))
    if mistake == "dtype":
        dtypes[at] = draw(st.sampled_from(WRONG_DTYPES))
    elif mistake == "empty":
        cut = draw(st.integers(0, len(sizes[at]) - 1))
        sizes[at] = tuple(0 if axis == cut else size for axis, size in enumerate(sizes[at]))
    elif mistake == "no dimension":
        sizes[at] = ()
    elif mistake == "batches differ":
        sizes[at] = (draw(st.integers(0, 6)), *sizes[at][1:])
    fake_dtypes, fake_sizes = list(dtypes), list(sizes)
    if mistake == "fake dtype":
        fake_dtypes[at] = draw(st.sampled_from(DTYPES + WRONG_DTYPES))
    elif mistake == "shape":
        fake_sizes[at] = draw(st.sampled_from([(*sizes[at], 1), sizes[at][::-1], (1, *sizes[at][1:])]))
    elif mistake == "batch of one":
        fake_sizes = [(1, *size[1:]) for size in sizes]
    real = build([draw(tensors(size, kind)) for size, kind in zip(sizes, dtypes, strict=True)])
    parts = [draw(tensors(size, kind)) for size, kind in zip(fake_sizes, fake_dtypes, strict=True)]
    fake = build(parts)
    if mistake == "structure":
        fake = draw(st.sampled_from([tuple(parts), list(parts), parts[0], {"image": parts[0], "mask": parts[-1]}]))
    elif mistake == "no tensors":
        real, fake = draw(st.sampled_from([((), ()), ([], []), ({}, {})]))
    elif mistake == "not a tensor":
        other = draw(st.sampled_from([None, 1.0, "real", [[1.0, 2.0]], object()]))
        real, fake = draw(st.sampled_from([(other, fake), (real, other), ((*parts, other), (*parts, other))]))
    return real, fake


def mostly_allowed(usual, wrong):
    """One of the allowed values; once in forty times one that is wrong or unusual."""
    return st.integers(0, 39).flatmap(lambda draw: st.sampled_from(wrong if draw == 39 else usual))


FORM = {
    "target": mostly_allowed(
        [0.0, 0.5, 1.0, 1, 3.0], [-1.0, math.nan, math.inf, True, "1", None, torch.tensor(1.0), 1j]
    ),
    "one_sided": mostly_allowed([False, True], [0, None, "yes"]),
    "eps": mostly_allowed([1e-12, 0.0, 0, 0.1], [-1e-12, math.nan, math.inf, True, "0", None]),
    "weight": mostly_allowed([1.0, 10.0, 0, -2.0, 0.5], [math.nan, -math.inf, False, "10", None, 10**400]),
    "reduction": mostly_allowed(["mean", "sum", "none"], ["max", None, 1, "Mean"]),
    "grad_scale": mostly_allowed(
        [None, None, 8.0, 0.25, torch.tensor(8.0), torch.tensor([0.5], dtype=torch.float64)],
        [0, -1.0, math.inf, math.nan, True, "8", torch.ones(2), torch.tensor(8), torch.ones(0)],
    ),
}


@st.composite
def alphas(draw, batch, *, random):
    """Numbers and tensors, of right and wrong shapes. `random`: also None, with which alpha is drawn."""
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
    dtype = draw(st.sampled_from(DTYPES))
    shape = {"column": (batch,), "many dims": (batch, 1, 1), "one for all": ()}[kind]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return in_layout(torch.rand(shape, generator=generator).to(dtype), draw(st.sampled_from(["contiguous", "strided"])))


def batch_size_of(real):
    """A batch size for alpha and groups, for wrong samples too."""
    sizes = [len(t) for t in tree_leaves(real) if isinstance(t, torch.Tensor) and t.ndim]
    return sizes[0] if sizes else 2


@st.composite
def calls(draw, *, random_alpha=True, groups=True):
    real, fake = draw(sample_pairs())
    options = {name: draw(values) for name, values in FORM.items()}
    batch = batch_size_of(real)
    fitting = [p for p in (1, 1, 1, 2, 3) if batch % p == 0]
    options["group_size"] = draw(mostly_allowed(fitting, [4, 0, -1, 2.0, True, None])) if groups else 1
    size = options["group_size"]
    rows = batch // size if type(size) is int and size > 0 else batch
    alpha = draw(alphas(max(rows, 1), random=random_alpha))
    return real, fake, alpha, options, draw(st.integers(0, 99))


def number(value, least=-math.inf):
    plain = isinstance(value, Real) and not isinstance(value, bool)
    return plain and abs(value) < 10**308 and least <= value


def batches_fit(real):
    """One tensor or more, floating, not empty, with one batch size."""
    leaves = tree_leaves(real)
    if not leaves or not all(isinstance(t, torch.Tensor) for t in leaves):
        return False
    if not all(t.dtype in DTYPES and t.ndim and t.numel() for t in leaves):
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
        return alpha.dtype in DTYPES and alpha.shape in ((), *[(rows, *[1] * dims) for dims in range(alpha.ndim)])
    return number(alpha, 0) and alpha <= 1


def scale_fits(scale):
    if isinstance(scale, torch.Tensor):
        return scale.dtype in DTYPES and scale.numel() == 1
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
