"""Which backend a tensor gets: by its device, by name, or an error that says what to use."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fused_gp import fused_gradient_penalty, gradient_norm_penalty, reference
from fused_gp.ops import backends, torch_ops
from tests.support.processes import python_compiled


def test_triton_on_cpu_tensors_without_the_interpreter_is_refused():
    """Run in a process of its own: in this one the kernels are interpreted."""
    code = (
        "import torch, fused_gp\n"
        "try: fused_gp.gradient_norm_penalty(torch.ones(2, 2), backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    output = python_compiled("-c", code)
    assert "backend='triton' cannot run on cpu tensors: use backend='auto' or 'torch'" in output
    assert "TRITON_INTERPRET=1" in output


@pytest.mark.parametrize("kind", ["cpu", "mps", "meta", "hpu", "mtia", "privateuseone"])
def test_other_devices_take_plain_torch(kind):
    """They have no kernels, and backend='triton' is an error."""
    tensor = SimpleNamespace(device=torch.device(kind), is_cpu=kind == "cpu")
    assert backends.backend_for("auto", tensor) is torch_ops
    if kind != "cpu":
        with pytest.raises(ValueError, match=f"backend='triton' cannot run on {kind} tensors"):
            backends.backend_for("triton", tensor)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])  # ROCm's tensors are of type "cuda"
def test_triton_devices_take_the_kernels(monkeypatch, kind):
    """Where Triton is installed; without it, plain torch."""
    kernels = pytest.importorskip("fused_gp.kernels", reason="Triton is not installed")
    tensor = SimpleNamespace(device=torch.device(kind), is_cpu=False)
    assert backends.backend_for("auto", tensor) is kernels
    assert backends.backend_for("triton", tensor) is kernels
    assert backends.backend_for("torch", tensor) is torch_ops
    monkeypatch.setattr(backends, "triton_installed", lambda: False)
    assert backends.backend_for("auto", tensor) is torch_ops


def test_fake_tensors_of_a_device_get_no_kernels():
    """A kernel would be launched on the address zero, and fake counters kept for later launches."""
    with FakeTensorMode() as mode:
        fake = torch.randn(4, 6)
        with pytest.raises(ValueError, match="backend='triton' cannot run on a FakeTensor"):
            gradient_norm_penalty(fake, backend="triton")
    on_device = FakeTensor(mode, torch.empty(4, 6, device="meta"), torch.device("cuda", 0))
    assert backends.backend_for("auto", on_device) is torch_ops


def test_a_default_device_changes_no_later_call(place):
    """Cached constants, and the number of grad_scale, are not on the default device."""
    x = torch.randn(4, 6, device=place.device)
    options = {"weight": 11.25, "eps": 0.015, "backend": place.backend}
    with torch.device("meta"):
        inside = gradient_norm_penalty(x, **options)
        fused_gradient_penalty(lambda x: x.square().sum(1), x, x, alpha=0.5, grad_scale=8.0, backend=place.backend)
    torch.testing.assert_close(inside, reference.gradient_norm_penalty(x, weight=11.25, eps=0.015))
    assert gradient_norm_penalty(x, **options).equal(inside)


def test_fake_tensors_change_no_later_call():
    """FakeTensorMode, as used for estimates of memory, and then a real call with the same options."""
    options = {"weight": 7.125, "eps": 0.03125}
    with FakeTensorMode():
        gradient_norm_penalty(torch.randn(4, 6), **options)
    x = torch.randn(4, 6)
    torch.testing.assert_close(gradient_norm_penalty(x, **options), reference.gradient_norm_penalty(x, **options))
