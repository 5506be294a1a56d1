"""What runs of W&B wrote while they were offline, read back from their files."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.checks import first_line

__all__ = ["OfflineRun", "offline_runs", "read_offline_run", "why_not_whole"]

_RECENT = 60.0  # seconds since its last write in which a file may yet grow: finish() returns before W&B has closed it
_FLUSH = 10.0  # seconds to wait for such a file to be whole; a run that was killed never is
_MARK = b":W&B\xe1\xbe"


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


def offline_runs(folder: str | Path) -> list[OfflineRun]:
    """The offline W&B runs anywhere below a folder, by name."""
    paths = sorted(Path(folder).rglob("offline-run-*/run-*.wandb"))
    return sorted((read_offline_run(path) for path in paths), key=lambda run: run.name)


def why_not_whole(path: Path) -> str | None:
    """Why a file does not hold a whole run, once it had time to; None if it does."""
    try:
        whole = any(map(_ends, _wait_for_end(path, _FLUSH)))
    except (OSError, ValueError) as error:
        return first_line(error)
    return None if whole else f"its end is not there after {_FLUSH:g} s"


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
