"""A sweep that Optuna steers, on an application of its own that takes no time; killed, broken, resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf

APP = """
import os, hydra
@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    with open(cfg.log, "a") as log:
        print(cfg.x, cfg.kind, cfg.n, file=log)
    num = len(open(cfg.log).read().splitlines())
    if num == cfg.kill_at:
        os._exit(9)
    if num == cfg.break_at:
        raise RuntimeError("no luck")
    if num == cfg.stop_at:
        return [float("nan")] * 2
    return [cfg.x, cfg.x ** 2 + (cfg.kind == "b")]
main()
"""
CONFIG = """
defaults: [_self_, {override hydra/sweeper: study}]
x: 0.0
kind: a
n: 1
log: ???
kill_at: 0
break_at: 0
stop_at: 0
hydra:
  sweeper:
    directions: [maximize, minimize]
    params: {x: "interval(0.0,1.0)", kind: "choice(a,b)", n: "range(1,5)"}
"""


def sweep(folder: Path, name: str, *overrides: str, ok: bool = True) -> tuple[str, list[str]]:
    """What a study printed, and what its jobs tried."""
    (folder / "app.py").write_text(APP)
    (folder / "app.yaml").write_text(CONFIG)
    log = folder / f"{name}.log"
    command = [sys.executable, "app.py", "-m", f"hydra.sweep.dir={folder / name}", f"log={log}", *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done.stdout + done.stderr, log.read_text().splitlines() if log.is_file() else []


def best(folder: Path, name: str) -> list[Any]:
    found = OmegaConf.to_container(OmegaConf.load(folder / name / "optimization_results.yaml"))["best"]
    return sorted((trial["values"], trial["params"]) for trial in found)


def test_killed_in_the_middle_it_goes_on_to_the_same_frontier(tmp_path: Path) -> None:
    _, whole = sweep(tmp_path, "whole", "hydra.sweeper.num_trials=14")
    assert len(whole) == 14
    _, killed = sweep(tmp_path, "killed", "hydra.sweeper.num_trials=14", "kill_at=7", ok=False)
    assert len(killed) == 7
    _, resumed = sweep(tmp_path, "killed", "hydra.sweeper.num_trials=14")
    assert resumed == [*whole[:7], *whole[6:]]  # the seventh again
    assert best(tmp_path, "killed") == best(tmp_path, "whole")
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'killed' / 'study.db'}")
    states = [trial.state.name for trial in study.trials]
    assert (states.count("COMPLETE"), states.count("FAIL")) == (14, 1)
    # a job that had ended when the sweep was killed counts, and then nothing is left to do
    left = study.ask()
    (tmp_path / "killed" / ".returned").mkdir(exist_ok=True)
    (tmp_path / "killed" / ".returned" / f"{left.number}.json").write_text("[0.25, 3.0]")
    assert sweep(tmp_path, "killed", "hydra.sweeper.num_trials=15")[1] == resumed
    assert study.trials[left.number].values == [0.25, 3.0]


def test_a_broken_trial_is_not_the_end_of_the_study(tmp_path: Path) -> None:
    text, tried = sweep(tmp_path, "broken", "hydra.sweeper.num_trials=6", "break_at=3")
    assert len(tried) == 7
    assert tried[2] != tried[3]
    assert "no luck" in text


def test_a_hopeless_trial_counts_and_is_not_on_the_frontier(tmp_path: Path) -> None:
    _, tried = sweep(tmp_path, "stopped", "hydra.sweeper.num_trials=6", "stop_at=3")
    assert len(tried) == 6
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'stopped' / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2 + ["PRUNED"] + ["COMPLETE"] * 3
    assert float(tried[2].split()[0]) not in [values[0] for values, _ in best(tmp_path, "stopped")]


def test_what_is_tried_lies_within_what_was_asked_for(tmp_path: Path) -> None:
    _, tried = sweep(tmp_path, "s", "hydra.sweeper.num_trials=6", "x=tag(log,interval(1e-3,1e-1))", "kind=b")
    for line in tried:
        x, kind, n = line.split()
        assert 1e-3 <= float(x) <= 1e-1
        assert kind == "b"
        assert 1 <= int(n) <= 4


def test_several_at_a_time_by_another_launcher(tmp_path: Path) -> None:
    options = ["hydra.sweeper.num_trials=5", "hydra.sweeper.num_parallel=2", "hydra/launcher=joblib"]
    _, tried = sweep(tmp_path, "s", *options)
    assert len(tried) == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.sweeper.num_trials=0", "num_trials=0: accepted is a whole number from 1"),
        ("hydra.sweeper.directions=[up]", "accepted is 'maximize' or 'minimize'"),
        ("x=glob(*)", "accepted are choice(...), interval(...) and range(...)"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_words(tmp_path: Path, override: str, message: str) -> None:
    text, tried = sweep(tmp_path, "s", override, ok=False)
    assert message in text
    assert not tried
