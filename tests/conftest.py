"""Isolation, and the behaviour matrix as a table at the end of the run."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """W&B offline and all its folders in a temporary one."""
    folder = tmp_path_factory.getbasetemp() / "wandb"
    for key in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(key, str(folder))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print modules x properties, with what became of each."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            found = re.search(
                r"behaviour/test_(?:matrix|distillation)\.py::test_(\w+)\[(.+?)\]", getattr(report, "nodeid", "")
            )
            if found and (outcome != "passed" or report.when == "call"):
                name = re.sub(r"^(True|False)-|-(True|False)$", "", found[2])
                cell = cells[name].get(found[1], "passed")
                cells[name][found[1]] = outcome if cell == "passed" else cell
    if not cells:
        return
    properties = list(dict.fromkeys(key for row in cells.values() for key in row))
    terminalreporter.section("behaviour matrix")
    widths = {key: max(11, len(key) + 2) for key in properties}
    terminalreporter.line(f"{'module':18}" + "".join(f"{key:>{widths[key]}}" for key in properties))
    for name, row in cells.items():
        marks = {key: {"passed": "ok"}.get(row[key], row[key]) if key in row else "-" for key in properties}
        terminalreporter.line(f"{name:18}" + "".join(f"{marks[key]:>{widths[key]}}" for key in properties))


def pytest_configure(config: Any) -> None:
    """Where the repository lies, for tests that run its commands."""
    config.repository = Path(__file__).parents[1]
