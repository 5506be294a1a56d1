"""Weights & Biases: offline when no key is set, and offline runs read back."""

from __future__ import annotations

import json
import netrc
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import numpy as np

from lightning_compress.checks import first_line
from lightning_compress.run_names import names_of_run

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

__all__ = [
    "OfflineRun",
    "define_metric",
    "finish_run",
    "log_files",
    "log_histograms",
    "read_offline_run",
    "wandb_logger",
]

_PATIENCE = 2.0  # seconds for an answer of the server
_INIT = 15.0  # seconds for a run to begin there; W&B itself waits for 90
_RECENT = 60.0  # seconds since its last write in which a file may yet grow: finish() returns before W&B has closed it
_MARK = b":W&B\xe1\xbe"
_FLUSH = 10.0  # seconds to wait for such a file to be whole; a run that was killed never is
_FINISH = 60.0  # seconds for what is left to upload at the end; W&B itself waits forever


def wandb_logger(save_dir: str | Path, **kwargs: Any) -> WandbLogger:
    """A WandbLogger that writes below ``save_dir``, offline unless there are a key and a server; says so in one line.

    A run of the command is named by what was asked (:mod:`lightning_compress.run_names`). ``WANDB_MODE=disabled`` and
    ``WANDB_DISABLED`` are obeyed: nothing is written then.

    Args:
        save_dir: Folder of the run's files.
        kwargs: Passed to Lightning's WandbLogger (project, name, group, tags).
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.utilities import rank_zero_info

    Path(save_dir).mkdir(parents=True, exist_ok=True)
    kwargs = names_of_run() | kwargs
    if _is_disabled():
        return WandbLogger(save_dir=save_dir, **{"settings": wandb.Settings(mode="disabled"), **kwargs})
    why = _why_offline()
    if why is None:
        settings = wandb.Settings(init_timeout=_INIT, finish_timeout=_FINISH)
        try:
            logger = WandbLogger(save_dir=save_dir, **{"settings": settings, **kwargs})
            _ = logger.experiment  # begins the run: what the server refuses is known now, and not in the training
            return logger
        except wandb.Error as error:
            why = f"the server refused ({str(error).splitlines()[0]})"
            wandb.teardown()
    os.environ.setdefault("WANDB_SILENT", "true")  # its own lines say the same at greater length
    rank_zero_info(f"W&B: {why}, so the run is logged offline below {save_dir}; `wandb sync` uploads it.")
    settings = wandb.Settings(silent=True, console="off", mode="offline")
    return WandbLogger(save_dir=save_dir, offline=True, **{"settings": settings, **kwargs})


def _is_disabled() -> bool:
    named = os.environ.get("WANDB_DISABLED", "").lower() not in ("", "0", "false", "no")
    return named or os.environ.get("WANDB_MODE") == "disabled"


def _why_offline() -> str | None:
    """Why nothing can be sent; None if it can."""
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or ""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun"):  # which Lightning sets when a run before was offline
        return f"WANDB_MODE is {mode}"
    if not os.environ.get("WANDB_API_KEY") and not _stands_in_netrc(host):
        return "no key is set"
    try:  # W&B itself would wait for a minute and a half before training could start
        asked = Request(f"{server.geturl().rstrip('/')}/graphql", b'{"query": "{viewer {id}}"}')
        asked.add_header("Content-Type", "application/json")
        urlopen(asked, timeout=_PATIENCE).close()
    except HTTPError:
        return None  # an answer
    except (OSError, HTTPException) as error:
        return f"{host} cannot be reached ({error})"
    return None


def _stands_in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def define_metric(run: Any, name: str, more_is_better: bool) -> None:
    """Let a run's summary hold the best value of a metric, as ``max`` or ``min``, and the ``last``.

    Args:
        run: A W&B run.
        name: The metric.
        more_is_better: Which is best.
    """
    run.define_metric(name, summary=f"{'max' if more_is_better else 'min'},last")


def log_histograms(run: Any, edges: list[float], counts: dict[str, list[float]]) -> None:
    """Give a run the histograms of its weights.

    Args:
        run: A W&B run.
        edges: Of the bins.
        counts: By name, one a bin; what is empty is left out.
    """
    import wandb

    for name, values in counts.items():
        if values:
            found = wandb.Histogram(np_histogram=(np.asarray(values), np.asarray(edges)))
            run.log({f"compress/weights_{name}": found})


def log_files(run: Any, artifacts: list[dict[str, Any]], packed: Mapping[str, Any] | None = None) -> None:
    """Give a run its files, each an artifact with what was measured of it as metadata.

    The packed checkpoint is of type ``checkpoint``; the exported files are of type ``model``, and name the checkpoint
    that holds the weights they were made from.

    Args:
        run: A W&B run.
        artifacts: Those of report.json.
        packed: The packed checkpoint of report.json.
    """
    import wandb

    def log(name: str, kind: str, found: dict[str, Any]) -> None:
        metadata = {key: value for key, value in found.items() if key != "path"}
        artifact = wandb.Artifact(name, type=kind, metadata=metadata)
        artifact.add_file(found["path"])
        run.log_artifact(artifact)

    made_from: dict[str, Any] = {}
    if packed is not None:
        made_from = {"made_from": f"checkpoint-{run.id}"}
        log(made_from["made_from"], "checkpoint", dict(packed))
    for found in artifacts:
        log(f"model-{run.id}-{found['format']}", "model", found | made_from)


def finish_run() -> None:
    """End W&B's run of this process, if there is one, and wait until the file of an offline run is whole.

    W&B writes in blocks of 32 KiB, and its finish() returns before the last one, of which the artifacts are, is there.
    """
    import wandb
    from lightning.pytorch.utilities import rank_zero_warn

    path = Path(wandb.run.settings.sync_file) if wandb.run is not None and wandb.run.offline else None
    wandb.finish()
    if path is None:
        return
    try:
        whole = any(_ends(record) for record in _wait_for_end(path, _FLUSH))
        why = f"its end is not there after {_FLUSH:g} s"
    except (OSError, ValueError) as error:
        whole, why = False, first_line(error)
    if not whole:
        rank_zero_warn(f"W&B's file {path} is not whole: {why}. What it lacks can't be synced; report.json has it all.")


@dataclass
class OfflineRun:
    """What an offline run recorded.

    Args:
        run_id: W&B's id.
        name: Display name.
        group: Group, the same for all runs of a sweep.
        config: Hyper-parameters.
        summary: Last value of every metric; of one with a best value, a dict of ``last`` and ``max`` or ``min``.
        history: One dict a logged step.
        files: Names of the files the run recorded, pictures and tables among them.
        artifacts: Metadata of the artifacts by name.
    """

    run_id: str = ""
    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_offline_run(path: str | Path) -> OfflineRun:
    """Read the ``.wandb`` file of an offline run; one that was written just now is waited for.

    Args:
        path: The file, or the folder ``offline-run-...`` that holds it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or of another kind; one whose end is missing is of a run that was killed.
    """
    path = Path(path)
    if path.is_dir():
        path = next(iter(path.glob("*.wandb")), path / "run-*.wandb")
    try:
        return _read_run(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"path={str(path)!r} cannot be read as an offline run of W&B: {first_line(error)}. Accepted is a .wandb "
            "file as W&B wrote it. Copy it again."
        ) from error


def _read_run(path: Path) -> OfflineRun:
    run = OfflineRun()
    for record in _whole(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id = record.run.run_id
            run.name = record.run.display_name
            run.group = record.run.run_group
            run.config.update(_items(record.run.config.update))
        elif kind == "config":
            run.config.update(_items(record.config.update))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "history":
            run.history.append(_items(record.history.item))
            plain = (k for k in run.history[-1] if not k.startswith("_") and not isinstance(run.summary.get(k), dict))
            run.summary.update({k: run.history[-1][k] for k in plain})
        elif kind == "artifact":
            run.artifacts[record.artifact.name] = json.loads(record.artifact.metadata or "{}")
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            logged = record.request.log_artifact.artifact
            run.artifacts[logged.name] = json.loads(logged.metadata or "{}")
        elif kind == "files":
            run.files.extend(item.path for item in record.files.files)
    return run


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _whole(path: Path) -> list[Any]:
    """The records of a file; of one that was written just now, when it has had time to be whole."""
    may_grow = abs(time.time() - path.stat().st_mtime) < _RECENT
    return _wait_for_end(path, _FLUSH if may_grow else 0.0)


def _wait_for_end(path: Path, patience: float) -> list[Any]:
    """The records of a file, once the one that ends a run is among them, or when ``patience`` in seconds has gone."""
    until = time.monotonic() + patience
    while True:
        records = list(_records(path))
        if any(map(_ends, records)) or time.monotonic() >= until:
            return records
        time.sleep(0.01)


def _ends(record: Any) -> bool:
    return record.WhichOneof("record_type") == "exit"


def _records(path: Path) -> Iterator[Any]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, chunks of (crc, length, type)."""
    from wandb.proto import wandb_internal_pb2

    new_record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]

    # W&B's own header is 7 bytes: its mark, a number and a version
    data = path.read_bytes()
    if not data.startswith(_MARK[: len(data)]):
        raise ValueError(f"it begins with {data[:7]!r}")
    position = 7
    parts = b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        if position + 7 + length > len(data) or not any(data[position : position + 7]):
            return  # the run, or its machine, was killed while it wrote
        body = data[position + 7 : position + 7 + length]
        if zlib.crc32(body, zlib.crc32(bytes([kind]))) != int.from_bytes(data[position : position + 4], "little"):
            raise ValueError(f"the checksum of the record at byte {position} is wrong")
        parts += body
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = new_record()
            record.ParseFromString(parts)
            parts = b""
            yield record
