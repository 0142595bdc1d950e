"""Dependencies between the modules of the package run downwards only, as their imports show, import_module included."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from typing import NamedTuple

import pytest

from tests.support.processes import ROOT

# From top to bottom. A folder's name stands for all modules in it. A module may import from its own layer and from
# layers below.
LAYERS = [
    {"fused_gp.__main__", "fused_gp.inspection"},
    {"fused_gp"},
    {"fused_gp.module"},
    {"fused_gp.penalties"},
    {"fused_gp.methods"},
    {"fused_gp.critics"},
    {"fused_gp.derivatives"},
    {"fused_gp.ops"},
    {"fused_gp.kernels"},
    {"fused_gp.reference"},
    {"fused_gp.arguments"},
    {"fused_gp.form"},
]
FOLDERS = {"fused_gp.methods", "fused_gp.critics", "fused_gp.derivatives", "fused_gp.ops", "fused_gp.kernels"}


class Module(NamedTuple):
    package: str  # in which relative imports are resolved
    source: str


class Dependency(NamedTuple):
    importer: str
    imported: str
    in_function: bool

    def __str__(self):
        return f"{self.importer} imports {self.imported}"


def modules_of_the_package():
    """All modules of the package by name. The folder kernels/ is a part of it when it is installed."""
    found = {}
    for folder, root in (("fused_gp", "fused_gp"), ("kernels", "fused_gp.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            package = ".".join((root, *path.parent.relative_to(ROOT / folder).parts))
            name = package if path.name == "__init__.py" else f"{package}.{path.stem}"
            found[name] = Module(package, path.read_text())
    return found


def dependencies(modules):
    """One for each module that an import names, whichever function or class it is in.

    Python also runs the packages above an imported module; that is no dependency.
    """
    found = []
    for name, module in modules.items():
        pending = [(ast.parse(module.source), False)]
        while pending:
            node, in_function = pending.pop()
            in_function |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            pending += [(child, in_function) for child in ast.iter_child_nodes(node)]
            for imported in imported_names(node, module.package, modules):
                found.append(Dependency(name, imported, in_function))
    return found


def imported_names(node, package, modules):
    """The modules of the package that this statement or call imports: fully, or names from them."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = resolve_name("." * node.level + (node.module or ""), package)
        names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
    elif isinstance(node, ast.Call) and isinstance(node.args[0] if node.args else None, ast.Constant):
        called = ast.unparse(node.func).rpartition(".")[2]
        names = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
    else:
        return set()
    return {name for name in names if name.partition(".")[0] == "fused_gp"}


def is_in(module, *layers):
    return any(module == layer or (layer in FOLDERS and module.startswith(f"{layer}.")) for layer in layers)


def height(module):
    """The number of layers below the module's."""
    heights = [height for height, layer in enumerate(reversed(LAYERS)) if is_in(module, *layer)]
    assert len(heights) == 1, f"{module} must be in one layer, and is in {len(heights)}"
    return heights[0]


def upward(modules):
    return [str(each) for each in dependencies(modules) if height(each.imported) > height(each.importer)]


