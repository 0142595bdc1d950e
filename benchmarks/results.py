"""A run's rows as a file: JSON, a row a line, so that git shows which rows changed."""

import json
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parent / "results"
UNCOMMITTED = Path("out/benchmarks")

# Suites of one file, by its name.
FILES = {
    "{device}": ("ops", "penalties", "training"),
    "{device}_methods": ("methods",),
    "{device}_systems": ("systems",),
    "{device}_experiments": ("experiments",),
    "host": ("host",),
}


def save(path: Path, rows: list[dict[str, Any]], **about: Any) -> None:
    """The rows, and before them what is said of the run. The file is there as a whole at every moment: a run that is
    killed leaves this one or the last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    said = "".join(f"{json.dumps(name)}: {json.dumps(_rounded(value))},\n" for name, value in about.items())
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(f'{{{said}"rows": [\n{lines}\n]}}\n')
    unfinished.replace(path)


def load(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"]
    assert isinstance(rows, list)
    return rows


def load_about(path: Path) -> dict[str, Any]:
    """What is said of the run."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "rows"}


def case_key(row: dict[str, Any]) -> tuple[str, str, tuple[int, ...], str]:
    """What distinguishes the rows of one case from those of others of its run."""
    return row["suite"], row["case"], tuple(row["shape"]), row["dtype"]


def committed() -> dict[str, list[dict[str, Any]]]:
    """The rows of the committed runs on CPUs, by the name of the file; none where there is no file."""
    paths = {name: COMMITTED / f"{name}.json" for name in (name.format(device="cpu") for name in FILES)}
    return {name: load(path) if path.exists() else [] for name, path in paths.items()}


def devices() -> dict[str, Path]:
    """The committed runs of `gpu`, by the name of the device."""
    return {path.stem: path for path in sorted(COMMITTED.glob("*.json")) if path.stem not in committed()}


def _rounded(value: Any) -> Any:
    """To four digits: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
