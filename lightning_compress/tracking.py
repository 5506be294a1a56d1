"""Weights & Biases: offline when no key is set, and offline runs read back."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import numpy as np

from lightning_compress.offline_runs import OfflineRun, read_offline_run, why_not_whole
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
    why = why_not_whole(path)
    if why is not None:
        rank_zero_warn(f"W&B's file {path} is not whole: {why}. What it lacks can't be synced; report.json has it all.")
