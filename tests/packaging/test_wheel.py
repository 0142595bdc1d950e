"""The wheel: the files in it, and that it works when it is installed."""

import shutil
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.processes import ROOT, run_compiled


def run(*command, **options):
    done = run_compiled(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as for PyPI, from a copy of the files that belong to it, with the packages of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("fused_gp", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder))
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_kernels_inside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    kernels = {f"fused_gp/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "fused_gp").rglob("*.py")} | {"fused_gp/py.typed"}
    assert {name for name in names if name.startswith("fused_gp/")} == kernels | package
    assert {name.partition("/")[0] for name in names} == {"fused_gp", names[-1].partition("/")[0]}  # and dist-info


def test_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """With the torch of this environment; it installs no top-level module named `kernels`."""
    venv.create(tmp_path / "venv", with_pip=True, system_site_packages=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The packages of this environment come after those of the new one, so that `import fused_gp` finds the wheel's.
    here = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (site / "borrowed.pth").write_text(here)
    code = (
        "import importlib.util, fused_gp, fused_gp.kernels, torch\n"
        f"assert fused_gp.__file__.startswith({str(site)!r}), fused_gp.__file__\n"
        f"assert fused_gp.kernels.__file__.startswith({str(site)!r}), fused_gp.kernels.__file__\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "print(fused_gp.gradient_norm_penalty(torch.full((2, 4), 1.0)).item())\n"
    )
    assert float(run(python, "-c", code, cwd=tmp_path)) == pytest.approx(1.0)
