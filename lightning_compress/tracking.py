"""Weights & Biases: offline when no key is set, and offline runs read back."""

from __future__ import annotations

import json
import netrc
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

__all__ = ["OfflineRun", "read_offline_run", "wandb_logger"]


def wandb_logger(save_dir: str | Path, **kwargs: Any) -> WandbLogger:
    """A WandbLogger that writes below ``save_dir``, offline unless there is a key; says so in one line.

    In a Hydra sweep each job is a run of its own, named by its overrides, and all are of one group.

    Args:
        save_dir: Folder of the run's files.
        kwargs: Passed to Lightning's WandbLogger (project, name, group, tags).
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.utilities import rank_zero_info

    offline = os.environ.get("WANDB_MODE") == "offline" or not _has_key()
    if offline:
        os.environ.setdefault("WANDB_SILENT", "true")  # its own lines say the same at greater length
        rank_zero_info(f"W&B: no key is set, so the run is logged offline below {save_dir}; `wandb sync` uploads it.")
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    kwargs = _sweep_names() | kwargs
    settings = wandb.Settings(silent=True, console="off") if offline else None
    return WandbLogger(save_dir=save_dir, offline=offline, settings=settings, **kwargs)


def _sweep_names() -> dict[str, str]:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return {}
    config = HydraConfig.get()
    overrides = (re.sub(r"^\S*\.(?=\w+=)", "", item) for item in config.job.override_dirname.split(","))
    return {
        "group": "-".join(Path(config.sweep.dir).parts[-2:]),
        "name": f"{config.job.num} {' '.join(overrides)}".strip()[:120],
    }


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


@dataclass
class OfflineRun:
    """What an offline run recorded.

    Args:
        run_id: W&B's id.
        name: Display name.
        group: Group, the same for all runs of a sweep.
        config: Hyper-parameters.
        summary: Last value of every metric.
        history: One dict a logged step.
        files: Names of the files the run recorded, pictures and tables among them.
    """

    run_id: str = ""
    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def read_offline_run(path: str | Path) -> OfflineRun:
    """Read the ``.wandb`` file of an offline run.

    Args:
        path: The file, or the folder ``offline-run-...`` that holds it.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = next(iter(path.glob("*.wandb")), path / "run-*.wandb")
    run = OfflineRun()
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.name, run.group = record.run.run_id, record.run.display_name, record.run.run_group
            run.config.update(_items(record.run.config.update))
        elif kind == "config":
            run.config.update(_items(record.config.update))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "history":
            run.history.append(_items(record.history.item))
            run.summary.update({k: v for k, v in run.history[-1].items() if not k.startswith("_")})
        elif kind == "files":
            run.files.extend(item.path for item in record.files.files)
    return run


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(path: Path) -> Iterator[Any]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, chunks of (crc, length, type)."""
    from wandb.proto import wandb_internal_pb2

    new_record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]

    data, position, parts = path.read_bytes(), 7, b""  # W&B's own header is 7 bytes
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):
            return  # the run was killed while it wrote
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = new_record()
            record.ParseFromString(parts)
            parts = b""
            yield record
