"""What reads files of ours, each given a damaged one."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from experiments.mutations import FORGERIES, WOUNDS, Parts, damaged_value, parts_of
from experiments.specimens import Specimen, make_specimens, same
from lightning_compress import Phase, load_from_checkpoint
from lightning_compress.analysis.runs import read_runs
from lightning_compress.analysis.sensitivity import Row, Sensitivity
from lightning_compress.callbacks import ChannelPruning, QuantizationAwareTraining
from lightning_compress.checks import is_number
from lightning_compress.deploy.packed import load_packed
from lightning_compress.tracking import OfflineRun, read_offline_run

__all__ = ["READERS", "Attempt", "prepare"]

_MIB = 2**20
# What a file may take: four times what it may claim, the index, and the model.
_PACKED = 4 * 2**27 + 192 * _MIB
_PACKED_PER_BYTE = 4 * 2**14
_OTHERS = 192 * _MIB

# words of Python for what the file is to blame for
_VAGUE = re.compile(r"\((Memory|Recursion|Key|Index|Attribute|Type|Overflow|Assertion|UnboundLocal|ZeroDivision)Error")

_SPECIMENS: list[Specimen] = []
_PARTS: list[Parts] = []
_WHOLE: dict[str, Any] = {}  # what else is damaged, by reader


@dataclass
class Attempt:
    """A damaged file, and how it is read.

    Args:
        path: The file.
        what: Which file was damaged.
        damage: The kind of damage.
        read: Reads it.
        judge: Of what was read, the outcome in a word, and what is wrong with it.
        most_bytes: That reading may take.
    """

    path: Path
    what: str
    damage: str
    read: Callable[[], Any]
    judge: Callable[[Any], tuple[str, str]]
    most_bytes: int = _OTHERS

    def lacks(self, error: ValueError) -> str:
        """What a refusal does not say."""
        text = str(error)
        if str(self.path) not in text:
            return f"the file is not named: {text[:300]}"
        return f"nothing is explained: {text[:300]}" if self.most_bytes > _OTHERS and _VAGUE.search(text) else ""


class Small(pl.LightningModule):
    """What the checkpoint is of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Any loss."""
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any."""
        return torch.optim.SGD(self.parameters(), 0.05)

    def train_dataloader(self) -> Any:
        """Eight batches of noise."""
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(x, 4)  # type: ignore[arg-type]


def prepare(folder: Path) -> None:
    """Make what is to be damaged."""
    if _SPECIMENS:
        return
    _SPECIMENS.extend(make_specimens(folder))
    _PARTS.extend(parts_of(specimen.data) for specimen in _SPECIMENS)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    callbacks: list[Any] = [
        ChannelPruning(0.5, phase=Phase(0.0, 0.25)),
        QuantizationAwareTraining(calibrate=Phase(0.25, 0.5), phase=Phase(0.5, 1.0)),
    ]
    trainer = pl.Trainer(max_steps=8, callbacks=callbacks, **quiet)
    trainer.fit(Small())
    trainer.save_checkpoint(folder / "whole.ckpt", weights_only=True)
    _WHOLE["checkpoint"] = torch.load(folder / "whole.ckpt", weights_only=True)
    rows = [Row(layer, kind, level, 0.9, 0.05) for layer in "ab" for kind, level in (("sparsity", 0.5), ("bits", 4))]
    Sensitivity(0.95, rows, 1.5, 2, {"a": 0.5}).write(folder / "whole.json")
    _WHOLE["sensitivity"] = (folder / "whole.json").read_bytes()
    totals = {"metric": 0.9, "bytes": 900, "bytes_zstd": 800, "macs": 7, "sparsity": 0.25}
    file = {"metric": 0.89, "bytes": 300, "bytes_zstd": 200, "latency_ms": {"1": 0.5, "64": 9.0}}
    target = {"callback": "A", "target": "b", "asked": 0.5, "reached": 0.4, "missed": True, "because": "it was short"}
    report = {"metric": "val_acc", "compressed": totals, "artifacts": [file], "latency_ms_pytorch": {"1": 1.0}}
    _WHOLE["report"] = json.dumps({**report, "targets": [target]}).encode()
    _WHOLE["offline run"] = _offline()


def _offline() -> bytes:
    """A run of W&B, in records of its format."""
    from wandb.proto import wandb_internal_pb2

    first, second = wandb_internal_pb2.Record(), wandb_internal_pb2.Record()  # type: ignore[attr-defined]
    first.run.run_id = "abc"
    first.run.config.update.add(key="lr", value_json="0.1")
    second.history.item.add(key="loss", value_json="0.5")
    file = b":W&B\xe1\xbe\0"
    for record in (first, *[second] * 20):
        body = b"\1" + record.SerializeToString()
        file += zlib.crc32(body).to_bytes(4, "little") + (len(body) - 1).to_bytes(2, "little") + body
    return file


