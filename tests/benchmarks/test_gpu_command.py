"""`python -m benchmarks gpu`: its phases, their limits, and what is left whenever it is ended."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import checkout, results
from benchmarks.__main__ import main
from benchmarks.gpu import command
from benchmarks.gpu.phases import Phase, phases
from benchmarks.names import RUN
from benchmarks.report import device_run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--device cuda needs a CUDA or ROCm device, and torch finds none; cpu rehearses the command"),
        (["--device", "xpu"], "argument --device: invalid choice: 'xpu'"),
        (["--device", "cpu", "--budget", "5"], "--budget must be 20 seconds or more, got 5"),
        (["--device", "cpu", "--budget", "nan"], "--budget must be 20 seconds or more, got nan"),
        (["--device", "cpu", "--budget", "x"], "argument --budget: invalid float value: 'x'"),
        (["--device", "cpu", "--out", "README.md"], "--out must be a folder that can be written to, got README.md"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(monkeypatch, capsys, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "Run", None)
    with pytest.raises(SystemExit, match="2"):
        main(["gpu", *words])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", [RUN, "ops.json", "tests.jsonl", "log.txt"])
def test_an_earlier_run_is_left_alone(tmp_path, capsys, name):
    """Or a part of one, whose cases would count as done."""
    (tmp_path / name).write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        main(["gpu", "--device", "cpu", "--out", str(tmp_path)])
    assert "holds an earlier run; move it away, or name another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"


def python(program, *words):
    return [sys.executable, "-c", program, *words]


def states(tmp_path, every, budget=60.0):
    run = command.Run(tmp_path, "cpu", budget)
    run.phases(every)
    found = results.load(tmp_path / RUN)
    assert [state["phase"] for state in found] == [phase.name for phase in every if not phase.beside]
    return found


def test_phases_end_in_their_ways(tmp_path):
    """Each is a process; one that fails or takes too long does not keep the next ones from running."""
    ends = {"good": "print('said')", "wrong": "raise SystemExit(1)", "broken": "raise SystemExit(75)"}
    every = [Phase(name, name, 1, python(program), "") for name, program in ends.items()]
    every += [Phase("not all", "not all", 1, python("raise SystemExit(74)"), "", measures=True)]
    every += [Phase("long", "long", 0.01, python("import time; time.sleep(60)"), "")]
    every += [Phase("last", "last", 1, python("print('last')"), "")]
    begin = time.monotonic()
    found = states(tmp_path, every, 30.0)
    assert time.monotonic() - begin < 20
    assert [state["state"] for state in found] == [
        "done", "something failed", "ended with status 75", "not all of its cases were reached", "cut off at its limit",
        "done",
    ]  # fmt: skip
    assert [state["starts"] for state in found] == [1] * 6
    log = (tmp_path / "log.txt").read_text()
    assert "===== good, start 1\nsaid\n" in log
    assert log.endswith("last\n")


def test_what_a_phase_does_not_need_is_left_to_the_next(tmp_path):
    found = states(tmp_path, [Phase(name, name, 1, python(""), "") for name in "ab"], 40.0)
    assert found[0]["limit_s"] == pytest.approx(20, abs=1)
    assert found[1]["limit_s"] > 35


def test_the_first_phase_takes_a_minute_at_most_however_long_the_run(tmp_path):
    every = [phase for phase in phases(tmp_path, "cuda") if not phase.beside]
    first, *others = [phase._replace(command=python("")) for phase in every]
    found = states(tmp_path, [first, *others], 3600.0)
    assert found[0]["limit_s"] == 60
    assert all(state["limit_s"] > 60 for state in found[1:])


def test_a_phase_for_which_no_time_is_left_is_not_started(tmp_path):
    every = [
        Phase("long", "", 99, python("import time; time.sleep(60)"), ""),
        Phase("last", "", 1, python("1 / 0"), ""),
    ]
    assert [state["state"] for state in states(tmp_path, every, 2.0)] == [
        "cut off at its limit", "not started: no time was left",
    ]  # fmt: skip


@pytest.mark.parametrize(("end", "starts"), [("raise SystemExit(75)", 3), ("os.kill(os.getpid(), 9)", 3), ("1 / 0", 1)])
def test_a_measuring_process_that_dies_is_started_again(tmp_path, end, starts):
    """By a signal, or because it has to leave the device; not after an error of the program."""
    program = (
        f"import os, sys\npath = {str(tmp_path / 'count')!r}\nwith open(path, 'a') as file: file.write('x')\n"
        f"if len(open(path).read()) < 3: {end}\n"
    )
    (found,) = states(tmp_path, [Phase("ops", "ops", 1, python(program), "", measures=True)])
    assert (found["state"], found["starts"]) == ("done" if starts == 3 else "something failed", starts)


def test_what_runs_beside_the_tests_is_ended_before_a_phase_is_alone(tmp_path):
    """With the processes that it has started itself."""
    pids = tmp_path / "pids"
    endless = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"
    beside = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {endless!r}]); {endless}"
    running = (
        "import os, pathlib, time\n"
        f"pids = pathlib.Path({str(pids)!r})\n"
        "def running():\n"
        "    found = [pathlib.Path(f'/proc/{pid}/stat') for pid in pids.read_text().split()] if pids.exists() else []\n"
        "    return sum(stat.exists() and stat.read_text().split()[2] != 'Z' for stat in found)\n"
    )
    alive, dead = running + "while running() < 2: time.sleep(0.05)\n", running + "assert not running()\n"
    every = [
        Phase("beside", "", 0, python(beside), "", beside=True),
        Phase("tests", "tests", 1, python(alive), ""),
        Phase("ops", "ops", 1, python(dead), "", alone=True),
    ]
    assert [state["state"] for state in states(tmp_path, every)] == ["done", "done"]


MEASURES = """
import sys, time
from pathlib import Path
from benchmarks import results
rows = []
for number in range(60):
    rows.append({"suite": "ops", "case": "a", "shape": [number], "dtype": "float32", "implementation": "x" * 400})
    results.save(Path(sys.argv[1]), rows, planned=["a"], ended=[])
    time.sleep(0.005)
