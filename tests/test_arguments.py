"""Wrong arguments: before the critic runs, an error names the argument, its value and what is allowed."""

import numpy as np
import pytest
import torch

from fused_gp import fused_gradient_penalty, gradient_norm_penalty, interpolate, r1_penalty
from tests.support.critics import mlp, unused_critic
from tests.support.messages import exactly
from tests.support.samples import fp32_vectors

GOOD = torch.randn(4, 3)


def critic(x):
    return x.square().sum(1)


WRONG_SAMPLES = [
    ([1.0, 2.0], TypeError, r"{}\[0\] must be a torch.Tensor, got float"),
    ({"image": GOOD, "mask": None}, TypeError, r"{}\['mask'\] must be a torch.Tensor, got NoneType"),
    (None, TypeError, "{} must be a torch.Tensor, or a tuple, list or dict of them, got NoneType"),
    ((), ValueError, "{} must hold at least one tensor, got an empty tuple"),
    ((GOOD, GOOD.int()), TypeError, r"{}\[1\] must be fp16, bf16, fp32 or fp64, got torch.int32"),
    (
        (GOOD, GOOD[:3]),
        ValueError,
        r"{0} must hold tensors of one batch size on one device, got shape \(4, 3\) on cpu and, as {0}\[1\], shape",
    ),
    ((GOOD, GOOD.to("meta")), ValueError, "{} must hold tensors of one batch size on one device, got"),
    (torch.ones(4, 3, dtype=torch.int64), TypeError, "{} must be fp16, bf16, fp32 or fp64, got torch.int64"),
    (torch.ones(4, 3, dtype=torch.bool), TypeError, "{} must be fp16, bf16, fp32 or fp64, got torch.bool"),
    (torch.ones(4, 3, dtype=torch.complex64), TypeError, "{} must be fp16, bf16, fp32 or fp64, got torch.complex64"),
    (torch.eye(3).to_sparse(), TypeError, "{} must be a dense tensor, got layout torch.sparse_coo"),
    (torch.tensor(1.0), ValueError, r"{} must have the batch as its first dimension, got a tensor of shape \(\)"),
    (torch.ones(0, 3), ValueError, r"{} must hold at least one sample of at least one element, got shape \(0, 3\)"),
    (torch.ones(3, 0), ValueError, r"{} must hold at least one sample of at least one element, got shape \(3, 0\)"),
]


@pytest.mark.parametrize(("value", "error", "message"), WRONG_SAMPLES)
def test_wrong_samples(value, error, message):
    for call, name in (
        (lambda: fused_gradient_penalty(unused_critic, value, GOOD), "real"),
        (lambda: fused_gradient_penalty(unused_critic, GOOD, value), "fake"),
        (lambda: interpolate(value, GOOD, 0.5), "real"),
        (lambda: interpolate(GOOD, value, 0.5), "fake"),
        (lambda: gradient_norm_penalty(value), "gradients"),
    ):
        with pytest.raises(error, match=message.format(name)):
            call()


