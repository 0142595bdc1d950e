"""What compiled kernels do on a null device, recorded once for all tests."""

import json

import pytest

from tests.support.processes import python_compiled


@pytest.fixture(scope="session")
def recorded():
    """The output of the worker: in this process the kernels are interpreted, so they are compiled in another one."""
    return json.loads(python_compiled("-m", "tests.support.kernels.null_device_worker"))
