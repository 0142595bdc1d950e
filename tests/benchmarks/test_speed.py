"""Every benchmark as a pytest-benchmark case, at its smallest size: the numbers are checked, then the step is run.

`make test` runs each once and times nothing. To watch for regressions in Python and small operations while you work:

    .venv/bin/python -m pytest benchmarks --benchmark-enable --benchmark-autosave --benchmark-group-by=param:case
    .venv/bin/python -m pytest benchmarks --benchmark-enable --benchmark-compare

pytest-benchmark times one contestant after another, so that a change of the machine's speed looks like one of the
program: ratios to peers come from `python -m benchmarks`, where all take turns.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.cases import smallest
from benchmarks.measure import Gate
from benchmarks.ops import BOTH

CASES = {case.key: case for case in smallest()}
PAIRS = [
    pytest.param(key, name, id=f"{key}-{name}", marks=pytest.mark.xdist_group(f"benchmark {key}"))
    for key, case in CASES.items()
    for name in case.contestants()
]


@lru_cache(maxsize=1)
def gate(key: str) -> Gate:
    return Gate(CASES[key], "cpu")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_right_and_runs(case: str, name: str, benchmark: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = CASES[case]
    if (chosen.name != BOTH or chosen.dtype != torch.float32) and not benchmark.enabled:  # type: ignore[attr-defined]
        # The same graphs, through the same differentiation, and run without writing C++: that takes ten seconds each.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    step, row = gate(case).enter(name, chosen.contestants()[name])
    if "absent" in row:
        pytest.skip(row["absent"])
    assert "failed" not in row, row["failed"]
    assert step is not None
    benchmark(step)
