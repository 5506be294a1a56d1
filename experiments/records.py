"""Outcomes of trials as they are kept and committed: a file of JSON with a line a trial, and what it was made with."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.protocol import Outcome, Trial
from lightning_compress.files import write_whole

__all__ = ["FEATURES", "Records", "machine", "made_now", "said"]

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def machine() -> dict[str, str]:
    """The CPU, by its name and by what its kernels depend on."""
    info = Path("/proc/cpuinfo")
    lines = [line.split(":") for line in (info.read_text() if info.is_file() else "").splitlines() if ":" in line]
    told = {key.strip(): value.strip() for key, value in lines}
    flags = told.get("flags", "").split()
    return {
        "cpu": told.get("model name", platform.processor() or platform.machine()),
        "features": " ".join(feature for feature in FEATURES if feature in flags),
    }


def _commit() -> str:
    """The commit, with a + where the code is not the commit's."""
    code = ["--", ".", ":!experiments/results", ":!docs", ":!README.md"]
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", *code], capture_output=True, check=False).returncode
    return (asked.stdout.strip() or "unknown") + ("+" if changed else "")


def made_now(command: str) -> dict[str, str]:
    """What results are made with: the command, the commit, the day, versions and the CPU."""
    versions = {"python": platform.python_version(), "torch": metadata.version("torch")}
    return {"command": command, "commit": _commit(), "date": date.today().isoformat(), **versions, **machine()}


class Records:
    """The trials of a file, which is written anew after each one that is added, so that a stopped run goes on.

    Args:
        path: The file; it need not exist.
        command: What is called, as it stands in the file.
    """

    def __init__(self, path: Path, command: str = "") -> None:
        self.path = path
        kept = json.loads(path.read_text()) if path.is_file() else {"made": [], "trials": []}
        self.made: list[dict[str, str]] = kept["made"]
        self.outcomes: dict[Trial, Outcome] = {}
        for row in kept["trials"]:
            trial = Trial(**{key: row.pop(key) for key in Trial.__dataclass_fields__})
            self.outcomes[trial] = row
        now = made_now(command)
        if command and now not in self.made:
            self.made.append(now)
        self._by = self.made.index(now) if command else -1

    def add(self, trial: Trial, outcome: Mapping[str, Any]) -> None:
        """Keep an outcome, in the place of an older one of the same trial."""
        self.outcomes[trial] = {**outcome, "by": self._by}
        self.write()

    def write(self) -> None:
        """One line a trial, in an order that does not depend on when it ran."""
        rows = sorted((list(trial.plain.values()), {**trial.plain, **kept}) for trial, kept in self.outcomes.items())
        made = ",\n".join(f"  {json.dumps(one)}" for one in self.made)
        lines = ",\n".join(f"  {json.dumps(row)}" for _, row in rows)
        if rows:
            write_whole(self.path, f'{{"made": [\n{made}\n],\n"trials": [\n{lines}\n]}}\n')


def said(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
