"""What compression costs, in one table: steps, memory, mask updates, QAT, planning, conversion, latency by runtime.

Runs the benchmarks that measure these, each in a process of its own, one after another, and keeps what they printed in
experiments/results/costs.json with the command, the commit, the versions and the CPU. Where the CPU has VNNI, files are
timed once more on the same CPU made to hide it. Machines are added, not replaced. For an idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.avx2 import environment
from experiments.records import machine, made_now, said
from lightning_compress.files import write_whole

RESULTS = Path("experiments/results/costs.json")
# by name: the benchmark and its arguments
ITEMS: dict[str, list[str]] = {
    "step_overhead": ["step_overhead"],
    "mask_update 25M": ["mask_update", "--num-params", "25e6"],
    "mask_update 110M": ["mask_update", "--num-params", "110e6"],
    "mask_update 1e9": ["mask_update", "--num-params", "1e9", "--repeats", "3"],
    "qat_step": ["qat_step"],
    "plan": ["plan"],
    "deploy": ["deploy", "--steps", "100", "--net", "ResNet-20", "--net", "ViT"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--item, --results."""
    parser.add_argument("--item", choices=list(ITEMS), action="append", dest="items", help="all without it")
    parser.add_argument("--results", type=Path, default=RESULTS)


def measure(arguments: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    """What a benchmark found."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "experiments.bench", *arguments, "--json", str(path)]
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def run(items: list[str] | None = None, results: Path = RESULTS) -> dict[str, Any]:
    """Headline: that of every benchmark, by its name."""
    kept: list[dict[str, Any]] = json.loads(results.read_text()) if results.is_file() else []
    headline: dict[str, float] = {}
    rows = []
    hidden = environment() if "vnni" in machine()["features"] else None
    for name in items or ITEMS:
        for env in [None, *([hidden] if name == "deploy" and hidden else [])]:
            said(f"{name}{', VNNI hidden' if env else ''}")
            made = made_now(f"python -m experiments.bench {' '.join(ITEMS[name])}")
            made |= {"features": "avx2"} if env else {}
            found = measure(ITEMS[name], env)
            same = {"item": name, "cpu": made["cpu"], "features": made["features"]}
            kept = [one for one in kept if any(one[key] != value for key, value in same.items())]
            kept.append(same | made | {"headline": found["headline"], "rows": found["rows"]})
            write_whole(results, json.dumps(sorted(kept, key=lambda one: one["item"]), indent=1) + "\n")
            told = {f"{name}{' without VNNI' if env else ''}: {key}": v for key, v in found["headline"].items()}
            headline |= told
            rows += [{"what": key, "value": value} for key, value in told.items()]
    return {"headline": headline, "rows": rows}
