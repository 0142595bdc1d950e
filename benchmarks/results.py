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
    "host": ("host",),
}


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    path.write_text(f'{{"rows": [\n{lines}\n]}}\n')


def load(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"]
    assert isinstance(rows, list)
    return rows


def committed() -> dict[str, list[dict[str, Any]]]:
    """The rows of the committed runs, by the name of the file; none where there is no file."""
    names = [name.format(device=device) for device in ("cpu", "cuda") for name in FILES]
    paths = {name: COMMITTED / f"{name}.json" for name in names}
    return {name: load(path) if path.exists() else [] for name, path in paths.items()}


def _rounded(value: Any) -> Any:
    """To four digits: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
