"""A run's rows as a file: JSON, a row a line, so that git shows which rows changed."""

import json
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parent / "results"


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    path.write_text(f'{{"rows": [\n{lines}\n]}}\n')


def load(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"]
    assert isinstance(rows, list)
    return rows


def committed(name: str) -> list[dict[str, Any]]:
    """The suite's run on a "cpu" or a "cuda" device, or the "host" time; empty where none is committed."""
    path = COMMITTED / f"{name}.json"
    return load(path) if path.exists() else []


def _rounded(value: Any) -> Any:
    """To four digits: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
