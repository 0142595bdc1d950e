"""Half precision and loss scales: the same penalty with and without a scale, and what a scale is for."""

import copy

import pytest
import torch
from torch import nn

import fused_gp
from fused_gp import fused_gradient_penalty, gradient_norm_penalty, reference

HALVES = [torch.float16, torch.bfloat16]
STEP = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # between neighbours of a number, relative


pytestmark = pytest.mark.usefixtures("one_thread")


def of_outputs(module, critic, real, fake, **options):
    """`input_gradient_penalty` called as its users do, after the critic ran."""
    x = fake.detach().requires_grad_()
    return module.input_gradient_penalty(critic(x), x, **options)


def of_gradients(module, critic, real, fake, *, grad_scale=None, **options):
    """`gradient_norm_penalty` on gradients that the caller took and scaled."""
    x = fake.detach().requires_grad_()
    scores = critic(x)
    if isinstance(grad_scale, torch.amp.GradScaler):
        factor = grad_scale.scale(torch.ones_like(scores))
    else:
        factor = torch.ones_like(scores) * (1 if grad_scale is None else grad_scale)
    (gradients,) = torch.autograd.grad(scores, x, factor, create_graph=True)
    return module.gradient_norm_penalty(gradients, grad_scale=grad_scale, **options)


# Each with the same arguments, from the package or from its oracle.
FAMILY = {
    "fused": lambda module, critic, real, fake, **options: module.fused_gradient_penalty(critic, real, fake, **options),
    "r1": lambda module, critic, real, fake, **options: module.r1_penalty(critic, real, **options),
    "r2": lambda module, critic, real, fake, **options: module.r2_penalty(critic, fake, **options),
    "dragan": lambda module, critic, real, fake, **options: module.dragan_penalty(critic, real, **options),
    "input_gradient": of_outputs,
    "gradient_norm": of_gradients,
}

every_function = pytest.mark.parametrize("function", FAMILY)


def mlp(dtype, device):
    return nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 1)).to(device, dtype)


def on_grid(dtype, device, *shape):
    """Samples and, half way between them, points that are numbers of every dtype."""
    return [(torch.randint(-8, 9, shape or (5, 6)) / 4).to(device, dtype) for _ in range(2)]


def run(module, function, critic, real, fake, *, loss_scale=1.0, **options):
    """Value, norms and weight gradients under one seed, the loss being scaled as GradScaler scales it."""
    torch.manual_seed(1)
    value, norms = FAMILY[function](module, critic, real, fake, return_norms=True, **options)
    grads = torch.autograd.grad(value * loss_scale, list(critic.parameters()), materialize_grads=True)
    return [value.detach(), norms, *(grad.to(norms.dtype) / loss_scale for grad in grads)]


def half_way(function):
    return {"alpha": 0.5} if function == "fused" else {}


def tensor_scale(value, dtype=torch.float32, shape=()):
    return lambda device: torch.full(shape, value, dtype=dtype, device=device)


SCALES = {
    "number": lambda device: 1024.0,
    "int": lambda device: 8,
    "odd number": lambda device: 1000.1,
    "tensor": tensor_scale(1024.0),
    "odd tensor": tensor_scale(1000.1),
    "(1,)": tensor_scale(1024.0, shape=(1,)),
    "fp16 tensor": tensor_scale(1024.0, torch.float16),
    "odd fp64 tensor": tensor_scale(1000.1, torch.float64),
    "learned tensor": lambda device: torch.tensor(512.0, device=device, requires_grad=True),
    "GradScaler": lambda device: torch.amp.GradScaler(device, init_scale=2.0**12),
    "GradScaler, odd": lambda device: torch.amp.GradScaler(device, init_scale=3000.7),
    "GradScaler, disabled": lambda device: torch.amp.GradScaler(device, enabled=False),
}


@pytest.mark.parametrize("scale", SCALES)
@every_function
def test_a_scale_changes_nothing_in_fp64(place, function, scale):
    """What is multiplied in is divided out again, whoever names the factor: value, norms and weight gradients."""
    critic = mlp(torch.float64, place.device)
    samples = [torch.randn(5, 6, dtype=torch.float64, device=place.device) for _ in range(2)]
    wanted = run(reference, function, critic, *samples)
    grad_scale = SCALES[scale](place.device)
    ours = run(fused_gp, function, critic, *samples, backend=place.backend, grad_scale=grad_scale)
    for actual, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", [{"one_sided": True}, {"target": 0.0}, {"eps": 0.0, "reduction": "sum"}], ids=str)
