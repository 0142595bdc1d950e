"""The suites: modules, each with `cases(device)`, in the order in which they are listed."""

from types import ModuleType

from . import host, methods, ops, penalties, systems, training

SUITES: dict[str, ModuleType] = {
    "ops": ops, "penalties": penalties, "training": training, "methods": methods, "systems": systems, "host": host,
}  # fmt: skip
