"""The report: what compression bought, as it stands in report.json and in the rows of a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from lightning_compress.files import write_whole

__all__ = [
    "TARGET_HEADERS",
    "LayerRow",
    "Packed",
    "Report",
    "Steps",
    "Target",
    "Totals",
    "change",
    "describe_missed",
    "headers",
    "short",
    "summary_rows",
    "summary_values",
    "target_rows",
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


class Steps(TypedDict):
    """Optimizer steps after which each model was measured; None where there is no such model, or it is not known."""

    dense: int | None
    control: int | None
    compressed: int | None


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

    ``dense`` is the model just before compression, ``control`` one that was trained on without it; ``steps`` says after
    how many steps each was measured. ``artifacts`` are the fields of :class:`lightning_compress.deploy.Artifact`,
    ``judged`` in them what was asked of the file and what it reaches:
    ``{"agreement": {"asked": 0.99, "reached": 1.0, "ok": True}, ...}``. ``latency_ms_pytorch`` are medians by batch
    size, ``latency_ms_pytorch_quartiles`` what a quarter of the repetitions stayed below and above. ``seconds`` are
    those of ``fit`` and of measuring (``overhead``). ``targets`` are those of all callbacks, missed or not. ``origin``
    says what it is a report of (:func:`lightning_compress.analysis.origin.origin_of`). ``phases`` are names, in the
    order of the numbers of ``compress/phase``. ``validation_samples`` is what the metric was measured over.
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
    # reports of earlier versions lack what follows
    origin: dict[str, str]
    steps: Steps
    latency_ms_pytorch_quartiles: dict[str, list[float]]
    phases: list[str]
    validation_samples: int | None


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


TARGET_HEADERS = ["target", "asked", "reached", "verdict", "of"]
"""The column names of :func:`target_rows`."""


def target_rows(report: Report) -> list[list[str]]:
    """What was asked against what stands, a row a target."""
    return [
        [row["target"], _plain(row["asked"]), _plain(row["reached"]), _verdict(row), row["callback"]]
        for row in report.get("targets", [])
    ]


def _verdict(row: Target) -> str:
    return "missed" if row["missed"] else "reached"


def summary_values(report: Report) -> list[list[Any]]:
    """The table as numbers: model, metric, sparsity, parameters, MACs, bytes, zstd.

    Last comes the metric of a file in its runtime less that of the trained model in PyTorch. What is unknown is None.
    """
    rows = []
    steps: Any = report.get("steps", {})
    for label, key in (("dense", "dense"), ("dense trained on", "control"), ("compressed", "compressed")):
        totals: Any = report.get(key)
        if totals:
            # where the run was elsewhere than at its end
            elsewhere = steps.get(key) not in (None, steps.get("compressed"))
            rows.append([f"{label} (step {steps.get(key)})" if elsewhere else label, *_row(totals)])
    for artifact in report["artifacts"]:
        label = Path(artifact["path"]).name
        if artifact.get("arena_bytes") is not None:  # the same file has a row of a phone's runtime
            label += f" ({artifact['runtime']})"
        values = {
            **(report["compressed"] or {}),
            **{k: artifact[k] for k in ("metric", "bytes", "bytes_zstd")},
            "change": artifact.get("deployed_minus_trained"),
        }
        rows.append([label, *_row(values)])
    return rows


def _row(values: Mapping[str, Any]) -> list[Any]:
    return [values.get(key) for key in ("metric", "sparsity", "num_nonzero", "macs", "bytes", "bytes_zstd", "change")]


def summary_rows(report: Report) -> list[list[str]]:
    """The same as text, of three digits or so."""
    shown = (_as(".4f"), _as(".1%"), *[short] * 4, change)
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
    return ["model", metric, "sparsity", "params", "MACs", "bytes", "zstd", "deployed minus trained"]


def write_json(report: Report, path: Path) -> None:
    """Write report.json; what is not finite becomes null."""
    write_whole(path, json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")


def _finite(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