def test_a_scale_changes_no_form(place, form):
    critic = mlp(torch.float64, place.device)
    with torch.no_grad():
        critic[0].weight.mul_(6)  # norms on both sides of the target
    samples = [torch.randn(5, 6, dtype=torch.float64, device=place.device) for _ in range(2)]
    wanted = run(reference, "fused", critic, *samples, **form)
    assert wanted[1].min() < 1 < wanted[1].max()
    for scale in (0.125, torch.tensor(1024.0, device=place.device)):
        ours = run(fused_gp, "fused", critic, *samples, backend=place.backend, grad_scale=scale, **form)
        for actual, expected in zip(ours, wanted, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scale", [None, 3000.7, "tensor"], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_function
def test_half_precision_critic(place, function, dtype, scale):
    """A critic with half-precision weights, against the oracle on the same critic without a scale."""
    critic = mlp(dtype, place.device)
    samples = on_grid(dtype, place.device)
    if function == "dragan":
        samples = [torch.full_like(x, 0.5) for x in samples]  # deviation 0, so that no noise is rounded
    wanted = run(reference, function, critic, *samples, **half_way(function))
    options = {"backend": place.backend, **half_way(function)}
    if scale is not None:
        options["grad_scale"] = torch.tensor(3000.7, device=place.device) if scale == "tensor" else scale
        options["loss_scale"] = 2.0**12
    ours = run(fused_gp, function, critic, *samples, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    # Without a scale the same critic runs on the same numbers. With one, its backward rounds at other places.
    value_step = 1e-6 if scale is None else STEP[dtype]
    torch.testing.assert_close(ours[1], wanted[1], rtol=value_step, atol=0)
    torch.testing.assert_close(ours[0], wanted[0], rtol=2 * value_step, atol=1e-6)
    assert_near_the_largest(ours[2:], wanted[2:], 3 * STEP[dtype])


def assert_near_the_largest(actual, truth, tolerance):
    """Gradients of several weights, within a part of the largest of them all."""
    largest = max(grad.abs().max().item() for grad in truth)
    for one, two in zip(actual, truth, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("kind", ["number", "tensor", "GradScaler"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("function", ["fused", "input_gradient"])
def test_a_scale_is_taken_out_as_it_was_put_in(place, function, dtype, kind):
    """Where the scores' dtype cannot hold the scale, what multiplied them is its rounded value; divided by the other
    one, every norm would be off by up to 2^-9 in bf16."""
    scale = {
        "number": 3001.3,
        "tensor": torch.tensor(3001.3, device=place.device),
        "GradScaler": torch.amp.GradScaler(place.device, init_scale=3001.3),
    }[kind]
    real, fake = on_grid(dtype, place.device)
    _, norms = FAMILY[function](
        fused_gp, lambda x: x.sum(1), real, fake, grad_scale=scale, backend=place.backend, return_norms=True
    )
    torch.testing.assert_close(norms, torch.full_like(norms, 6**0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", ["none", "GradScaler"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_function
def test_autocast(place, function, dtype, scale):
    """fp32 weights, a critic that computes in half precision: the oracle under the same autocast, with and without a
    GradScaler; the penalty is fp32."""
    critic = mlp(torch.float32, place.device)
    samples = on_grid(torch.float32, place.device)
    scaler = torch.amp.GradScaler(place.device, init_scale=2.0**8) if scale == "GradScaler" else None
    with torch.autocast(place.device, dtype):
        wanted = run(reference, function, critic, *samples, **half_way(function))
        options = {"backend": place.backend, "grad_scale": scaler, **half_way(function)}
        ours = run(fused_gp, function, critic, *samples, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    # A power of two moves exponents alone, and the same critic ran: values agree as fp32 does, but for DRAGAN's noise
    # and fp16's smallest numbers, which a scale saves.
    same = function != "dragan" and (scale == "none" or dtype == torch.bfloat16)
    rtol = 1e-5 if same else STEP[dtype]
    torch.testing.assert_close(ours[1], wanted[1], rtol=rtol, atol=0)
    torch.testing.assert_close(ours[0], wanted[0], rtol=2 * rtol, atol=1e-6)
    assert_near_the_largest(ours[2:], wanted[2:], 2 * STEP[dtype])


@pytest.mark.parametrize("scale", ["number", "tensor", "GradScaler"])
@every_function
def test_the_scale_saves_gradients_from_underflow(place, function, scale):
    """An fp16 critic whose input gradients, 1e-8, are below fp16's smallest number: norms of zero, and with a scale the
    right ones. So the factor is truly inside, before the gradient."""
    root = torch.tensor(1e-4, dtype=torch.float16, device=place.device)
    scale = {
        "number": 2.0**14,
        "tensor": torch.tensor(2.0**14, device=place.device),
        "GradScaler": torch.amp.GradScaler(place.device, init_scale=2.0**14),
    }[scale]
    samples = on_grid(torch.float16, place.device, 3, 4)
    options = {"backend": place.backend, "return_norms": True, **({} if function in ("r1", "r2") else {"eps": 0.0})}

    def critic(x):
        return (x * root).sum(1) * root

    _, lost = FAMILY[function](fused_gp, critic, *samples, **options)
    assert not lost.any()
    value, norms = FAMILY[function](fused_gp, critic, *samples, grad_scale=scale, **options)
    wanted = 2 * root.item() ** 2
    torch.testing.assert_close(norms, torch.full_like(norms, wanted), rtol=2e-3, atol=0)
    assert value.item() == pytest.approx(wanted**2 / 2 if function in ("r1", "r2") else 1, rel=4e-3)


@pytest.mark.parametrize("kind", ["tensor", "(1,)", "GradScaler"])
@every_function
def test_the_host_does_not_read_the_scale(monkeypatch, function, kind):
    """On a device each of these waits for all that was launched before. The interpreter reads everything, so torch."""
    critic = mlp(torch.float32, "cpu")
    samples = on_grid(torch.float32, "cpu")
    scale = {
        "tensor": torch.tensor(64.0),
        "(1,)": torch.tensor([64.0]),
        "GradScaler": torch.amp.GradScaler("cpu", init_scale=64.0),
    }[kind]

    def read(tensor, *_):
        raise AssertionError("a tensor was read by the host")

    for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__", "__format__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    value = FAMILY[function](fused_gp, critic, *samples, backend="torch", grad_scale=scale)
    grads = torch.autograd.grad(value, list(critic.parameters()), materialize_grads=True)
    monkeypatch.undo()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", ["tensor", "(1,)", "GradScaler"])
@every_function
def test_the_scale_may_change_before_the_backward(place, function, kind):
    """GradScaler.update() writes into its tensor. A forward has its own factor."""
    critic = mlp(torch.float32, place.device)
    samples = on_grid(torch.float32, place.device)
    options = {"backend": place.backend, **half_way(function)}
    wanted = run(fused_gp, function, critic, *samples, grad_scale=64.0, **options)
    shape = (1,) if kind == "(1,)" else ()
    scale = torch.full(shape, 64.0, device=place.device)
    if kind == "GradScaler":
        scaler = torch.amp.GradScaler(place.device, init_scale=64.0)
        scaler.scale(scale)  # makes its tensor
    torch.manual_seed(1)
    value = FAMILY[function](
        fused_gp, critic, *samples, grad_scale=scaler if kind == "GradScaler" else scale, **options
    )
    if kind == "GradScaler":
        scaler._scale.fill_(7.0)
        scaler.update(2.0)
        assert scaler.get_scale() == 2.0
    else:
        scale.fill_(2.0)
    grads = torch.autograd.grad(value, list(critic.parameters()), materialize_grads=True)
    for actual, expected in zip((value.detach(), *grads), (wanted[0], *wanted[2:]), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("form", [{}, {"one_sided": True}, {"eps": 0.0}, {"target": 0.0}], ids=str)
@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_a_broken_scale_is_not_masked(place, scale, form):
    """A tensor is not looked at, so a scale of zero or infinity shows in value, norms and gradients, where GradScaler
    finds it and skips the step."""
    critic = mlp(torch.float32, place.device)
    samples = on_grid(torch.float32, place.device)
    scale = torch.tensor(scale, device=place.device)
    ours = run(fused_gp, "fused", critic, *samples, backend=place.backend, grad_scale=scale, **form)
    assert not ours[0].isfinite()
    assert not ours[1].isfinite().any()
    assert not ours[2].isfinite().any()


WRONG = [
    (0, ValueError), (0.0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
    (True, TypeError), ("2", TypeError), (2j, TypeError), ([2.0], TypeError), (torch.tensor(2), TypeError),
    (torch.tensor(True), TypeError), (torch.tensor(2 + 0j), TypeError), (torch.ones(2), ValueError),
    (torch.ones(0), ValueError), (torch.ones((), device="meta"), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("scale", "error"), WRONG, ids=str)
@every_function
def test_wrong_scale(function, scale, error):
    """Named, before the critic runs."""
    real, fake = torch.randn(3, 6), torch.randn(3, 6)
    if function == "gradient_norm":
        with pytest.raises(error, match=r"^grad_scale must"):
            gradient_norm_penalty(real, grad_scale=scale)
        return
    runs = []

    def critic(x):
        runs.append(x)
        return x.square().sum(1)

    with pytest.raises(error, match=r"^grad_scale must"):
        FAMILY[function](fused_gp, critic, real, fake, grad_scale=scale)
    assert len(runs) == (function == "input_gradient")


@pytest.mark.parametrize("function", ["fused", "r1"])
def test_a_scale_that_has_grown_for_weeks(place, function):
    """GradScaler doubles while nothing overflows. kappa^2 leaves the range of fp32 long before the result does: then
    the penalty is right, or visibly not finite, but never a silent zero in the weights."""
    critic = mlp(torch.float32, place.device)
    samples = on_grid(torch.float32, place.device)
    options = {"backend": place.backend}
    for exponent in (60, 76, 90):
        scale = torch.tensor(2.0**exponent, device=place.device)
        torch.manual_seed(0)
        penalty = FAMILY[function](fused_gp, critic, *samples, grad_scale=scale, **options)
        (grad,) = torch.autograd.grad(penalty * scale, critic[0].weight)
        torch.manual_seed(0)
        plain = FAMILY[function](fused_gp, critic, *samples, **options)
        (plain_grad,) = torch.autograd.grad(plain, critic[0].weight)
        if penalty.isfinite():
            torch.testing.assert_close(penalty, plain)
            torch.testing.assert_close(grad / scale, plain_grad)
        else:
            assert place.backend == "torch"
            assert exponent > 60


def test_a_scale_that_is_learned_gets_no_gradient(place):
    """It is put in and taken out again: nothing depends on it."""
    critic = mlp(torch.float64, place.device)
    samples = on_grid(torch.float64, place.device)
    scale = torch.tensor(8.0, device=place.device, requires_grad=True)
    penalty = fused_gradient_penalty(critic, *samples, grad_scale=scale, backend=place.backend)
    assert torch.autograd.grad(penalty, scale, allow_unused=True) == (None,)


@pytest.mark.parametrize("scale", [1e100, 1e-100])
def test_a_number_that_no_fp32_scaler_could_hold(scale):
    """Scores are scaled by a number that every floating type holds; for gradients that came scaled, any will do."""
    samples = torch.randn(3, 6)
    with pytest.raises(ValueError, match="grad_scale must be a number that bf16 can hold, got 1e"):
        fused_gradient_penalty(torch.sum, samples, samples, grad_scale=scale)
    gradients = samples.double() * scale
    torch.testing.assert_close(
        gradient_norm_penalty(gradients, grad_scale=scale), gradient_norm_penalty(samples.double())
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("scale", [2.0**16, 1e6, 1e38])
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_scale_beyond_half_precision(place, kind, scale):
    """GradScaler begins at 2^16, more than fp16 holds: as where a loss is scaled, the result is not finite, whether a
    tensor or a number names it. It is no error: GradScaler halves such a scale."""
    critic = mlp(torch.float16, place.device)
    grad_scale = scale if kind == "number" else torch.tensor(scale, dtype=torch.float64, device=place.device)
    samples = on_grid(torch.float16, place.device)
    value = fused_gradient_penalty(critic, *samples, grad_scale=grad_scale, backend=place.backend)
    assert not value.isfinite()


def train(place, *, dtype, scaler, batches, weight=1.0, rate=1e-2):
    """A critic's loop as people write it; of each step: loss, whether it moved the weights, scale after it, norms."""
    torch.manual_seed(0)
    critic = mlp(torch.float32, place.device)
    optimizer = torch.optim.Adam(critic.parameters(), rate)
    steps = []
    for real, fake in batches:
        before = [p.detach().clone() for p in critic.parameters()]
        with torch.autocast(place.device, dtype):
            loss = critic(fake).mean() - critic(real).mean()
            penalty, norms = fused_gradient_penalty(
                critic, real, fake, weight=weight, grad_scale=scaler, backend=place.backend, return_norms=True
            )
        scaler.scale(loss.float() + penalty).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not p.equal(q) for p, q in zip(critic.parameters(), before, strict=True))
        steps.append(((loss + penalty).item(), moved, scaler.get_scale(), norms))
        assert all(p.isfinite().all() for p in critic.parameters())
    return critic, steps


def gan_batches(place, count, batch=8):
    draw = torch.Generator().manual_seed(2)
    for _ in range(count):
        real = torch.randn(batch, 6, generator=draw) * 0.5 + 1
        yield real.to(place.device), torch.randn(batch, 6, generator=draw).to(place.device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow under the interpreter
def test_training_recovers_from_a_scale_that_overflows(place):
    """A huge first scale: steps are skipped and it is halved until gradients are finite; then training goes on, and the
    norms are unscaled ones."""
    batches = list(gan_batches(place, 10))
    scaler = torch.amp.GradScaler(place.device, init_scale=2.0**19, growth_interval=50)
    _, steps = train(place, dtype=torch.float16, scaler=scaler, batches=batches)
    moved = [step[1] for step in steps]
    first = moved.index(True)
    assert first >= 3
    assert all(moved[first:])
    assert [step[2] for step in steps] == [2.0 ** (18 - min(k, first - 1)) for k in range(10)]
    assert all(abs(step[0]) < 5 for step in steps[first:])

    unscaled = torch.amp.GradScaler(place.device, enabled=False)
    _, still = train(place, dtype=torch.float16, scaler=unscaled, batches=batches, rate=0.0)
    torch.testing.assert_close(steps[first][3], still[first][3], rtol=2 * STEP[torch.float16], atol=0)
    assert steps[first][0] == pytest.approx(still[first][0], rel=1e-2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_bad_batch_is_skipped(place):
    """Values that overflow fp16 in the critic: that step alone is skipped, and growth after good ones goes on."""
    batches = list(gan_batches(place, 9))
    batches[3] = tuple(x * 1e6 for x in batches[3])
    scaler = torch.amp.GradScaler(place.device, init_scale=2.0**6, growth_interval=2)
    critic, steps = train(place, dtype=torch.float16, scaler=scaler, batches=batches)
    assert [step[1] for step in steps] == [True] * 3 + [False] + [True] * 5
    assert [step[2] for step in steps] == [2.0**k for k in (6, 7, 7, 6, 6, 7, 7, 8, 8)]
    losses = torch.tensor([step[0] for step in steps])
    assert losses.isfinite().tolist() == [True] * 3 + [False] + [True] * 5
    assert all(p.grad is None for p in critic.parameters())


def test_training_with_and_without_a_scaler(place):
    """Step for step the same losses, norms and weights in bf16, where a power of two costs no digit."""
    results = []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler(place.device, init_scale=2.0**10, growth_interval=3, enabled=enabled)
        critic, steps = train(place, dtype=torch.bfloat16, scaler=scaler, batches=gan_batches(place, 8), weight=10.0)
        assert all(step[1] for step in steps)
        results.append((critic, steps))
    assert results[1][1][-1][2] == 2.0**12
    for (loss, *_, norms), (wanted_loss, *_, wanted_norms) in zip(results[1][1], results[0][1], strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-3)
        torch.testing.assert_close(norms, wanted_norms, rtol=1e-3, atol=0)
    for actual, expected in zip(results[1][0].parameters(), results[0][0].parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-4)


def test_every_call_takes_the_scale_of_its_moment():
    """The same scaler through updates, and its copy in another process's checkpoint: always the unscaled penalty."""
    critic = mlp(torch.float64, "cpu")
    samples = [torch.randn(5, 6, dtype=torch.float64) for _ in range(2)]
    wanted = run(reference, "fused", critic, *samples)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
    for new_scale in (2.0**5, 2.0**-7, 2.0**20):
        scaler.scale(torch.ones(()))
        scaler.update(new_scale)
        loaded = torch.amp.GradScaler("cpu")
        loaded.load_state_dict(copy.deepcopy(scaler.state_dict()))
        for one in (scaler, loaded):
            for actual, expected in zip(run(fused_gp, "fused", critic, *samples, grad_scale=one), wanted, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