@pytest.mark.parametrize(
    ("fake", "error", "message"),
    [
        (torch.randn(4, 2), ValueError, r"one shape, got shape \(4, 3\) and shape \(4, 2\)"),
        (torch.randn(1, 3), ValueError, r"one shape, got shape \(4, 3\) and shape \(1, 3\)"),
        (torch.randn(3), ValueError, r"one shape, got shape \(4, 3\) and shape \(3,\)"),
        (torch.randn(4, 3).half(), TypeError, "one dtype, got torch.float32 and torch.float16"),
        (torch.randn(4, 3, device="meta"), ValueError, "one device, got cpu and meta"),
    ],
)
def test_real_and_fake_must_be_alike(fake, error, message):
    for call in (lambda: fused_gradient_penalty(unused_critic, GOOD, fake), lambda: interpolate(GOOD, fake, 0.5)):
        with pytest.raises(error, match="real and fake must .*" + message):
            call()


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (10, ValueError, r"alpha, the position between real \(0\) and fake \(1\), must be in .*, got 10.*`weight`"),
        (-0.1, ValueError, r"alpha.* must be in \[0, 1\], got -0.1"),
        (float("nan"), ValueError, "alpha must be a finite number, got nan"),
        ("half", TypeError, "alpha must be a number, got str"),
        (True, TypeError, "alpha must be a number, got bool"),
        (torch.rand(4, 3), ValueError, r"alpha must be one number per sample.*got shape \(4, 3\)"),
        (torch.rand(1), ValueError, r"alpha must be one number per sample.*got shape \(1,\)"),
        (torch.rand(1, 1), ValueError, r"alpha must be one number per sample.*got shape \(1, 1\)"),
        (torch.rand(1, 4), ValueError, r"alpha must be one number per sample.*got shape \(1, 4\)"),
        (torch.rand(2), ValueError, r"alpha must be one number per sample.*got shape \(2,\)"),
        (torch.ones(4, dtype=torch.int64), TypeError, "alpha must be a floating tensor, got torch.int64"),
        (torch.rand(4, device="meta"), ValueError, "alpha must be on the device of real, cpu, got meta"),
    ],
)
def test_wrong_alpha(alpha, error, message):
    for call in (
        lambda: fused_gradient_penalty(unused_critic, GOOD, GOOD, alpha=alpha),
        lambda: interpolate(GOOD, GOOD, alpha),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": -1.0}, ValueError, "target must be a finite number >= 0, got -1.0"),
        ({"target": float("nan")}, ValueError, "target must be a finite number >= 0, got nan"),
        ({"target": torch.tensor(1.0)}, TypeError, "target must be a number, got Tensor"),
        ({"eps": -1e-12}, ValueError, "eps must be a finite number >= 0, got -1e-12"),
        ({"weight": 10**400}, ValueError, "weight must be a finite number, got 1000"),
        ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
        ({"weight": "10"}, TypeError, "weight must be a number, got str"),
        ({"weight": float("inf")}, ValueError, "weight must be a finite number, got inf"),
        ({"weight": True}, TypeError, "weight must be a number, got bool"),
        ({"one_sided": 1}, TypeError, "one_sided must be True or False, got 1"),
        ({"one_sided": "no"}, TypeError, "one_sided must be True or False, got 'no'"),
        ({"return_norms": None}, TypeError, "return_norms must be True or False, got None"),
        ({"reduction": "avg"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
        ({"reduction": None}, ValueError, "reduction must be 'mean', 'sum' or 'none', got None"),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'triton' or 'torch', got 'cuda'"),
    ],
)
def test_wrong_options(options, error, message):
    for call in (
        lambda: fused_gradient_penalty(unused_critic, GOOD, GOOD, **options),
        lambda: gradient_norm_penalty(GOOD, **options),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grad_scale": 0.0}, ValueError, "grad_scale must be a finite number > 0, got 0.0"),
        ({"grad_scale": float("inf")}, ValueError, "grad_scale must be a finite number > 0, got inf"),
        ({"squared": 1}, TypeError, "squared must be True or False, got 1"),
    ],
)
def test_wrong_options_of_the_op(options, error, message):
    with pytest.raises(error, match=message):
        gradient_norm_penalty(GOOD, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"critic_args": GOOD}, TypeError, "critic_args must be a tuple or list of arguments, got Tensor"),
        ({"critic_args": "labels"}, TypeError, "critic_args must be a tuple or list of arguments, got str"),
        ({"critic_kwargs": [1]}, TypeError, "critic_kwargs must be a dict of arguments, got list"),
        ({"generator": 5}, TypeError, "generator must be a torch.Generator, got int"),
        ({"generator": torch.Generator(), "alpha": 0.5}, ValueError, "got both alpha and generator"),
    ],
)
def test_wrong_options_of_the_penalty(options, error, message):
    with pytest.raises(error, match=message):
        fused_gradient_penalty(unused_critic, GOOD, GOOD, **options)