while "ops" not in sys.argv[1]:  # the first phase ends, the second one writes until it is killed
    results.save(Path(sys.argv[1]), rows, planned=["a"], ended=[])
"""
RUNS = """
import sys
from pathlib import Path
from benchmarks.gpu import command
from benchmarks.gpu.phases import Phase
out = Path(sys.argv[1])
command.phases = lambda out, device: [
    Phase(name, name, 1, [sys.executable, "-c", sys.argv[2], str(out / f"{name}.json")], f"{name}.json")
    for name in ("ops", "penalties", "experiments")
]
raise SystemExit(command.main(["--device", "cpu", "--budget", "60", "--out", str(out)]))
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name
)
def test_a_run_that_is_killed_leaves_all_that_it_found(tmp_path, number):
    """At any moment; also in the middle of a file."""
    for attempt in range(2):
        out = tmp_path / f"{attempt}"
        process = subprocess.Popen(
            [sys.executable, "-c", RUNS, str(out), MEASURES],
            cwd=checkout.ROOT,
            stdout=subprocess.DEVNULL,
            stderr=-3,
            preexec_fn=partial(
                signal.signal, signal.SIGINT, signal.SIG_DFL
            ),  # ignored where the tests run in the background
        )
        while not (out / "penalties.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1 * attempt)
        process.send_signal(number)
        process.wait()
        time.sleep(0.2)
        run = device_run.load(out)
        assert device_run.load(out) == run  # the phase has ended with it
        assert [state["state"] for state in run.phases][:2] == [
            "done",
            "running" if number == signal.SIGKILL else "interrupted",
        ]
        assert sum(row["shape"] == [59] for row in run.rows) >= 1  # all of the phase before
        assert len(run.rows) > 60
        json.dumps(run.about)
        assert "running" not in device_run.summary(run) or number == signal.SIGKILL


def test_the_phases_of_a_device_stand_in_the_order_of_their_worth(tmp_path):
    every = phases(tmp_path, "cuda")
    assert [phase.name for phase in every if not phase.beside] == [
        "device", "tests", "tests alone", "ops", "penalties", "experiments", "compiled",
    ]  # fmt: skip
    assert len({phase.file for phase in every if phase.file}) + len([RUN, "log.txt"]) <= 8
    alone = next(at for at, phase in enumerate(every) if phase.alone)
    assert all(phase.alone for phase in every[alone:])
    assert all(at < alone for at, phase in enumerate(every) if phase.beside)
    assert {phase.name for phase in every if phase.measures} == {"ops", "penalties", "experiments", "compiled"}


def test_a_checkout_that_is_not_installed_finds_the_kernels(tmp_path):
    """As on a machine with a device and no network: what is installed beside it has no part of fused_gp."""
    triton = pytest.importorskip("triton")
    site = Path(triton.__file__).parents[1]
    program = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from benchmarks import checkout\n"
        "import fused_gp\n"
        "try: import fused_gp.kernels\n"
        "except ModuleNotFoundError: pass\n"
        "else: raise SystemExit('they are there without it')\n"
        "checkout.find_kernels()\n"
        "import fused_gp.kernels\n"
        "print(fused_gp.kernels.__file__)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, str(site)],
        cwd=checkout.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == checkout.ROOT / "kernels" / "__init__.py"
