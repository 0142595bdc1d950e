"""What a test that fails on a device tells: enough to find the cause where there is no device."""

from types import SimpleNamespace

import pytest
import torch

from fused_gp import gradient_norm_penalty
from tests import conftest
from tests.device.test_sizes import assert_all_are
from tests.support.kernels.on_device import assert_equal_bits
from tests.support.tolerances import assert_near, assert_same

launches = pytest.importorskip("tests.support.kernels.launches", reason="Triton is not installed")


def failure_of(check, *arguments):
    with pytest.raises(AssertionError) as caught:
        check(*arguments)
    return str(caught.value)


def test_values_out_of_tolerance():
    """Which row of the table, how far, how many, where, and the numbers there."""
    expected = torch.linspace(1, 2, 12, dtype=torch.float64).reshape(3, 4)
    actual = expected.half()
    actual[1, 2], actual[2, 0] = 1.5, 7.0
    message = failure_of(assert_near, actual, expected, torch.float16, 2)
    assert "order 2 by the row torch.float16 of the table: error 5.27, the largest element being 2" in message
    assert "2 of 12 elements of torch.float16 (3, 4)" in message
    assert "(1, 2): 1.5, expected 1.5454545454545454" in message
    assert "(2, 0): 7.0, expected 1.7272727272727273" in message


def test_values_finite_at_other_places():
    expected = torch.ones(3, dtype=torch.float64)
    message = failure_of(assert_near, torch.tensor([1.0, torch.nan, 1.0]), expected, torch.float32, 0)
    assert "finite at other places: 1 of 3 elements of torch.float32 (3,)" in message
    assert "(1,): nan, expected 1.0" in message


def test_one_of_several_tensors():
    one, two = torch.ones(2, 2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    message = failure_of(assert_same, (one, two), (one, two + 0.25))
    assert "tensor 1: " in message
    assert "1 of 1 elements of torch.float64 ()\n    (): 0.5, expected 0.75" in message


def test_bits():
    """NaN, which unwritten memory holds, is never the same."""
    expected = [torch.tensor(1.0), torch.ones(2)]
    message = failure_of(assert_equal_bits, [torch.tensor(1.0), torch.tensor([1.0, torch.nan])], expected)
    assert "norms: 1 of 2 elements of torch.float32 (2,)" in message
    assert "(1,): nan, expected 1.0" in message


@pytest.mark.parametrize("shape", [(2, 500), (500, 2)], ids=str)
def test_a_part_that_is_one_number(shape):
    part = torch.full(shape, 2.0, dtype=torch.float16)
    assert_all_are("x_hat", part, 2.0)
    part[1, 1] = 3.0
    message = failure_of(assert_all_are, "x_hat", part, 2.0)
    assert f"x_hat, {shape} by {part.stride()}: from 2.0 to 3.0, expected 2.0 everywhere" in message
    assert "1 are not among the 1000 from 0 on, the first 3.0 at [1, 1]" in message


def test_the_last_launches():
    """With programs, layouts and settings."""
    last = launches.LastLaunches(most=2)
    with last.recorded():
        gradients = torch.randn(3, 5, requires_grad=True)
        gradient_norm_penalty(gradients, backend="triton")
        gradient_norm_penalty(gradients, one_sided=True, backend="triton").backward()
    gradient_norm_penalty(gradients, backend="triton")  # not recorded
    head, forward, backward = str(last).splitlines()
    assert head.endswith("the last 2 of 3 launches:")
    assert forward.startswith("reduce_rows_kernel, 1 programs: gradients=float32 (3, 5) by (5, 1), cotangents=None, ")
    assert "rows=3, width=5, tiles=1, " in forward
    assert "ONE_SIDED=True, SQUARED=False, LAST=True, REDUCE=True" in forward
    assert backward.startswith("scale_rows_kernel, 1 programs: ")


@pytest.mark.parametrize("failed", [True, False])
def test_the_report_of_a_failure_on_a_device_has_them(failed):
    item = SimpleNamespace(stash=pytest.Stash())
    item.stash[conftest.LAUNCHES] = launches.LastLaunches()
    report = SimpleNamespace(failed=failed, sections=[])
    hook = conftest.pytest_runtest_makereport(item, None)
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert [title for title, text in report.sections if "the last 0 of 0 launches" in text] == (
        ["kernels launched"] if failed else []
    )
