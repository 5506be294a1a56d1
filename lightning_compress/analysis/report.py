"""The report: what compression bought, as it stands in report.json and in the rows of a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from lightning_compress.files import write_whole

__all__ = [
    "LayerRow",
    "Packed",
    "Report",
    "Target",
    "Totals",
    "change",
    "describe_missed",
    "headers",
    "short",
    "summary_rows",
    "summary_values",
    "write_json",
]


# TypedDicts, not dataclasses: report.json is read back as it was written, also by sweeps, and its keys are a contract.


class Totals(TypedDict):
    """A model: its validation metric, weights, multiplications, and the bytes of its file; None where unknown."""

    metric: float | None
    num_params: int | None
    num_nonzero: int | None
    sparsity: float | None
    macs: int | None
    bytes: int | None
    bytes_zstd: int | None


class LayerRow(TypedDict):
    """A layer: its weights, their bits and those of its inputs, multiplications, and bytes as packed."""

    name: str
    type: str
    num_params: int
    sparsity: float
    weight_bits: int
    input_bits: int
    macs: int | None
    bytes: int


class Packed(TypedDict):
    """The packed checkpoint."""

    path: str
    bytes: int


class Target(TypedDict):
    """What was asked of a callback, in plain values; what stood when ``fit`` ended; and why that is less."""

    callback: str
    target: str
    asked: float | str
    reached: float | str
    missed: bool
    because: str


class Report(TypedDict):
    """What report.json holds.

    ``dense`` is the model just before compression, ``control`` one trained without it. ``artifacts`` are the fields of
    :class:`lightning_compress.deploy.Artifact`, ``judged`` in them what was asked of the file and what it reaches:
    ``{"agreement": {"asked": 0.99, "reached": 1.0, "ok": True}, ...}``. ``latency_ms_pytorch`` are medians by batch
    size, ``seconds`` are those of ``fit`` and of measuring (``overhead``). ``targets`` are those of all callbacks,
    missed or not. ``origin`` says what it is a report of (:func:`lightning_compress.analysis.origin.origin_of`).
    """

    metric: str | None
    dense: Totals | None
    control: Totals | None
    compressed: Totals
    layers: list[LayerRow]
    artifacts: list[dict[str, Any]]
    packed: Packed | None
    latency_ms_pytorch: dict[str, float]
    seconds: dict[str, float]
    targets: list[Target]
    warnings: list[str]
    origin: dict[str, str]  # reports of earlier versions have none


def describe_missed(row: Target) -> str:
    """A target that was not reached, as it is told everywhere."""
    asked = _plain(row["asked"])
    reached = _plain(row["reached"])
    return (
        f"{row['callback']}: target not reached: asked {row['target']} {asked}, reached {reached}, because "
        f"{row['because']}."
    )


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def summary_values(report: Report) -> list[list[Any]]:
    """The table as numbers: model, metric, sparsity, parameters, MACs, bytes, zstd, latency at batch 1 and 64.

    Last comes the metric of a file in its runtime less that of the trained model in PyTorch. What is unknown is None.
    """
    first = report["artifacts"][0] if report["artifacts"] else None
    float_latency = first["latency_ms_float"] if first else {}
    rows = []
    for label, totals in (("dense", report["dense"]), ("dense control", report.get("control"))):
        if totals:
            # the float twin is of the file's shape: where channels or layers are gone it says nothing of the dense one
            same = totals["num_params"] == report["compressed"]["num_params"]
            rows.append([label, *_row(totals, float_latency if same else {})])
    if report["compressed"]:
        rows.append(["compressed", *_row(report["compressed"], report.get("latency_ms_pytorch", {}))])
    for artifact in report["artifacts"]:
        label = Path(artifact["path"]).name
        if artifact.get("arena_bytes") is not None:  # the same file has a row of a phone's runtime
            label += f" ({artifact['runtime']})"
        values = {
            **(report["compressed"] or {}),
            **{k: artifact[k] for k in ("metric", "bytes", "bytes_zstd")},
            "change": artifact.get("deployed_minus_trained"),
        }
        rows.append([label, *_row(values, artifact["latency_ms"])])
    return rows


def _row(values: Mapping[str, Any], latency: Mapping[str, float]) -> list[Any]:
    counted = [values.get(key) for key in ("metric", "sparsity", "num_nonzero", "macs", "bytes", "bytes_zstd")]
    return [*counted, *map(latency.get, ("1", "64")), values.get("change")]


def summary_rows(report: Report) -> list[list[str]]:
    """The same as text, of three digits or so."""
    shown = (_as(".4f"), _as(".1%"), *[short] * 4, *[_as(".2f")] * 2, change)
    rows = summary_values(report)
    return [[row[0], *(form(value) for form, value in zip(shown, row[1:], strict=True))] for row in rows]


def _as(form: str) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else format(value, form)


_LETTERS = (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))


def short(value: float | None) -> str:
    """A count in three digits with a thousands letter, such as 77.8k."""
    if value is None:
        return "-"
    shown = ((f"{value / size:.3g}", letter) for letter, size in _LETTERS)
    return "".join(next(pair for pair in shown if float(pair[0]) < 1000 or pair[1] == "T"))


def change(value: float | None) -> str:
    """A difference with its sign."""
    return "-" if value is None else f"{value:+.4f}"


def headers(report: Report) -> list[str]:
    """The table's column names."""
    metric = report["metric"] or "metric"
    return ["model", metric, "sparsity", "params", "MACs", "bytes", "zstd", "ms @1", "ms @64", "deployed minus trained"]


def write_json(report: Report, path: Path) -> None:
    """Write report.json; what is not finite becomes null."""
    write_whole(path, json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")


def _finite(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
