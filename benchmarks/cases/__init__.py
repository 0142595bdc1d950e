"""The suites: modules, each with `cases(device)`, in the order in which they are listed.

A new suite is also named in `results.FILES`, and in `tables.OF_SUITE` of the report.
"""

from types import ModuleType

from . import experiments, host, methods, ops, penalties, systems, training

SUITES: dict[str, ModuleType] = {
    "ops": ops, "penalties": penalties, "training": training, "methods": methods, "systems": systems, "host": host,
    "experiments": experiments,
}  # fmt: skip
