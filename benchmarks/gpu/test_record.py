"""A plugin of pytest: a line of JSON for every test, written as it ends, so that a run that is killed leaves them.

A device that has failed once, by an illegal address say, fails every later test of its process. So the process ends
there; pytest-xdist starts another, in which the tests after that one count again.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

MESSAGE = 6000  # characters of a failure: its end says what was wrong


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="the file to which each test's line is added")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first: what torch compiles comes last."""
    items.sort(key=lambda item: item.get_closest_marker("compiles") is not None)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of several processes, the one that hears of all tests
        config.pluginmanager.register(Record(config.getoption("--record")))
    config.pluginmanager.register(BrokenDevice())


class Record:
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # of the process that runs them itself
            self.write(collected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        if node.gateway.id == "gw0":
            self.write(collected=len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            line["message"] = report.longrepr[2]
        elif report.outcome == "failed":
            line |= {"when": report.when, **_said(report)}
        self.write(**line)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", seconds=0, when="collect", **_said(report))


def _said(report: pytest.TestReport | pytest.CollectReport) -> dict[str, str]:
    """What was wrong, and what was printed and launched before."""
    sections = "".join(f"--- {title}\n{text}\n" for title, text in report.sections)
    return {"message": report.longreprtext[-MESSAGE:], "before": sections[-MESSAGE:]}


class BrokenDevice:
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        done = yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                if hasattr(item.config, "workerinput"):
                    os._exit(1)
                item.session.shouldstop = f"the device is lost to this process: {error}"
        return done
