"""Full, read-only and vanished folders, kills, and files that are cut or foreign."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from torch import nn

from lightning_compress import Phase, files, load_from_checkpoint
from lightning_compress.analysis.pareto import frontier
from lightning_compress.analysis.report import write_json
from lightning_compress.analysis.runs import Run
from lightning_compress.analysis.sensitivity import Sensitivity
from lightning_compress.analysis.show import write_html
from lightning_compress.callbacks import (
    CompressionReport,
    Export,
    GradualPruning,
    KnowledgeDistillation,
    QuantizationAwareTraining,
)
from lightning_compress.callbacks.sweep import StopUnderperforming
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.packed import save_packed
from lightning_compress.deploy.timing import Timed
from lightning_compress.files import write_whole
from lightning_compress.forward import Inputs
from lightning_compress.tasks import pareto
from lightning_compress.tasks.compose import start
from lightning_compress.tasks.objective import check_objective, value_in
from lightning_compress.tasks.search import Search, search

from ..nightly import some
from ..unit.test_report import make_report
from .small import Small, fit, make

SHORT = {"max_epochs": 1, "num_sanity_val_steps": 0}
PHASE = Phase(0.25, 0.5)


@pytest.fixture(autouse=True)
def _untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor drawn: both are seconds of tests."""
    for module in ("deploy.files", "callbacks.measure"):
        known = f"lightning_compress.{module}.time_together"
        monkeypatch.setattr(known, lambda calls, seconds=1: [Timed(1.0, 1.0, 1.0, (1.0, 1.0)) for _ in calls])
    monkeypatch.setattr("lightning_compress.callbacks.report.figures", lambda *_: {})


class Disk:
    """A folder on a disk of its own where the system lets us mount one; else one that is said to be full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.refuses = False
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
        self.is_mounted = done.returncode == 0

    def fill(self) -> None:
        self.refuses = not self.is_mounted
        if self.is_mounted:
            with pytest.raises(OSError, match="No space"):
                (self.folder / "other").write_bytes(bytes(2**23))

    def freeze(self) -> None:
        self.refuses = not self.is_mounted
        if self.is_mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)

    def release(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    to_disk = files._to_disk

    def refuse(path: Path) -> None:
        if made.refuses:
            raise OSError(errno.ENOSPC, "No space left on device")
        to_disk(path)

    monkeypatch.setattr(files, "_to_disk", refuse)
    yield made
    made.release()


class AtTheEnd(pl.Callback):
    """Something happens to the folder when training is over, and before anything of ours is written."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self.happens = happens

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.happens()


def ours(folder: Path) -> list[pl.Callback]:
    return [
        GradualPruning(0.5, phase=PHASE),
        CompressionReport(dirpath=folder, show=False),
        Export(["onnx"], dirpath=folder / "deploy", rehearse=False),
    ]


FILES = ("report.json", "report.html", "packed.safetensors", "deploy/model.onnx")


@pytest.mark.parametrize("what", some(["full", "read-only", "a file in the way"], "full"))
def test_a_folder_that_fails_after_training_costs_warnings_and_not_the_run(
    what: str, disk: Disk, tmp_path: Path
) -> None:
    folder = disk.folder / "run"
    folder.mkdir()
    (folder / "report.json").write_text("of an earlier run")
    happens = {"full": disk.fill, "read-only": disk.freeze}.get(what)

    def in_the_way() -> None:
        shutil.rmtree(folder)
        folder.write_text("a file")

    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, save_top_k=0)
    with pytest.warns(UserWarning, match="could not be written") as said:
        trainer = fit(tmp_path, make(), *ours(folder), AtTheEnd(happens or in_the_way), checkpoint, **SHORT)
    texts = [str(w.message) for w in said]
    assert trainer.state.finished
    assert load_from_checkpoint(Small, checkpoint.last_model_path)
    for name in ("report.json", "report.html"):
        assert any(f"{name} could not be written: " in t and "checkpoints are safe" in t for t in texts), (name, texts)
    assert any("packed.safetensors could not be written" in text for text in texts)
    (failed,) = [text for text in texts if "Export to onnx failed" in text]  # said once, by Export and not the report
    assert str(folder) in failed
    if what != "a file in the way":
        assert (folder / "report.json").read_text() == "of an earlier run"
        assert not [path for name in FILES for path in (folder / "version_1").glob(name)]


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    fit(tmp_path, make(), *ours(folder), AtTheEnd(lambda: folder.rmdir()), **SHORT)
    assert all((folder / name).is_file() for name in FILES)