def test_a_generator_of_another_device_is_refused():
    real = torch.randn(4, 3, device="meta")
    with pytest.raises(ValueError, match="generator must be on the device of real, meta, got cpu"):
        fused_gradient_penalty(unused_critic, real, real, generator=torch.Generator())


@pytest.mark.parametrize(
    ("critic", "error", "message"),
    [
        (None, TypeError, "critic must be callable, got NoneType"),
        (GOOD, TypeError, "critic must be callable, got Tensor"),
        (lambda x: (x, x), TypeError, r"got a tuple of 2: wrap it to pick one, lambda x: critic\(x\)\[0\]"),
        (lambda x: [x], TypeError, "got a list of 1: wrap it"),
        (lambda x: {"scores": x}, TypeError, r"got a dict with \['scores'\]: wrap it"),
        (lambda x: 1.0, TypeError, "critic must return one tensor of scores, got float"),
        (lambda x: (x * 1).to_sparse(), TypeError, "critic must return a dense tensor of scores, got layout"),
        (lambda x: x > 0, TypeError, "critic must return floating scores, got torch.bool"),
        (lambda x: torch.complex(x, x), TypeError, "critic must return floating scores, got torch.complex64"),
        (lambda x: x.mean(), ValueError, r"at least one score per sample or group, got shape \(\) for 4 of"),
        (lambda x: x.mean(0), ValueError, r"at least one score per sample or group, got shape \(3,\) for 4 of"),
        (lambda x: x.detach().sum(1), ValueError, "scores that depend on the samples it is given, got scores that do"),
        (lambda x: torch.ones(4), ValueError, "scores that depend on the samples it is given, got scores that do not"),
        (
            lambda x: torch.ones(4, requires_grad=True) * 2,
            ValueError,
            "scores that depend on the samples it is given, got scores that do not",
        ),
    ],
)
def test_wrong_critics(critic, error, message):
    with pytest.raises(error, match=message):
        fused_gradient_penalty(critic, GOOD, GOOD + 1)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match="gradients must be a dense tensor, got"):
        gradient_norm_penalty(nested)


def test_numpy_numbers_are_numbers():
    for weight in (np.float32(10), np.float64(10), np.int64(10)):
        assert gradient_norm_penalty(GOOD, weight=weight).equal(gradient_norm_penalty(GOOD, weight=10.0))


def test_numpy_integers_are_integers():
    penalty = fused_gradient_penalty(critic, GOOD, GOOD + 1, alpha=0.5, group_size=np.int64(2))
    assert penalty.equal(fused_gradient_penalty(critic, GOOD, GOOD + 1, alpha=0.5, group_size=2))


def test_one_sample_may_have_one_scalar_score():
    penalty = fused_gradient_penalty(lambda x: x.square().sum(), GOOD[:1], GOOD[1:2])
    assert penalty.isfinite()


WRONG_OPTIONS_OF_METHODS = {
    "method": ({"method": "exact"}, ValueError,
               "method must be one of 'double_backward', 'compiled', 'directional', 'auto', got 'exact'"),
    "step of another": ({"step": 0.1}, ValueError,
                        "step is an option of method='directional', got method='double_backward'"),
    "step": ({"method": "directional", "step": 0.0}, ValueError, "step must be a finite number > 0, got 0.0"),
    "step's type": ({"method": "directional", "step": "1"}, TypeError, "step must be a number, got str"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    "chunk_size's type": ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int, got float"),
    "allow_kinks": ({"allow_kinks": 1}, TypeError, "allow_kinks must be True or False, got 1"),
    "return_error": ({"return_error": None}, TypeError, "return_error must be True or False, got None"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_OPTIONS_OF_METHODS)
def test_wrong_options_of_methods(name):
    options, error, message = WRONG_OPTIONS_OF_METHODS[name]
    with pytest.raises(error, match=exactly(message)):
        fused_gradient_penalty(mlp(), *fp32_vectors(), **options)
    with pytest.raises(error, match=exactly(message)):
        r1_penalty(mlp(), fp32_vectors()[0], **options)
