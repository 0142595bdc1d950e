"""Benchmarks as pytest-benchmark cases, at their smallest sizes: the numbers are checked, then the step is run.

Of the suites ops, penalties, training and systems. `make test` runs each once and times nothing. To watch for
regressions in Python and small operations while you work:

    .venv/bin/python -m pytest tests/benchmarks --benchmark-enable --benchmark-autosave --benchmark-group-by=param:case
    .venv/bin/python -m pytest tests/benchmarks --benchmark-enable --benchmark-compare

pytest-benchmark times one implementation after another, so that a change of the machine's speed looks like one of the
program: ratios to peers come from `python -m benchmarks`, where all are interleaved.
"""

from dataclasses import replace
from functools import lru_cache, partial
from math import prod

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.cases import SUITES
from benchmarks.cases.case import CallCase
from benchmarks.cases.systems import TINY
from benchmarks.correctness import CorrectnessCheck
from benchmarks.names import BOTH
from tests.support.compiling import COMPILES

pytestmark = COMPILES


def smallest():
    """Every kind of case once, at a size of which many run in a second."""
    cases = [case for name in ("ops", "penalties", "training") for case in SUITES[name].cases("cpu")]
    found = {}
    for case in sorted(cases, key=lambda case: prod(case.shape)):
        found.setdefault((case.suite, case.name, case.dtype), case)
    return [*map(cut, found.values()), *(case for case in SUITES["systems"].cases("cpu") if case.shape == TINY)]


def cut(case):
    """To two samples, or groups of them."""
    if not isinstance(case, CallCase):
        return case
    options = tuple(o | ({"chunk_size": 1} if "chunk_size" in o else {}) for o in case.options)
    return replace(case, shape=(2 * getattr(case, "group_size", 1), *case.shape[1:]), options=options)


CASES = {case.key: case for case in smallest()}
PAIRS = [
    pytest.param(key, name, id=f"{key}-{name}", marks=pytest.mark.xdist_group(f"benchmark {key}"))
    for key, case in CASES.items()
    for name in case.implementations()
]


@lru_cache(maxsize=1)
def check(key):
    return CorrectnessCheck(CASES[key], CASES[key].inputs("cpu"), "cpu")


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_right_and_runs(case, name, benchmark, monkeypatch):
    chosen = CASES[case]
    if (chosen.name != BOTH or chosen.dtype != torch.float32) and not benchmark.enabled:
        # The same graphs, through the same differentiation, and run without writing C++: that takes ten seconds each.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    step, row = check(case).enter(name, chosen.implementations()[name])
    if "absent" in row:
        pytest.skip(row["absent"])
    assert "failed" not in row, row["failed"]
    assert step is not None
    benchmark(step)
