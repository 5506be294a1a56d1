"""The metric of a command: ``monitor`` and ``mode``, given once or by section, refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_compress.tasks.pareto import show
from lightning_compress.tasks.train import train

from .test_commands import OWN, composed, in_process

HEIGHT = ["model._target_=tests.behaviour.test_judged.Logs", "+model.values={val/height: 0.5}"]
SECTIONS = ("search", "sensitivity", "pareto")


def options(folder: Path) -> list[str]:
    return [*OWN, *HEIGHT, "trainer.max_epochs=1", f"dir={folder}"]


def test_it_is_given_once_and_by_section() -> None:
    cfg = composed("monitor=val/height", "mode=min", "search.mode=max")
    assert [cfg[section].monitor for section in SECTIONS] == ["val/height"] * 3
    assert [cfg[section].mode for section in SECTIONS] == ["max", "min", "min"]
    assert all(composed()[section].mode is None for section in SECTIONS)


@pytest.mark.parametrize("task", ["search", "sensitivity"])
def test_a_task_asks_for_the_mode_before_it_trains(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, **__: pytest.fail("it trains"))
    for given, message in (
        ([], rf"{task}\.mode=None: the name of 'val/height' does not tell.*Accepted are 'max'"),
        ([f"{task}.monitor=val_f1"], rf"{task}\.monitor='val_f1': validation does not log it.*val/height"),
    ):
        with pytest.raises(ValueError, match=message):
            in_process(f"task={task}", *options(tmp_path), "budget.macs=1000", *given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["hopeless=0.1"], r"StopUnderperforming\.mode=None: the name of 'val/height'"),
        (["hopeless=0.1", "monitor=val_f1"], r"StopUnderperforming\.monitor='val_f1'"),
        (["compression=int8", "monitor=val_f1"], r"CompressionReport\.monitor='val_f1'"),
        (["mode=up"], r"mode='up': accepted are 'max', 'min' and None"),
    ],
)
def test_a_training_refuses_what_it_cannot_judge(given: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(composed(*options(tmp_path), *given))


def test_the_frontier_takes_the_runs_of_a_metric_and_asks_which_way_it_is_better(tmp_path: Path) -> None:
    for i, (name, value) in enumerate([("val/height", 0.5), ("val/height", 0.4), ("val_acc", 0.9)]):
        folder = tmp_path / str(i)
        folder.mkdir()
        totals = {"metric": value, "bytes": 100 + i, "bytes_zstd": 100 + i}
        report = {"metric": name, "compressed": totals, "artifacts": [], "latency_ms_pytorch": {}}
        (folder / "report.json").write_text(json.dumps(report))

    def best(monitor: str | None, mode: str | None = None) -> Any:
        show(tmp_path, OmegaConf.create({"monitor": monitor, "mode": mode, "cost": "bytes", "max_drop": 0.005}))
        found = json.loads((tmp_path / "pareto.json").read_text())
        return found["metric"], [run["name"] for run in found["runs"] if run["on_frontier"]]

    assert best("val_acc") == ("val_acc", ["2"])
    assert best("val/height", "max") == ("val/height", ["0"])
    assert best("val/height", "min") == ("val/height", ["0", "1"])
    for monitor, mode, message in (
        ("val/height", None, r"pareto\.mode=None: the name of 'val/height'"),
        ("val_f1", None, r"pareto\.monitor='val_f1': no report is of it.*: val/height, val_acc\."),
        (None, None, r"different metrics, val/height, val_acc.*pareto\.monitor"),
        ("val_acc", "up", r"pareto\.mode='up': accepted are"),
    ):
        with pytest.raises(ValueError, match=message):
            best(monitor, mode)
