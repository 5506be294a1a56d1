"""Whether each extra resolves, by Python version, with the lowest and the newest versions that it allows; in seconds.

What is found is not installed. Needs ``pip install uv``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RESOLUTIONS = {"newest": "highest", "lowest": "lowest-direct"}


def extras() -> list[str]:
    """The names of the extras; the first is empty, for what is installed without any."""
    text = (_ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return ["", *re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--extra, --python."""
    parser.add_argument("--extra", action="append", dest="names", choices=extras(), help="all without it")
    parser.add_argument("--python", action="append", dest="pythons", choices=PYTHONS, help="all without it")


def resolve(extra: str, python: str, resolution: str) -> tuple[float, int, str]:
    """Seconds, packages, and what went wrong."""
    uv = shutil.which("uv")
    if uv is None:
        raise FileNotFoundError("uv is not installed, which resolves without installing. Run: pip install uv")
    command = [uv, "pip", "compile", str(_ROOT / "pyproject.toml"), "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--resolution", resolution, *(["--extra", extra] if extra else [])]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        return seconds, 0, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
    return seconds, sum("==" in line for line in done.stdout.splitlines()), ""


def run(names: list[str] | None = None, pythons: list[str] | None = None) -> dict[str, Any]:
    """Headline: how many resolve, of how many, and the most seconds that one took."""
    rows: list[dict[str, Any]] = []
    for extra in names or extras():
        row: dict[str, Any] = {"extra": extra or "(none)"}
        for python in pythons or PYTHONS:
            for words, resolution in RESOLUTIONS.items():
                seconds, packages, failure = resolve(extra, python, resolution)
                row[f"{python} {words}"] = failure or f"{seconds:.1f} s, {packages}"
                row.setdefault("most seconds", 0.0)
                row["most seconds"] = max(row["most seconds"], seconds)
                row["failed"] = row.get("failed", 0) + bool(failure)
        print(row, flush=True)
        rows.append(row)
    headline = {"failed": sum(row["failed"] for row in rows), "most_seconds": max(row["most seconds"] for row in rows)}
    return {"headline": headline, "rows": rows, "failed": headline["failed"]}
