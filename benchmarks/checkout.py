"""The kernels of a checkout that is not installed, as on a machine with a device and no network.

Also a plugin of pytest (`-p benchmarks.checkout`), which its parallel processes load as well.
"""

from importlib.util import find_spec
from pathlib import Path

import fused_gp

ROOT = Path(__file__).parents[1]


def find_kernels() -> None:
    """Installed, they are a part of the package; in the checkout they are a folder beside it."""
    if find_spec("fused_gp.kernels") is None:
        fused_gp.__path__.append(str(ROOT))


def pytest_configure() -> None:
    find_kernels()
