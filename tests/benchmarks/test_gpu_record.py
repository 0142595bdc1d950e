"""The plugin of pytest by which `python -m benchmarks gpu` keeps what its tests said."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import checkout
from benchmarks.report import device_run

TESTS = """
import pytest, torch

@pytest.mark.compiles
def test_slow(): pass

def test_good(): pass

def test_wrong(record_property):
    print("launched: " + "a_kernel")
    assert [1, 2, 3] == [1, 2, 4], "element 2"

def test_skipped(): pytest.skip("has no reason")

@pytest.fixture
def broken(): raise RuntimeError("in a fixture")

def test_with_a_broken_fixture(broken): pass
"""


@pytest.fixture(params=[[], ["-p", "xdist", "-n", "2"]], ids=["one process", "two"])
def run(request, tmp_path):
    """Of these tests, with the file that the plugin wrote."""
    if request.param:
        pytest.importorskip("xdist")

    def run(text=TESTS):
        (tmp_path / "test_some.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = compiles: x\n")
        words = [sys.executable, "-m", "pytest", "-p", "benchmarks.checkout", "-p", "benchmarks.gpu.test_record"]
        words += ["-p", "no:cacheprovider", "--record", str(tmp_path / "tests.jsonl"), "--rootdir", str(tmp_path)]
        environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        done = subprocess.run(
            [*words, *request.param, str(tmp_path / "test_some.py")],
            cwd=checkout.ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        return done, device_run.tests(tmp_path / "tests.jsonl")

    return run


def test_every_test_is_a_line_with_what_was_wrong(run, tmp_path):
    done, found = run()
    assert done.returncode == 1, done.stdout + done.stderr
    assert (found["collected"], found["passed"], len(found["failed"])) == (5, 2, 2)
    assert list(found["skipped"].values()) == [1]
    assert "has no reason" in next(iter(found["skipped"]))
    wrong = next(test for test in found["failed"] if "test_wrong" in test["test"])
    assert "element 2" in wrong["message"]
    assert "launched: a_kernel" in wrong["before"]
    assert "launched: a_kernel" not in wrong["message"].replace('"launched: " + "a_kernel"', "")
    broken = next(test for test in found["failed"] if "broken_fixture" in test["test"])
    assert (broken["when"], "in a fixture" in broken["message"]) == ("setup", True)


def test_what_is_compiled_comes_last(run, tmp_path):
    run()
    tests = [json.loads(line).get("test", "") for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    ran = [test.split("::")[1] for test in tests if test]
    assert ran.index("test_good") < ran.index("test_slow")


def test_a_file_that_cannot_be_collected_is_a_failure(run):
    """Once, whatever the number of processes."""
    done, found = run("import nosuch")
    assert done.returncode != 0
    (failed,) = found["failed"]
    assert failed["when"] == "collect"
    assert "No module named 'nosuch'" in failed["message"]


def test_half_a_line_is_left_out(tmp_path):
    path = tmp_path / "tests.jsonl"
    path.write_text('{"collected": 2}\n{"test": "a", "outcome": "passed", "seconds": 1}\n{"test": "b", "outc')
    found = device_run.tests(path)
    assert (found["collected"], found["passed"], found["failed"]) == (2, 1, [])


BROKEN = """
import os, torch
torch.cuda.is_available = torch.cuda.is_initialized = lambda: True

def synchronize():
    if os.path.exists("{flag}"):
        if os.path.exists("{flag}.seen"): return
        open("{flag}.seen", "w").close()
        raise RuntimeError("an illegal memory access")
torch.cuda.synchronize = synchronize

def test_a(): pass
def test_breaks_it():
    open("{flag}", "w").close()
    assert False, "an illegal address"
def test_c(): pass
def test_d(): pass
"""


@pytest.mark.parametrize("workers", [["-p", "xdist", "-n", "1"], []], ids=["xdist", "one process"])
def test_a_broken_device_ends_its_process_and_another_goes_on(tmp_path, workers):
    """Or every later test of that process fails, and hides which one it was."""
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(BROKEN.format(flag=tmp_path / "flag"))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    words = ["-p", "benchmarks.gpu.test_record", "--record", str(tmp_path / "tests.jsonl"), *workers]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *words,
         str(tmp_path / "test_some.py")],
        cwd=checkout.ROOT, env=environment | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    found = device_run.tests(tmp_path / "tests.jsonl")
    assert found["passed"] == (3 if workers else 1), done.stdout + done.stderr
    assert {test["test"].split("::")[1] for test in found["failed"]} == {"test_breaks_it"}
    assert any("an illegal address" in test["message"] for test in found["failed"])
    assert workers or "the device is lost to this process: an illegal memory access" in done.stdout
