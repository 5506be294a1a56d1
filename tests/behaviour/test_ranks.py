"""A handful of the runs in many processes; ``make test-ranks`` runs all of them and prints a table."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .launching import LAUNCHINGS

# All in one process that forks, for importing torch takes longer than most of them.
RUNS = {
    "ddp 2": ["QAT(w4a8)"],
    "ddp 4": ["GradualPruning(Taylor)"],
    "fsdp2 2": ["Distillation"],
    "ddp_fork 2": ["Channels, prune, QAT", "Guard(sparsity)"],
    "dies": ["rank 0 is interrupted, sharded", "a criterion fails on rank 0, for both"],
    "static 2": ["Channels, prune, QAT"],
    "others": ["synchronized norms"],
    "launched": list(LAUNCHINGS),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("many") / "found.json"
    command = [sys.executable, "-m", "tests.behaviour.many", json.dumps(RUNS), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in RUNS.items() for case in cases])
def test_many_processes(kind: str, case: str, found: dict[str, str]) -> None:
    assert "FAILED" not in found[f"{kind}: {case}"], found[f"{kind}: {case}"]
