"""Half precision and loss scales: a scale changes no result, except that it keeps fp16 gradients from underflow."""

import copy

import pytest
import torch

import fused_gp
from fused_gp import fused_gradient_penalty, gradient_norm_penalty, reference
from tests.support.critics import mlp
from tests.support.gradients import gradients
from tests.support.places import to_device
from tests.support.samples import quarters, vectors
from tests.support.tolerances import HALF_DTYPES, assert_near_the_largest, assert_same

pytestmark = pytest.mark.usefixtures("one_thread")


def of_outputs(module, critic, real, fake, **options):
    """`input_gradient_penalty` as users call it, after the critic ran."""
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


# Each with the same arguments, from the package or from its reference.
FAMILY = {
    "fused": lambda module, critic, real, fake, **options: module.fused_gradient_penalty(critic, real, fake, **options),
    "r1": lambda module, critic, real, fake, **options: module.r1_penalty(critic, real, **options),
    "r2": lambda module, critic, real, fake, **options: module.r2_penalty(critic, fake, **options),
    "dragan": lambda module, critic, real, fake, **options: module.dragan_penalty(critic, real, **options),
    "input_gradient": of_outputs,
    "gradient_norm": of_gradients,
}

every_function = pytest.mark.parametrize("function", FAMILY)


def results_of(module, function, critic, real, fake, *, loss_scale=1.0, **options):
    """Value, norms and weight gradients under one seed, with the loss scaled as GradScaler scales it."""
    torch.manual_seed(1)
    value, norms = FAMILY[function](module, critic, real, fake, return_norms=True, **options)
    grads = torch.autograd.grad(value * loss_scale, list(critic.parameters()), materialize_grads=True)
    return [value.detach(), norms, *(grad.to(norms.dtype) / loss_scale for grad in grads)]


def exact_alpha(function):
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
def test_a_scale_changes_no_result_in_fp64(place, function, scale):
    """The factor is divided out again, in whichever form it is given: value, norms and weight gradients."""
    critic = mlp().to(place.device, torch.float64)
    samples = to_device(vectors(), place.device)
    expected = results_of(reference, function, critic, *samples)
    grad_scale = SCALES[scale](place.device)
    ours = results_of(fused_gp, function, critic, *samples, backend=place.backend, grad_scale=grad_scale)
    assert_same(ours, expected, atol=1e-14)


@pytest.mark.parametrize("form", [{"one_sided": True}, {"target": 0.0}, {"eps": 0.0, "reduction": "sum"}], ids=str)
def test_a_scale_changes_no_result_of_other_forms(place, form):
    critic = mlp().to(place.device, torch.float64)
    with torch.no_grad():
        critic[0].weight.mul_(6)  # norms on both sides of the target
    samples = to_device(vectors(), place.device)
    form = form | {"alpha": torch.rand(5).to(place.device)}  # which every device would draw otherwise
    expected = results_of(reference, "fused", critic, *samples, **form)
    assert expected[1].min() < 1 < expected[1].max()
    for scale in (0.125, torch.tensor(1024.0, device=place.device)):
        ours = results_of(fused_gp, "fused", critic, *samples, backend=place.backend, grad_scale=scale, **form)
        assert_same(ours, expected, atol=1e-14)


