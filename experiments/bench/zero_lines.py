"""Applications that know nothing of this package, pruned by LIGHTNING_COMPRESS alone: not a line of them is changed.

Each of ``experiments/foreign/applications`` runs with the variable unset, to see what of this package is imported, and
with it. Where it takes a checkpoint, another run is killed (SIGKILL) behind its third epoch, and taken up from the
checkpoint that Lightning wrote by then. Sparsities are those of the report in the folder of the run. Needs the
environment of ``make test-foreign``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "foreign" / "applications"
ROOT = Path(__file__).parents[2]
PRUNE = "magnitude prune.sparsity=.8 prune.phase.begin=.1 prune.phase.end=.6 prune.every=1 export=null"
# where the run's length is not known before it has run
BY_EPOCHS = PRUNE.replace(".begin=.1", ".begin=1").replace(".end=.6", ".end=4 prune.phase.unit=epoch")
# runs a script as its user does, and says what of this package it has imported
_RUN = """
import experiments.foreign, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("IMPORTED", sorted(name for name in sys.modules if name.partition(".")[0] == "lightning_compress"))
"""


class Application(NamedTuple):
    """An application.

    Args:
        package: Whose it is.
        script: The file.
        arguments: What it is called with.
        resumes: What goes before the path of a checkpoint; None where it takes none.
        variable: What LIGHTNING_COMPRESS is set to.
    """

    package: str
    script: str
    arguments: tuple[str, ...] = ()
    resumes: tuple[str, ...] | None = None
    variable: str = PRUNE


APPLICATIONS = {
    "SCVI": Application("scvi-tools", "scvi_cells"),
    "LinearSCVI": Application("scvi-tools", "scvi_linear"),
    "chemprop train": Application("chemprop", "molecules"),
    "DeepAR": Application("gluonts", "gluonts_series", ("DeepAREstimator",), (), BY_EPOCHS),
    "SimpleFeedForward": Application("gluonts", "gluonts_series", ("SimpleFeedForwardEstimator",), (), BY_EPOCHS),
    "PatchTST": Application("gluonts", "gluonts_series", ("PatchTSTEstimator",), (), BY_EPOCHS),
    "TFT": Application("pytorch-forecasting", "forecasting", ("TemporalFusionTransformer",), ()),
    "N-BEATS": Application("pytorch-forecasting", "forecasting", ("NBeats",), ()),
    "transformer demo": Application("lightning", "transformer", (), ()),
    "LightningCLI demo": Application(
        "lightning", "demo_cli", ("fit", "--trainer.max_epochs=6", "--trainer.accelerator=cpu"), ("--ckpt_path",)
    ),
    "NHITS": Application("neuralforecast", "neural"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--application."""
    parser.add_argument("--application", choices=list(APPLICATIONS), action="append", dest="applications")


def start(application: Application, folder: Path, variable: str | None, *more: str) -> subprocess.Popen[str]:
    """The application, running in a folder of its own; what it prints is in ``printed`` there."""
    kept = {key: value for key, value in os.environ.items() if key != "LIGHTNING_COMPRESS"}
    given = {} if variable is None else {"LIGHTNING_COMPRESS": variable}
    command = [sys.executable, "-c", _RUN, str(FOLDER / f"{application.script}.py"), *application.arguments, *more]
    environment = {**kept, **given, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder.mkdir()
    with (folder / "printed").open("w") as printed:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=printed, stderr=printed, text=True)


def call(application: Application, folder: Path, variable: str | None, *more: str) -> tuple[int, str]:
    """Exit status and output of the application."""
    status = start(application, folder, variable, *more).wait()
    return status, (folder / "printed").read_text()


def sparsity(folder: Path) -> float | None:
    """That of the report in a folder; None without one."""
    report = next(folder.rglob("report.json"), None)
    return None if report is None else json.loads(report.read_text())["compressed"]["sparsity"]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """The row of one application."""
    application = APPLICATIONS[name]
    row: dict[str, Any] = {"application": name, "package": application.package}
    status, text = call(application, folder / "plain", None)
    imported = next((line for line in text.splitlines() if line.startswith("IMPORTED")), "")
    row["imported when unset"] = imported.removeprefix("IMPORTED ") if not status else f"fails: {_last(text)}"
    status, text = call(application, folder / "pruned", application.variable)
    found = sparsity(folder / "pruned")
    if status or found is None:
        return row | {"outcome": f"refused: {_last(text)}", "sparsity": 0.0, "resumed": "-"}
    row["outcome"] = "missed" if "target not reached" in text else "reached"
    row["sparsity"] = found
    row["resumed"] = "-" if application.resumes is None else resumed(application, folder)
    return row


def resumed(application: Application, folder: Path) -> str:
    """The sparsity of a run that is taken up where another one was killed."""
    running = start(application, folder / "killed", application.variable)
    saved = None
    while saved is None and running.poll() is None:
        saved = next((path for path in (folder / "killed").rglob("*.ckpt") if "epoch=2" in path.name), None)
        time.sleep(0.01)
    if saved is None:
        return "no checkpoint of the third epoch"
    time.sleep(0.3)  # until it is whole
    paths = sorted((folder / "killed").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    taken = folder / paths[-1].name
    shutil.copy(paths[-1], taken)
    running.kill()
    running.wait()
    assert application.resumes is not None
    status, text = call(application, folder / "resumed", application.variable, *application.resumes, str(taken))
    found = sparsity(folder / "resumed")
    if status or found is None:
        return f"fails: {_last(text)}"
    return f"{found:.3f}, from {taken.stem.partition('-')[0]}"


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if "Error" in line]
    return lines[-1][:160] if lines else text.strip().splitlines()[-1][:160]


def run(applications: list[str] | None = None) -> dict[str, Any]:
    """Headline: how many applications reach the target, and are resumed."""
    rows = []
    for name in applications or APPLICATIONS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder)))
        print(rows[-1], flush=True)
    headline = {
        "applications": len(rows),
        "reached": sum(row["outcome"] == "reached" for row in rows),
        "resumed": sum(row["resumed"].startswith("0.") for row in rows),
    }
    return {"headline": headline, "rows": rows}
