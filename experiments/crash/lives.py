"""One life of a run, in a process of its own: what it saw, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from experiments.crash.places import ROOMS, At, Places, watch_calls, watch_writes
from experiments.crash.runs import COMBINATIONS, Net, make_trainer
from lightning_compress.callbacks.verdict import targets_of

__all__ = ["KILLED", "apart", "live"]

KILLED = -signal.SIGKILL
_LIMIT = 900.0  # seconds of one life, of a machine that has other things to do
_TIMED = (
    "seconds",
    "latency_ms",
    "latency_ms_float",
    "latency_ms_float_quartiles",
    "latency_ms_quartiles",
    "latency_ms_pytorch",
    "latency_ms_pytorch_quartiles",
    "times_faster",
    "cpu",
    "versions",
    "date",
    "path",
    "command",
)


def apart(call: Callable[[], object], log: Path, moment: float | None = None) -> int:
    """Call in a process of its own; gives its exit status, negative for the signal that ended it.

    Args:
        call: What to call.
        log: Where it writes what it prints.
        moment: Seconds after which it is killed; the process still running then.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if not pid:
        _call(call, log)
    watched = os.pidfd_open(pid)
    try:
        if not select.select([watched], [], [], _LIMIT if moment is None else moment)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(watched)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _call(call: Callable[[], object], log: Path) -> None:
    """In the child: never returns."""
    status = 1
    try:
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(written, stream)
        tempfile.tempdir = str(log.parent)
        call()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Trace(pl.Callback):
    """What a life goes through, line by line, in the order in which Lightning does it."""

    def __init__(self, path: Path, places: Places) -> None:
        self.path = path
        self.places = places
        self.events: list[str] = []

    def _note(self, event: str) -> None:
        self.events.append(event)
        self.places.hit(f"event {len(self.events)}")
        with self.path.open("a") as file:
            file.write(f"{event}\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From which step on."""
        self._note(f"from {trainer.global_step}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Which batch, at which step."""
        self._note(f"epoch {trainer.current_epoch} step {trainer.global_step} batch {int(batch[2])}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """When it validates."""
        if not trainer.sanity_checking:
            self._note(f"validation at {trainer.global_step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """When it is over."""
        self._note(f"the end at {trainer.global_step}")


def live(name: str, folder: Path, places: Places, trace: Path, result: Path, ours: bool = True) -> None:
    """One life: what a user's script does, who starts it again after a kill.

    Args:
        name: Of the combination.
        folder: Of the run.
        places: Where it is killed.
        trace: File of what it goes through.
        result: File of what it leaves behind.
        ours: Whether our callbacks are there.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    combination = COMBINATIONS[name]
    torch.manual_seed(0)
    module = Net(combination.plain)
    seen = Trace(trace, places)
    trainer = make_trainer(combination, folder, seen, At(places, "behind"), ours)
    trainer.callbacks.insert(1, At(places, "before"))  # type: ignore[attr-defined]
    watch_writes(places)
    if not places.place or places.place in ROOMS:
        watch_calls(places)
    begin = time.perf_counter()
    trainer.fit(module, ckpt_path="last")
    sys.setprofile(None)
    found = {"seconds": time.perf_counter() - begin, "counts": dict(places.counts), "events": seen.events}
    torch.save(found | left(trainer, module, folder), result)


def left(trainer: pl.Trainer, module: pl.LightningModule, folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, but seconds."""
    states: dict[str, Any] = {}
    savers: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = json.loads(json.dumps(callback.state_dict(), default=_digest)) if callback.state_dict() else {}
        state.pop("seconds", None)
        kind = savers if isinstance(callback, ModelCheckpoint) else states
        kind[callback.state_key] = state
    states, savers = json.loads(json.dumps([states, savers]).replace(str(folder), "."))
    return {
        "weights": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "rates": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callbacks": states,
        "checkpoints": savers,
        "targets": [dict(row) for row in targets_of(trainer)],
        "files": _files(folder),
    }


def _digest(value: Any) -> Any:
    """A tensor as words that tell its bits."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
    return repr(value)


def _files(folder: Path) -> dict[str, Any]:
    """What lies in the folder of a run beside its checkpoints; of a report what no clock has measured."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith("checkpoints/"):
            continue
        if path.name == "report.json":
            found[name] = _untimed(json.loads(path.read_text()))
        else:
            known = path.suffix in (".safetensors", ".onnx")
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if known else "there"
    return found


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if k not in _TIMED}
    if isinstance(value, list):  # a warning may be of milliseconds
        return [_untimed(x) for x in value if not (isinstance(x, str) and " ms " in x)]
    return value