@pytest.mark.parametrize("scale", [None, 3000.7, "tensor"], ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@every_function
def test_half_precision_critic(place, function, dtype, scale):
    """A critic with half-precision weights, compared with the reference on the same critic without a scale."""
    critic = mlp().to(place.device, dtype)
    samples = quarters((5, 6), dtype, place.device)
    if function == "dragan":
        samples = [torch.full_like(x, 0.5) for x in samples]  # their deviation is 0, so there is no noise to round
    expected = results_of(reference, function, critic, *samples, **exact_alpha(function))
    options = {"backend": place.backend, **exact_alpha(function)}
    if scale is not None:
        options["grad_scale"] = torch.tensor(3000.7, device=place.device) if scale == "tensor" else scale
        options["loss_scale"] = 2.0**12
    ours = results_of(fused_gp, function, critic, *samples, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    # Without a scale the same critic runs on the same numbers. With one, its backward rounds other numbers, three times
    # on the way to the samples (last layer, activation, first layer), in either run by up to half an eps.
    value_step = 1e-6 if scale is None else 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours[1], expected[1], rtol=value_step, atol=0)
    torch.testing.assert_close(ours[0], expected[0], rtol=2 * value_step, atol=1e-6)
    assert_near_the_largest(ours[2:], expected[2:], 3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["number", "tensor", "GradScaler"])
@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("function", ["fused", "input_gradient"])
def test_the_rounded_scale_is_divided_out(place, function, dtype, kind):
    """Where the dtype of the scores cannot hold the scale, they are multiplied by its rounded value; divided by the
    other one, every norm would have an error of up to 2^-9 in bf16."""
    scale = {
        "number": 3001.3,
        "tensor": torch.tensor(3001.3, device=place.device),
        "GradScaler": torch.amp.GradScaler(place.device, init_scale=3001.3),
    }[kind]
    real, fake = quarters((5, 6), dtype, place.device)
    _, norms = FAMILY[function](
        fused_gp, lambda x: x.sum(1), real, fake, grad_scale=scale, backend=place.backend, return_norms=True
    )
    torch.testing.assert_close(norms, torch.full_like(norms, 6**0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", ["none", "GradScaler"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@every_function
def test_autocast_with_and_without_a_scale(place, function, dtype, scale):
    """fp32 weights, a critic that computes in half precision, compared with the reference under the same autocast; the
    penalty is fp32."""
    critic = mlp().to(place.device)
    samples = quarters((5, 6), torch.float32, place.device)
    scaler = torch.amp.GradScaler(place.device, init_scale=2.0**8) if scale == "GradScaler" else None
    with torch.autocast(place.device, dtype):
        expected = results_of(reference, function, critic, *samples, **exact_alpha(function))
        options = {"backend": place.backend, "grad_scale": scaler, **exact_alpha(function)}
        ours = results_of(fused_gp, function, critic, *samples, **options)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    # A power of two changes exponents alone, and the same critic ran: values agree to fp32, except for DRAGAN's noise
    # and for fp16 numbers that underflow without a scale.
    same = function != "dragan" and (scale == "none" or dtype == torch.bfloat16)
    rtol = 1e-5 if same else torch.finfo(dtype).eps
    torch.testing.assert_close(ours[1], expected[1], rtol=rtol, atol=0)
    torch.testing.assert_close(ours[0], expected[0], rtol=2 * rtol, atol=1e-6)
    assert_near_the_largest(ours[2:], expected[2:], 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scale", ["number", "tensor", "GradScaler"])
@every_function
def test_a_scale_keeps_gradients_from_underflow(place, function, scale):
    """An fp16 critic whose input gradients, 1e-8, are below fp16's smallest number: norms of zero, and with a scale the
    right ones. So the factor is applied before the gradient is taken."""
    root = torch.tensor(1e-4, dtype=torch.float16, device=place.device)
    scale = {
        "number": 2.0**14,
        "tensor": torch.tensor(2.0**14, device=place.device),
        "GradScaler": torch.amp.GradScaler(place.device, init_scale=2.0**14),
    }[scale]
    samples = quarters((3, 4), torch.float16, place.device)
    options = {"backend": place.backend, "return_norms": True, **({} if function in ("r1", "r2") else {"eps": 0.0})}

    def critic(x):
        return (x * root).sum(1) * root

    _, underflowed = FAMILY[function](fused_gp, critic, *samples, **options)
    assert not underflowed.any()
    value, norms = FAMILY[function](fused_gp, critic, *samples, grad_scale=scale, **options)
    expected = 2 * root.item() ** 2
    torch.testing.assert_close(norms, torch.full_like(norms, expected), rtol=2e-3, atol=0)
    assert value.item() == pytest.approx(expected**2 / 2 if function in ("r1", "r2") else 1, rel=4e-3)


@pytest.mark.parametrize("kind", ["tensor", "(1,)", "GradScaler"])
@every_function
def test_the_host_does_not_read_the_scale(monkeypatch, function, kind):
    """On a device each of these reads synchronises. Only with plain torch, since the interpreter reads all tensors."""
    critic = mlp()
    samples = quarters((5, 6), torch.float32, "cpu")
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
    grads = gradients(value, critic.parameters())
    monkeypatch.undo()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", ["tensor", "(1,)", "GradScaler"])
@every_function
def test_the_scale_is_that_of_the_call(place, function, kind):
    """GradScaler.update() writes into its tensor before the backward."""
    critic = mlp().to(place.device)
    samples = quarters((5, 6), torch.float32, place.device)
    options = {"backend": place.backend, **exact_alpha(function)}
    expected = results_of(fused_gp, function, critic, *samples, grad_scale=64.0, **options)
    shape = (1,) if kind == "(1,)" else ()
    scale = torch.full(shape, 64.0, device=place.device)
    if kind == "GradScaler":
        scaler = torch.amp.GradScaler(place.device, init_scale=64.0)
        scaler.scale(scale)  # creates its tensor
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
    grads = gradients(value, critic.parameters())
    torch.testing.assert_close((value.detach(), *grads), (expected[0], *expected[2:]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("form", [{}, {"one_sided": True}, {"eps": 0.0}, {"target": 0.0}], ids=str)
@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_a_scale_that_is_not_finite_or_zero_shows_in_the_results(place, scale, form):
    """The value of a tensor is not checked, so value, norms and gradients are not finite, and GradScaler skips the
    step."""
    critic = mlp().to(place.device)
    samples = quarters((5, 6), torch.float32, place.device)
    scale = torch.tensor(scale, device=place.device)
    ours = results_of(fused_gp, "fused", critic, *samples, backend=place.backend, grad_scale=scale, **form)
    assert not ours[0].isfinite()
    assert not ours[1].isfinite().any()
    assert not ours[2].isfinite().any()


WRONG_SCALES = [
    (0, ValueError), (0.0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
    (True, TypeError), ("2", TypeError), (2j, TypeError), ([2.0], TypeError), (torch.tensor(2), TypeError),
    (torch.tensor(True), TypeError), (torch.tensor(2 + 0j), TypeError), (torch.ones(2), ValueError),
    (torch.ones(0), ValueError), (torch.ones((), device="meta"), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("scale", "error"), WRONG_SCALES, ids=str)
@every_function
def test_wrong_scales_are_refused(function, scale, error):
    """By name, before the critic runs."""
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
def test_a_huge_scale_gives_the_result_or_no_finite_one(place, function):
    """GradScaler doubles while nothing overflows. kappa^2 overflows fp32 long before the result does: then the penalty
    is right, or not finite, but never zero in the weights' gradients."""
    critic = mlp().to(place.device)
    samples = quarters((5, 6), torch.float32, place.device)
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


def test_a_scale_that_requires_grad_gets_no_gradient(place):
    """It is multiplied in and divided out: no result depends on it."""
    critic = mlp().to(place.device, torch.float64)
    samples = quarters((5, 6), torch.float64, place.device)
    scale = torch.tensor(8.0, device=place.device, requires_grad=True)
    penalty = fused_gradient_penalty(critic, *samples, grad_scale=scale, backend=place.backend)
    assert torch.autograd.grad(penalty, scale, allow_unused=True) == (None,)


@pytest.mark.parametrize("scale", [1e100, 1e-100])
def test_numbers_beyond_bf16_are_refused_for_critics_alone(scale):
    """Scores are scaled by a number that every floating dtype can hold; for gradients that were scaled by the caller,
    any number will do."""
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
def test_a_scale_beyond_fp16_gives_no_finite_result(place, kind, scale):
    """GradScaler begins at 2^16, more than fp16 can hold: the result is not finite, as when a loss is scaled, for a
    number and for a tensor. It is no error: GradScaler halves such a scale."""
    critic = mlp().to(place.device, torch.float16)
    grad_scale = scale if kind == "number" else torch.tensor(scale, dtype=torch.float64, device=place.device)
    samples = quarters((5, 6), torch.float16, place.device)
    value = fused_gradient_penalty(critic, *samples, grad_scale=grad_scale, backend=place.backend)
    assert not value.isfinite()


def train(place, *, dtype, scaler, batches, weight=1.0, rate=1e-2):
    """A usual training loop of a critic; of each step: loss, whether the weights changed, the scale afterwards,
    norms."""
    torch.manual_seed(0)
    critic = mlp().to(place.device)
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
    """With a huge initial scale, steps are skipped and it is halved until gradients are finite; then training goes on,
    and norms are unscaled."""
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
    _, untrained_steps = train(place, dtype=torch.float16, scaler=unscaled, batches=batches, rate=0.0)
    torch.testing.assert_close(
        steps[first][3], untrained_steps[first][3], rtol=2 * torch.finfo(torch.float16).eps, atol=0
    )
    assert steps[first][0] == pytest.approx(untrained_steps[first][0], rel=1e-2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_batch_that_overflows_is_skipped(place):
    """Values that overflow fp16 in the critic: that step alone is skipped, and the scale grows again after good
    ones."""
    batches = list(gan_batches(place, 9))
    batches[3] = tuple(x * 1e6 for x in batches[3])
    scaler = torch.amp.GradScaler(place.device, init_scale=2.0**6, growth_interval=2)
    critic, steps = train(place, dtype=torch.float16, scaler=scaler, batches=batches)
    assert [step[1] for step in steps] == [True] * 3 + [False] + [True] * 5
    assert [step[2] for step in steps] == [2.0**k for k in (6, 7, 7, 6, 6, 7, 7, 8, 8)]
    losses = torch.tensor([step[0] for step in steps])
    assert losses.isfinite().tolist() == [True] * 3 + [False] + [True] * 5
    assert all(p.grad is None for p in critic.parameters())


def test_training_in_bf16_is_the_same_with_a_scaler(place):
    """The same losses, norms and weights, step by step: a power of two changes no digit of bf16."""
    results = []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler(place.device, init_scale=2.0**10, growth_interval=3, enabled=enabled)
        critic, steps = train(place, dtype=torch.bfloat16, scaler=scaler, batches=gan_batches(place, 8), weight=10.0)
        assert all(step[1] for step in steps)
        results.append((critic, steps))
    assert results[1][1][-1][2] == 2.0**12
    for (loss, *_, norms), (expected_loss, *_, expected_norms) in zip(results[1][1], results[0][1], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-3)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-3, atol=0)
    for actual, expected in zip(results[1][0].parameters(), results[0][0].parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-4)


def test_every_call_takes_the_scalers_present_scale():
    """After updates, and after loading its state from a checkpoint."""
    critic = mlp().double()
    samples = vectors()
    expected = results_of(reference, "fused", critic, *samples)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
    for new_scale in (2.0**5, 2.0**-7, 2.0**20):
        scaler.scale(torch.ones(()))
        scaler.update(new_scale)
        loaded = torch.amp.GradScaler("cpu")
        loaded.load_state_dict(copy.deepcopy(scaler.state_dict()))
        for one in (scaler, loaded):
            ours = results_of(fused_gp, "fused", critic, *samples, grad_scale=one)
            assert_same(ours, expected, atol=1e-14)
