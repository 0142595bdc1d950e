"""The suites, in the order in which they are listed."""

from . import host, methods, ops, penalties, systems, training
from .case import Suite

SUITES: dict[str, Suite] = {
    "ops": ops.SUITE,
    "penalties": penalties.SUITE,
    "training": training.SUITE,
    "methods": methods.SUITE,
    "systems": systems.SUITE,
    "host": host.SUITE,
}
