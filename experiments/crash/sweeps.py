"""What is no training, killed: an Optuna study in sqlite, the cache of a sensitivity, the reports behind a frontier."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import hydra
import optuna
import torch
from omegaconf import DictConfig
from optuna.storages._rdb import storage

from experiments.crash.lives import KILLED, apart
from experiments.crash.places import Kill, Places, watch_files
from experiments.crash.runs import Net
from experiments.crash.trials import Outcome
from lightning_compress import files
from lightning_compress.analysis import pareto, runs
from lightning_compress.analysis.sensitivity import sensitivity
from lightning_compress.tasks import remembered

__all__ = ["SWEEPS", "choose_sweeps", "try_sweep"]

_CONFIG = """
defaults: [_self_, {override hydra/sweeper: study}]
x: 0.0
n: 1
log: ???
hydra:
  output_subdir: null
  job_logging: {root: {handlers: []}, disable_existing_loggers: false}
  sweeper:
    num_trials: 6
    directions: [maximize, minimize]
    params: {x: "interval(0.0,1.0)", n: "range(1,5)"}
"""


def study(folder: Path, places: Places) -> None:
    """A sweep, each of whose jobs writes down when it begins and ends."""
    sweeper = find_spec("hydra_plugins.lightning_compress_study")
    assert sweeper is not None
    watch_files(places, {"study": (str(sweeper.origin),), "study's sqlite": (storage.__file__,)})
    (folder / "app.yaml").write_text(_CONFIG)

    def job(cfg: DictConfig) -> list[float]:
        _append(folder / "log", f"begins {cfg.x} {cfg.n}")
        places.hit("a job of a study")
        _append(folder / "log", f"ends {cfg.x} {cfg.n}")
        return [cfg.x, cfg.x**2 + cfg.n]

    sys.argv = ["app", "-m", f"hydra.sweep.dir={folder / 'sweep'}", f"log={folder / 'log'}"]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    hydra.main(version_base="1.3", config_path=str(folder), config_name="app")(job)()


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


def left_of_study(folder: Path) -> dict[str, object]:
    """What a study came to: the values of each trial that is complete, and whether a job that ended was done again."""
    found = optuna.load_study(study_name="study", storage=f"sqlite:///{folder / 'sweep' / 'study.db'}")
    complete = [trial for trial in found.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    ended = [line for line in (folder / "log").read_text().splitlines() if line.startswith("ends")]
    return {
        "tried": sorted((trial.params["x"], trial.params["n"], *trial.values) for trial in complete),
        "complete": len(complete),
        "running": sum(trial.state == optuna.trial.TrialState.RUNNING for trial in found.trials),
        "done twice": len(ended) - len(set(ended)),
        "best": (folder / "sweep" / "optimization_results.yaml").exists(),
    }


def cached(folder: Path, places: Places) -> None:
    """A sensitivity whose evaluations are remembered."""
    watch_files(places, {"sensitivity": (remembered.__file__,), "sensitivity's file": (files.__file__,)})
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))

    def evaluate(model: torch.nn.Module) -> float:
        _append(folder / "log", "evaluated")
        return float(model(x).square().mean())

    known = remembered.Remembered(evaluate, folder / "cache.json", "noise")
    found = sensitivity(net, known, sparsities=[0.5, 0.9], bits=[4])
    found.seconds = 0.0
    found.write(folder / "sensitivity.json")


def left_of_cached(folder: Path) -> dict[str, object]:
    """The rows, and how many evaluations more than one were lost to a kill."""
    num = len((folder / "log").read_text().splitlines())
    rows = json.loads((folder / "sensitivity.json").read_text())
    return {"rows": rows, "lost": max(0, num - 1 - (1 + len(rows["rows"])))}


def compared(folder: Path, places: Places) -> None:
    """Jobs that each leave a report, those that are there already left out, and the frontier of all."""
    watch_files(places, {"frontier": (pareto.__file__, runs.__file__), "frontier's files": (files.__file__,)})
    for i in range(4):
        totals = {"metric": 0.9 - 0.01 * i, "bytes": 400 - 50 * i, "bytes_zstd": 300 - 40 * i, "macs": 10}
        report = {"metric": "val_acc", "compressed": totals, "artifacts": [], "latency_ms_pytorch": {"1": 1.0}}
        if not (folder / "runs" / str(i) / "report.json").exists():
            files.write_whole(folder / "runs" / str(i) / "report.json", json.dumps(report))
    metric, found = runs.read_runs(folder / "runs")
    pareto.frontier(metric, found).write(folder / "runs")


def left_of_compared(folder: Path) -> dict[str, object]:
    """All files by their content; a picture's by its name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".log", ".html"))
    return {str(p.relative_to(folder)): "there" if p.suffix == ".png" else p.read_text() for p in paths}


SWEEPS: dict[str, tuple[Callable[[Path, Places], None], Callable[[Path], dict[str, object]]]] = {
    "Optuna study": (study, left_of_study),
    "sensitivity": (cached, left_of_cached),
    "pareto": (compared, left_of_compared),
}


def choose_sweeps(name: str, folder: Path, num: int) -> Iterator[tuple[Kill, int]]:
    """Where one is killed, evenly over what it does; each with the count of calls at which it is.

    Args:
        name: Of what is killed.
        folder: A folder for a whole one, which is counted.
        num: Kills at each place.
    """
    folder.mkdir(parents=True)
    apart(partial(_count, name, folder), folder / "counted.log")
    counts = json.loads((folder / "counts.json").read_text())
    chance = random.Random(name)
    for place, count in counts.items():
        for i in range(num):
            at = (i + chance.random()) / num
            yield Kill(place, at), 1 + int(at * count)


def _count(name: str, folder: Path) -> None:
    places = Places()
    (folder / "whole").mkdir()
    SWEEPS[name][0](folder / "whole", places)
    sys.setprofile(None)
    (folder / "counts.json").write_text(json.dumps(places.counts))


def try_sweep(name: str, kill: Kill, number: int, whole: Path, folder: Path) -> Outcome:
    """Kill one, start it again, and compare it with a whole one."""
    do, left = SWEEPS[name]
    try:
        folder.mkdir(parents=True)
        status = apart(partial(do, folder, Places(kill.place, number)), folder / "killed.log")
        if status != KILLED:
            return Outcome(name, kill, "lost" if status else "not killed", words=_said(folder / "killed.log"))
        if apart(partial(do, folder, Places()), folder / "again.log"):
            return Outcome(name, kill, "lost", words=_said(folder / "again.log"))
        expected = left(whole / "whole")
        found = left(folder)
        words = [f"{key}: {expected.get(key)} != {found.get(key)}"[:300] for key in {**expected, **found}]
        words = [
            text for key, text in zip({**expected, **found}, words, strict=True) if expected.get(key) != found.get(key)
        ]
        return Outcome(name, kill, "unexplained" if words else "identical", words=tuple(words))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _said(log: Path) -> tuple[str, ...]:
    return tuple(log.read_text().strip().splitlines()[-3:])
