"""The suites: which cases they have, and that committed runs and quick ones are of them."""

import pytest

from benchmarks import results
from benchmarks.__main__ import parse
from benchmarks.cases import SUITES, systems
from benchmarks.names import BOTH, COMPILED_CALL, COMPILED_OPS, is_ours
from benchmarks.report import readme
from benchmarks.report.tables import SYSTEM_SIZES

CASES = {device: [case for suite in SUITES.values() for case in suite.cases(device)] for device in ("cpu", "cuda")}


@pytest.mark.parametrize("device", CASES)
def test_every_case_has_a_name_of_its_own(device):
    """By which it is found in a process of its own, and its rows in a file."""
    assert len({case.key for case in CASES[device]}) == len(CASES[device])
    assert {case.suite for case in CASES[device]} == set(SUITES) - {"host" if device == "cuda" else "experiments"}


def test_the_snippets_ops_compiled_are_called_so():
    for case in CASES["cpu"]:
        compiled = {name for name in case.all_implementations() if "compiled" in name and not is_ours(name)}
        wanted = {
            "ops": {COMPILED_OPS} if case.name == BOTH else set(),
            "methods": set(),
            "systems": set(),
            "host": set(),
        }
        assert compiled == wanted.get(case.suite, {COMPILED_CALL})


def test_a_committed_run_is_its_whole_suites():
    suites = {template.format(device="cpu"): ("cpu", names) for template, names in results.FILES.items()}
    suites |= {name: ("cuda", ("ops", "penalties", "experiments")) for name in results.devices()}
    runs = results.committed() | {name: results.load(path) for name, path in results.devices().items()}
    for name, found in runs.items():
        if found:
            device, names = suites[name]
            measured = {(row["suite"], row["case"], tuple(row["shape"]), row["dtype"]) for row in found}
            of_suites = [case.about for case in CASES[device] if case.suite in names]
            whole = {(c["suite"], c["case"], tuple(c["shape"]), c["dtype"]) for c in of_suites}
            assert measured == whole if device == "cpu" else measured <= whole  # a device's says which are missing


@pytest.mark.parametrize("name", sorted({case.suite for case in CASES["cpu"]}))
def test_quick_is_a_part_of_the_suite(name):
    _, quick = parse([name, "--quick"])
    assert 0 < len(quick) < len(SUITES[name].cases("cpu"))
    assert {case.key for case in quick} < {case.key for case in SUITES[name].cases("cpu")}
    assert not any("compiled" in implementation for case in quick for implementation in case.implementations())


def test_the_readme_says_how_many_systems_at_which_sizes():
    assert set(SYSTEM_SIZES) == {systems.TINY, systems.LARGE}
    written = readme.of_systems(results.committed()["cpu_systems"])
    assert f"from the least of the {len(systems.SYSTEMS)} to the most" in written
    assert all(f"| {words} |" in written for words in SYSTEM_SIZES.values())