def _packed(rng: random.Random, folder: Path) -> Attempt:
    i, j = rng.randrange(len(_SPECIMENS)), rng.randrange(len(_SPECIMENS))
    specimen, other = _SPECIMENS[i], _SPECIMENS[j]
    path = folder / "damaged.safetensors"
    wounded = rng.random() < 0.4
    if wounded:
        damage = rng.choice(list(WOUNDS))
        content = WOUNDS[damage](specimen.data, other.data, rng)
    else:
        damage = rng.choice(list(FORGERIES))
        content = FORGERIES[damage](copy.deepcopy(_PARTS[i]), copy.deepcopy(_PARTS[j]), rng)
    path.write_bytes(content)
    fresh = specimen.fresh if rng.random() < 0.25 else None

    def read() -> Any:
        if fresh is None:
            return load_packed(path)
        model = fresh()
        state = load_packed(path, model)
        held = model.state_dict()
        assert same({name: held[name] for name in state}, state), "the model does not hold what was loaded"
        return state

    def judge(found: Any) -> tuple[str, str]:
        if same(found, specimen.state):
            return "unchanged", ""
        if wounded and not same(found, other.state):
            return "other", "other values were given, and no checksum was forged"
        return "other", ""

    return Attempt(path, specimen.name, damage, read, judge, _PACKED + _PACKED_PER_BYTE * len(content))


def _checkpoint(rng: random.Random, folder: Path) -> Attempt:
    """The record that callbacks leave in a checkpoint, with a value of another kind; or a file that is cut."""
    path = folder / "damaged.ckpt"
    whole = copy.deepcopy(_WHOLE["checkpoint"])
    damage = rng.choice(("a field", "a field", "several fields", "a part cut out"))
    for _ in range({"a field": 1, "several fields": 3}.get(damage, 0)):
        whole["callbacks"] = damaged_value(whole["callbacks"], rng)
    torch.save(whole, path)
    if damage == "a part cut out":
        path.write_bytes(_any_of(path.read_bytes(), rng))

    def judge(model: Small) -> tuple[str, str]:
        state = model.state_dict()
        kept = damage == "a part cut out" or same(state, whole["state_dict"])
        return "taken", "" if kept else "the weights are others"

    return Attempt(path, "checkpoint", damage, lambda: load_from_checkpoint(Small, path), judge)


def _any_of(file: bytes, rng: random.Random) -> bytes:
    return file[: rng.randrange(len(file))]


def _text(name: str, rng: random.Random) -> tuple[str, bytes]:
    """A damaged file of JSON."""
    whole: bytes = _WHOLE[name]
    if rng.random() < 0.6:
        return "a field", json.dumps(damaged_value(json.loads(whole), rng)).encode()
    damage = rng.choice(list(WOUNDS))
    return damage, WOUNDS[damage](whole, whole, rng)


def _sensitivity(rng: random.Random, folder: Path) -> Attempt:
    path = folder / "damaged.json"
    damage, content = _text("sensitivity", rng)
    path.write_bytes(content)

    def judge(found: Sensitivity) -> tuple[str, str]:
        known = isinstance(found.drop("a", "bits", 4), int | float) and len(found.layers) <= len(found.rows)
        return "taken", "" if known else "a drop that is no number"

    return Attempt(path, "sensitivity", damage, lambda: Sensitivity.read(path), judge)


def _report(rng: random.Random, folder: Path) -> Attempt:
    """One run of two."""
    runs = folder / "runs"
    for name in ("good", "bad"):
        (runs / name).mkdir(parents=True, exist_ok=True)
    (runs / "good" / "report.json").write_bytes(_WHOLE["report"])
    damage, content = _text("report", rng)
    (runs / "bad" / "report.json").write_bytes(content)
    left: dict[str, str] = {}

    def judge(found: Any) -> tuple[str, str]:
        metric, read = found
        numbers = [n for run in read for n in (run.metric, run.bytes, run.latency_ms, run.macs) if n is not None]
        if metric != "val_acc" or not all(is_number(n) for n in numbers):
            return "taken", f"{metric!r} and {numbers!r}"
        if len(read) == 2 or "bad" in left:
            return "left out" if left else "taken", ""
        return "taken", "a run is missing without a word"

    return Attempt(runs, "report", damage, lambda: read_runs(runs, left_out=left), judge)


def _offline_run(rng: random.Random, folder: Path) -> Attempt:
    path = folder / "run-x.wandb"
    whole: bytes = _WHOLE["offline run"]
    damage = rng.choice(list(WOUNDS))
    path.write_bytes(WOUNDS[damage](whole, whole, rng))
    os.utime(path, (0, 0))

    def judge(found: OfflineRun) -> tuple[str, str]:
        known = found.run_id in ("", "abc") and all(row == {"loss": 0.5} for row in found.history)
        return "taken", "" if known and found.config.get("lr", 0.1) == 0.1 else f"other values: {found}"

    return Attempt(path, "offline run", damage, lambda: read_offline_run(path), judge)


READERS: dict[str, Callable[[random.Random, Path], Attempt]] = {
    "packed": _packed,
    "checkpoint": _checkpoint,
    "sensitivity": _sensitivity,
    "report": _report,
    "offline run": _offline_run,
}
