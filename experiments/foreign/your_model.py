"""python -m experiments.foreign.your_model: runs the scripts of docs/your-model, and prints the seconds of each."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["ROOT", "SCRIPTS", "run"]

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in ROOT.glob("docs/your-model/*.py"))
# names torchvision's operators, without which timm is not imported beside a torch of another build
_RUN = "import experiments.foreign, runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


def run(script: str) -> tuple[float, float, list[str]]:
    """Seconds and CPU seconds of a script that has left a report and a file, and the targets that its report misses.

    Raises:
        RuntimeError: If it failed, or left none.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _RUN, str(ROOT / f"docs/your-model/{script}.py")]
        begin, used = time.monotonic(), _cpu_seconds()
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        seconds, used = time.monotonic() - begin, _cpu_seconds() - used
        reports = list(Path(folder).glob("runs/*/report.json"))
        files = list(Path(folder).glob("runs/*/deploy/model.onnx"))
        if done.returncode or len(reports) != 1 or len(files) != 1:
            raise RuntimeError(f"{script} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        missed = [row["target"] for row in json.loads(reports[0].read_text())["targets"] if row["missed"]]
    return seconds, used, missed


def _cpu_seconds() -> float:
    """Those of all processes that were started here and have ended."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scripts", nargs="*", help=", ".join(SCRIPTS))
    for name in parser.parse_args().scripts or SCRIPTS:
        taken, worked, not_reached = run(name)
        # an untrained net decides by a hair, and its file may decide otherwise
        said = f", missed: {', '.join(not_reached)}" if not_reached else ""
        print(f"{name:<18}{taken:6.1f} s, {worked:5.1f} s of a CPU{said}", flush=True)