def cycle(modules):
    """The modules of an import cycle, or None. An import inside a function runs later, and closes no cycle."""
    graph = {name: set() for name in modules}
    for each in dependencies(modules):
        if not each.in_function:
            graph[each.importer].add(each.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


ABOVE_OPS = "fused_gp.critics", "fused_gp.methods", "fused_gp.penalties"

# Rules beside the order of the layers: whether a dependency breaks them.
FORBIDDEN = {
    "kernels import form alone": lambda importer, imported: (
        is_in(importer, "fused_gp.kernels") and not is_in(imported, "fused_gp.kernels", "fused_gp.form")
    ),
    "ops import no critics, methods or penalties": lambda importer, imported: (
        is_in(importer, "fused_gp.ops") and is_in(imported, *ABOVE_OPS)
    ),
    "derivatives import no critics, methods or penalties": lambda importer, imported: (
        is_in(importer, "fused_gp.derivatives") and is_in(imported, *ABOVE_OPS)
    ),
    "critics import no methods": lambda importer, imported: (
        is_in(importer, "fused_gp.critics") and is_in(imported, "fused_gp.methods")
    ),
    "__main__ alone imports inspection, and nothing imports __main__": lambda importer, imported: (
        imported == "fused_gp.__main__" or (imported == "fused_gp.inspection" and importer != "fused_gp.__main__")
    ),
}


def breaking(rule, modules):
    return [str(each) for each in dependencies(modules) if FORBIDDEN[rule](each.importer, each.imported)]


@pytest.fixture(scope="module")
def modules():
    return modules_of_the_package()


def test_every_module_is_read_and_has_a_layer(modules):
    files = [*(ROOT / "fused_gp").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(modules) == len(files)
    assert {"fused_gp", "fused_gp.form", "fused_gp.critics", "fused_gp.critics.critic", "fused_gp.kernels",
            "fused_gp.kernels.launch"} <= modules.keys()  # fmt: skip
    for name in modules:
        height(name)


def test_imports_run_downwards(modules):
    assert upward(modules) == []


def test_no_import_cycles(modules):
    assert cycle(modules) is None


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_no_forbidden_imports(modules, rule):
    assert breaking(rule, modules) == []


# The checks themselves, on the package with a statement added to one module.


def with_statement(modules, name, statement):
    return modules | {name: Module(modules[name].package, f"{modules[name].source}\n{statement}\n")}


@pytest.mark.parametrize(
    ("name", "statement", "imported"),
    [
        ("fused_gp.form", "import fused_gp.arguments", "fused_gp.arguments"),
        ("fused_gp.form", "import torch, fused_gp.ops.rows as rows", "fused_gp.ops.rows"),
        ("fused_gp.arguments", "from fused_gp import interpolate", "fused_gp"),
        ("fused_gp.reference", "from . import module", "fused_gp.module"),
        ("fused_gp.kernels.launch", "from fused_gp.ops.backends import backend_for", "fused_gp.ops.backends"),
        ("fused_gp.ops.rows", "from .. import derivatives", "fused_gp.derivatives"),
        ("fused_gp.derivatives", "from ..critics.profile import is_sharded", "fused_gp.critics.profile"),
        ("fused_gp.critics", "from ..methods import choice", "fused_gp.methods.choice"),
        ("fused_gp.methods.chunks", "from .. import penalties", "fused_gp.penalties"),
        ("fused_gp.penalties", "from .module import GradientPenalty", "fused_gp.module"),
        ("fused_gp.module", "def f():\n    from . import inspection", "fused_gp.inspection"),
        ("fused_gp", "class C:\n    def f(self):\n        import fused_gp.__main__", "fused_gp.__main__"),
        ("fused_gp.ops.torch_ops", "try:\n    from ..critics import state\nexcept ImportError:\n    pass",
         "fused_gp.critics.state"),
        ("fused_gp.ops.rows", "def f():\n    return importlib.import_module('fused_gp.critics.state')",
         "fused_gp.critics.state"),
        ("fused_gp.form", "ops = __import__('fused_gp.ops')", "fused_gp.ops"),
    ],
)  # fmt: skip
def test_an_upward_import_is_found(modules, name, statement, imported):
    found = set(upward(with_statement(modules, name, statement))) - set(upward(modules))
    assert found == {f"{name} imports {imported}"}


@pytest.mark.parametrize(
    ("rule", "name", "statement"),
    [
        ("kernels import form alone", "fused_gp.kernels.tiles", "from fused_gp import arguments"),
        ("kernels import form alone", "fused_gp.kernels", "from ..reference import interpolate"),
        ("ops import no critics, methods or penalties", "fused_gp.ops.rows", "from ..critics import state"),
        ("ops import no critics, methods or penalties", "fused_gp.ops", "from ..methods import chunks"),
        ("ops import no critics, methods or penalties", "fused_gp.ops.rows", "def f():\n    from .. import penalties"),
        ("derivatives import no critics, methods or penalties", "fused_gp.derivatives", "from ..critics import state"),
        ("derivatives import no critics, methods or penalties", "fused_gp.derivatives", "from ..methods import chunks"),
        ("derivatives import no critics, methods or penalties", "fused_gp.derivatives", "from .. import penalties"),
        ("critics import no methods", "fused_gp.critics.state", "def f():\n    from ..methods.chunks import Batch"),
        ("__main__ alone imports inspection, and nothing imports __main__", "fused_gp", "from . import inspection"),
        ("__main__ alone imports inspection, and nothing imports __main__", "fused_gp.inspection",
         "from .__main__ import main"),
    ],
)  # fmt: skip
def test_a_forbidden_import_is_found(modules, rule, name, statement):
    (found,) = set(breaking(rule, with_statement(modules, name, statement))) - set(breaking(rule, modules))
    assert found.startswith(f"{name} imports ")


def test_a_cycle_is_found(modules):
    """An import inside a function closes none."""
    statement = "from .batch_norm import warn_of_batch_norm"
    assert set(cycle(with_statement(modules, "fused_gp.critics.profile", statement))) == {
        "fused_gp.critics.profile",
        "fused_gp.critics.batch_norm",
    }
    assert cycle(with_statement(modules, "fused_gp.critics.profile", f"def f():\n    {statement}")) is None


def test_a_module_without_a_layer_is_found(modules):
    with pytest.raises(AssertionError, match=r"fused_gp\.extra must be in one layer, and is in 0"):
        upward(modules | {"fused_gp.extra": Module("fused_gp", "from .form import Method")})
