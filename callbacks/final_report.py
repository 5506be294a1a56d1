"""The report of a run that is over: what was measured, and the files that were written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_compress.analysis.inspect import layer_table
from lightning_compress.analysis.origin import origin_of
from lightning_compress.analysis.report import Packed, Report, Steps
from lightning_compress.checks import first_line
from lightning_compress.deploy.packed import save_packed
from lightning_compress.deploy.timing import plain_times
from lightning_compress.deploy.verify import difference
from lightning_compress.metrics import pick_metric

from .control import why_no_control
from .evaluate import copied, num_validated
from .measure import totals
from .protocol import exporting
from .run import phase_names
from .verdict import targets_of

__all__ = ["Measured", "formats_of", "make_report"]


@dataclass
class Measured:
    """What was measured, each by :func:`callbacks.measure.measure`.

    Args:
        dense: The model just before compression; None if that never began.
        control: One that was trained on without compression; None without it.
        compressed: The model at the end.
    """

    dense: dict[str, Any] | None
    control: dict[str, Any] | None
    compressed: dict[str, Any]


def formats_of(trainer: pl.Trainer) -> list[str]:
    """The formats that are exported."""
    return [name for callback in exporting(trainer) for name in callback.formats]


def make_report(
    trainer: pl.Trainer, pl_module: pl.LightningModule, measured: Measured, monitor: str | None, packed: Path
) -> Report:
    """The report; what went wrong is warned of and stands in it.

    Args:
        trainer: The Trainer of the run.
        pl_module: Its model.
        measured: What was measured.
        monitor: The metric that was asked for; None for the one that is picked.
        packed: Path of the packed checkpoint, which is written, too.
    """
    compressed = measured.compressed
    metric = monitor or pick_metric(list(compressed["metrics"]))
    artifacts = _artifacts(trainer, metric)
    if artifacts:
        compressed = compressed | {key: artifacts[0][key] for key in ("bytes", "bytes_zstd")}
    warnings = [*(measured.dense or {}).get("unmeasured", []), *compressed["unmeasured"]]
    warnings = list(dict.fromkeys(warnings))
    written = _pack(pl_module, packed, warnings)
    if monitor is not None and monitor not in compressed["metrics"]:
        warnings.append(f"monitor={monitor!r} was not logged; logged were {', '.join(compressed['metrics'])}.")
    if measured.control is not None:
        warnings += why_no_control(measured.control, compressed, metric)
    for text in warnings:
        rank_zero_warn(text)
    # Export has said these
    cautions = [
        f"Export to {name} failed: {reason}"
        for callback in exporting(trainer)
        for name, reason in callback.failures.items()
    ]
    cautions += [text for artifact in artifacts for text in artifact["warnings"]]
    latency, quartiles = plain_times(compressed.get("latency", {}))
    return {
        "metric": metric,
        "dense": None if measured.dense is None else totals(measured.dense, metric),
        "control": None if measured.control is None else totals(measured.control, metric),
        "compressed": totals(compressed, metric),
        "layers": layer_table(pl_module, compressed["macs_by_layer"]),
        "artifacts": artifacts,
        "packed": written,
        "latency_ms_pytorch": latency,
        "seconds": {},
        "targets": targets_of(trainer),
        "warnings": warnings + cautions,
        "origin": origin_of(pl_module),
        "steps": _steps(measured),
        "latency_ms_pytorch_quartiles": quartiles,
        "phases": phase_names(trainer),
        "validation_samples": num_validated(trainer),
    }


def _steps(measured: Measured) -> Steps:
    # what a checkpoint of an earlier version measured has no step
    dense, control = ((found or {}).get("step") for found in (measured.dense, measured.control))
    return {"dense": dense, "control": control, "compressed": measured.compressed["step"]}


def _artifacts(trainer: pl.Trainer, metric: str | None) -> list[dict[str, Any]]:
    """The files, each with its own value of the metric."""
    found = []
    for callback in exporting(trainer):
        for artifact in callback.artifacts:
            artifact.metric = callback.metrics.get(artifact.format, {}).get(metric or "")
            trained = getattr(callback, "trained", {}).get(metric or "")
            artifact.deployed_minus_trained = difference(artifact.metric, trained)
            found.append(artifact.to_dict())
    return found


def _pack(pl_module: pl.LightningModule, path: Path, warnings: list[str]) -> Packed | None:
    """The packed checkpoint beside the report."""
    try:
        save_packed(copied(pl_module).cpu(), path)
    except Exception as error:  # a state dict with something else in it than tensors, a full disk
        warnings.append(f"The packed checkpoint {path} could not be written: {first_line(error)}")
        return None
    return {"path": str(path), "bytes": path.stat().st_size}
