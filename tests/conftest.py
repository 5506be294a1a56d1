"""Isolation, what is left to other commands, and the behaviour matrix as a table at the end of the run."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from lightning_compress.deploy.files import Pair
from lightning_compress.deploy.formats import FORMATS, pip_command

from .behaviour.methods import METHODS
from .behaviour.properties import PROPERTIES
from .harness import NotOnThisCPU
from .pairs import print_pairs
from .runs import print_runs
from .table import Key, draw
from .zoo import MODULES

NOT_HERE = "not on this CPU"

_LEFT = pytest.StashKey[dict[str, int]]()


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """W&B offline and all its folders in a temporary one; what is timed takes a moment, since no test asks how long."""
    monkeypatch.setattr(Pair.latency, "__defaults__", (0.05,))
    folder = tmp_path_factory.getbasetemp() / "wandb"
    for key in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(key, str(folder))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``make test-all`` demands every runtime, ``make test-full`` every test and every cell of the behaviour matrix."""
    parser.addoption("--full", action="store_true", help="every test, every cell of the matrix, every kind of run")
    parser.addoption("--runtimes", action="store_true", help="fail if the packages of a runtime are missing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests in runtimes that are not installed to ``make test-all``, slow ones to ``make test-full``."""
    left = {} if config.getoption("--full") else {"nightly": [i for i in items if i.get_closest_marker("nightly")]}
    missing = [name for name, kind in FORMATS.items() if kind.missing]
    if config.getoption("--runtimes"):
        if missing:
            raise pytest.UsageError(f"--runtimes: {', '.join(missing)} not installed. Run: {pip_command(missing)}")
    else:
        left["runtimes"] = [item for item in items if item.get_closest_marker("runtimes")]
    gone = {id(item): item for found in left.values() for item in found}
    items[:] = [item for item in items if id(item) not in gone]
    config.hook.pytest_deselected(items=list(gone.values()))
    config.stash[_LEFT] = {name: len(found) for name, found in left.items()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What the plain module cannot do on this CPU is an outcome of its own: neither passed nor failed."""
    report = yield
    if call.excinfo and isinstance(call.excinfo.value, NotOnThisCPU):
        report.outcome, report.longrepr = "skipped", str(call.excinfo.value)
        report.user_properties.append((NOT_HERE, str(call.excinfo.value)))
    return report


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """Counted and shown by that name."""
    if NOT_HERE in dict(getattr(report, "user_properties", ())) and report.when == "call":
        return NOT_HERE, "n", NOT_HERE.upper()
    return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what became of each cell of the behaviour matrix."""
    left = terminalreporter.config.stash.get(_LEFT, {})
    if left.get("runtimes"):
        named = "OpenVINO, ExecuTorch, LiteRT and Inductor"
        terminalreporter.line(f"{left['runtimes']} tests in {named} are left to: make test-all")
    if left.get("nightly"):
        terminalreporter.line(f"{left['nightly']} slow tests, more of what others show, are left to: make test-full")
    cells: dict[Key, str] = {}
    for outcome in ("passed", NOT_HERE, "failed", "error"):  # the worst stands
        for report in terminalreporter.stats.get(outcome, []):
            cell = dict(getattr(report, "user_properties", ())).get("cell")
            if cell and (outcome != "passed" or report.when == "call"):
                cells[tuple(cell)] = "ok" if outcome == "passed" else outcome
    if cells:
        terminalreporter.section("behaviour matrix")
    for line in draw(cells, METHODS, MODULES, PROPERTIES):
        terminalreporter.line(line)
    print_pairs(terminalreporter)
    print_runs(terminalreporter)
    if terminalreporter.stats.get(NOT_HERE):
        terminalreporter.section(NOT_HERE)
    for report in terminalreporter.stats.get(NOT_HERE, []):
        terminalreporter.line(f"{report.nodeid.split('::')[-1]}: {dict(report.user_properties)[NOT_HERE]}")


def pytest_configure(config: Any) -> None:
    """Where the repository lies, for tests that run its commands."""
    config.repository = Path(__file__).parents[1]