@pytest.mark.parametrize("callback", [CompressionReport, Export])
def test_a_folder_that_cannot_be_is_refused_before_training(callback: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    name = f"{callback.__name__}.dirpath"
    for given in ("/proc/run", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=f"{name}='{given}': no file can be .* Give another one"):
            fit(tmp_path, make(), callback(dirpath=given), **SHORT)
    with pytest.raises(ValueError, match=f"{name}=None: no file can be written to '/proc/run"):
        fit(Path("/proc/run"), make(), callback(), **SHORT)


class Told(Export):
    """Knows its folder, and writes nothing."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass


def test_files_stand_in_the_loggers_folder_and_those_of_an_earlier_run_stay(tmp_path: Path) -> None:
    callback = Told(["onnx"], rehearse=False)
    for version in ("version_0", "version_1"):
        folder = tmp_path / "lightning_logs" / version
        trainer = fit(tmp_path, make(), CompressionReport(show=False), callback, logger=CSVLogger(tmp_path), **SHORT)
        assert callback.folder(trainer) == folder / "deploy"
        assert (folder / "report.json").is_file()
    for name in FILES:
        files.write_whole(tmp_path / name, "of an earlier run")
    fit(tmp_path, make(), CompressionReport(show=False), Export(["onnx"], rehearse=False), **SHORT)
    report = json.loads((tmp_path / "version_1" / "report.json").read_text())
    assert report["packed"]["path"] == str(tmp_path / "version_1" / "packed.safetensors")
    assert report["artifacts"][0]["path"] == str(tmp_path / "deploy" / "version_1" / "model.onnx")
    assert all((tmp_path / name).read_text() == "of an earlier run" for name in FILES)


def test_a_resumed_run_writes_where_it_would_have_written(tmp_path: Path) -> None:
    """Half of what it writes may stand there; what another run has left in another folder stays."""
    folder = tmp_path / "run"
    write_whole(folder / "report.json", "of an earlier run")
    fit(tmp_path, make(), *told(folder), saved=(2,), **SHORT)
    assert (folder / "version_1" / "report.json").exists()
    (folder / "version_1" / "report.html").unlink()
    write_whole(folder / "deploy" / "model.onnx", "half of this run's")
    again = told(folder)
    fit(tmp_path, make(), *again, ckpt_path=tmp_path / "2.ckpt", **SHORT)
    assert (folder / "version_1" / "report.html").exists()
    assert again[1].folder(None) == folder / "deploy"
    assert not (folder / "version_2").exists()
    assert (folder / "report.json").read_text() == "of an earlier run"

    elsewhere = tmp_path / "elsewhere"
    write_whole(elsewhere / "report.json", "of another run")
    write_whole(elsewhere / "deploy" / "model.onnx", "of another run")
    moved = told(elsewhere)
    fit(tmp_path, make(), *moved, ckpt_path=tmp_path / "2.ckpt", **SHORT)
    assert (elsewhere / "report.json").read_text() == "of another run"
    assert (elsewhere / "version_1" / "report.json").exists()
    assert moved[1].folder(None) == elsewhere / "deploy" / "version_1"


def told(folder: Path) -> list[Any]:
    return [CompressionReport(dirpath=folder, show=False), Told(["onnx"], dirpath=folder / "deploy", rehearse=False)]


# A kill inside each write.

PAIR = (nn.Linear(4, 3).eval(), nn.Linear(4, 3).eval())


def pareto_of(folder: Path, version: int) -> None:
    frontier("acc", [Run("a", 0.5 + version, 1, 1, 1.0, 1, 0.0, "")]).write(folder)


def search_of(folder: Path, version: int) -> None:
    cfg = OmegaConf.create({"search": {"epochs": version}})
    state = {"folder": folder, "budget": {}, "metric": "acc", "dense": 1.0, "tried": [], "points": [], "cfg": cfg}
    Search.write(SimpleNamespace(**state), None)  # type: ignore[arg-type]


def curve_of(folder: Path, version: int) -> None:
    callback = StopUnderperforming(folder)
    callback.curve = {"1": float(version)}
    callback._write(over=True)


def export_of(name: str) -> Callable[[Path, int], None]:
    kind = FORMATS[name]
    return lambda folder, v: kind.export(PAIR[v], Inputs((torch.ones(2, 4),), {}), folder / f"model{kind.suffix}")


WRITERS: dict[str, Callable[[Path, int], Any]] = {
    "report.json": lambda f, v: write_json(make_report(metric=f"m{v}"), f / "report.json"),
    "report.html": lambda f, v: write_html(make_report(metric=f"m{v}"), {}, f / "report.html"),
    "pareto": pareto_of,
    "search": search_of,
    "sensitivity": lambda f, v: Sensitivity(float(v)).write(f / "sensitivity.json"),
    "curve": curve_of,
    "packed": lambda f, v: save_packed(PAIR[v], f / "packed.safetensors"),
    "onnx": export_of("onnx"),
}
RUNTIMES = [pytest.param(name, marks=pytest.mark.runtimes) for name in FORMATS if name != "onnx"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("writer", [*WRITERS, *RUNTIMES])
def test_a_kill_inside_a_write_leaves_the_old_files_whole(writer: str, tmp_path: Path) -> None:
    write = WRITERS.get(writer) or export_of(writer)
    write(tmp_path, 0)
    before = contents(tmp_path)
    for inside in ("fsync", "replace"):
        if not (pid := os.fork()):
            setattr(os, inside, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            write(tmp_path, 1)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert contents(tmp_path) == before
    write(tmp_path, 1)
    assert contents(tmp_path).keys() == before.keys()
    assert contents(tmp_path) != before


# What cannot be read.


def write_runs(folder: Path) -> None:
    for name, metric in (("0", 0.9), ("1", 0.8)):
        report = make_report(metric="val_acc", artifacts=[], latency_ms_pytorch={})
        report["compressed"]["metric"] = metric
        files.write_whole(folder / name / "report.json", json.dumps(report))
    whole = (folder / "0" / "report.json").read_text()
    foreign = '{"artifacts": [], "compressed": {"metric": "x"}}'
    for name, text in (("cut", whole[:200]), ("list", "[]"), ("foreign", foreign)):
        files.write_whole(folder / name / "report.json", text)
    (folder / "bytes").mkdir()
    (folder / "bytes" / "report.json").write_bytes(b"\xff\xfe\x00")


def test_a_report_that_is_cut_costs_the_frontier_that_run_also_on_a_full_disk(
    disk: Disk, capsys: pytest.CaptureFixture
) -> None:
    write_runs(disk.folder)
    disk.fill()
    with pytest.warns(UserWarning, match=r"pareto\.html could not be written: .*No space"):
        pareto.show(disk.folder, SimpleNamespace(cost="bytes", max_drop=0.1, monitor=None, mode=None))
    said = capsys.readouterr().out
    assert "2 runs, val_acc against bytes" in said
    for name in ("cut", "list", "foreign", "bytes"):
        assert f"left out {name}: what it left cannot be read (" in said
    assert not list(disk.folder.glob("pareto*"))


def checkpoint(folder: Path) -> Path:
    quantize = QuantizationAwareTraining(calibrate=PHASE, phase=Phase(0.5, 1.0))
    fit(folder, make(), quantize, **SHORT).save_checkpoint(folder / "whole.ckpt")
    return folder / "whole.ckpt"


def nan_ranges(path: Path) -> None:
    found = torch.load(path, weights_only=True)
    (state,) = (state for state in found["callbacks"].values() if "quantization" in state)
    next(iter(state["quantization"]["ranges"].values()))[0] = torch.nan
    torch.save(found, path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights " * 100),
    "a list": lambda path: torch.save([1], path),
    "of no Trainer": lambda path: torch.save({"model": {}}, path),
}


def resume(path: Path) -> None:
    quantize = QuantizationAwareTraining(calibrate=PHASE, phase=Phase(0.5, 1.0))
    fit(path.parent, make(), quantize, ckpt_path=path, **SHORT)


READERS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: load_from_checkpoint(Small, path),
    "ckpt_path": resume,
    "KnowledgeDistillation.teacher": lambda path: fit(path.parent, make(), KnowledgeDistillation(path), **SHORT),
    "init_from": lambda path: start(
        OmegaConf.create(
            {
                "seed": 0,
                "init_from": str(path),
                "init_strict": True,
                "weights_only": None,
                "model": {"_target_": f"{__name__}.make"},
                "data": None,
            }
        ),
        [],
        None,
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("field", READERS)
def test_a_checkpoint_that_is_cut_or_foreign_is_refused_by_name(field: str, whole: Path, tmp_path: Path) -> None:
    for damage in DAMAGE.values():
        path = Path(shutil.copy(whole, tmp_path / "some.ckpt"))
        damage(path)
        with pytest.raises(
            ValueError, match=rf"{field}='.*some\.ckpt' cannot be read as a checkpoint: .* Give another"
        ):
            READERS[field](path)


@pytest.mark.parametrize("field", ["path", "ckpt_path"])
def test_a_checkpoint_with_nan_in_its_ranges_is_refused(field: str, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(whole, tmp_path / "some.ckpt"))
    nan_ranges(path)
    with pytest.raises(ValueError, match=r"quantizes \S+ by a range of nan to .* Give a checkpoint from before"):
        READERS[field](path)


# What names nothing.


@pytest.mark.parametrize("name", ["compressed.acc", "controll.metric", "metric.x", "artifacts.first", "accuracy"])
def test_an_objective_that_no_report_has_is_refused_before_training(name: str) -> None:
    with pytest.raises(ValueError, match=f"objective='{name}': there is no .* Accepted in its place is "):
        check_objective(name)


def test_an_objective_that_this_run_has_not_is_named() -> None:
    report = make_report()
    check_objective("artifacts.0.latency_ms.1")
    assert value_in(report, "artifacts.0.latency_ms.1") == 0.25
    assert value_in(report, "control.metric") is None
    for name in ("artifacts.1.metric", "artifacts.0.latency_ms.7"):
        with pytest.raises(ValueError, match=f"objective='{name}': there is no"):
            value_in(report, name)


@pytest.mark.parametrize("given", ["abc", True, float("nan"), float("inf"), [1], -1])
def test_a_budget_that_is_no_number_is_refused(given: object, tmp_path: Path) -> None:
    node = {"_target_": "some.Class"}
    fields = {"compression": {}, "model": node, "data": node, "init_from": None, "ckpt_path": None}
    fields |= {"init_strict": True, "weights_only": None}
    cfg = OmegaConf.create({**fields, "dir": str(tmp_path), "budget": {"bytes": given}})
    with pytest.raises(ValueError, match=r"budget=\{'bytes': .*each above 0 and a number. Give budget.bytes=20000"):
        search(cfg)
