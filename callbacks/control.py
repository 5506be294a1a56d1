"""The honest control of a compressed run: what the same run came to without compression, read from its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_compress.analysis.report import Report
from lightning_compress.checks import first_line, refusal, shown

__all__ = ["Reporting", "read_control", "why_no_control"]

_ACCEPTED = "the CompressionReport of a plain run that is over, or the path of its report.json"
_FIX = "Train the same model with a CompressionReport and no callback that compresses, and give that one."


@runtime_checkable
class Reporting(Protocol):
    """A callback that leaves a report, as CompressionReport does."""

    report: Report | None


def read_control(control: Reporting | str | Path | None, monitor: str | None) -> dict[str, Any] | None:
    """What a plain run came to, as :func:`callbacks.measure.measure` has it; None without one.

    Args:
        control: Its CompressionReport, or the path of what that wrote.
        monitor: The metric that it has to be of; None for any.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is no such report, the run was compressed, or its metric is another.
    """
    if control is None:
        return None
    of = f"CompressionReport.control={shown(str(control) if isinstance(control, Path) else control)}"
    if isinstance(control, str | Path) and str(control):
        report = _read(Path(control), of)
    elif isinstance(control, Reporting):
        report = control.report
        of = "CompressionReport.control"
    else:
        raise refusal("CompressionReport.control", control, _ACCEPTED, _FIX, TypeError)
    if report is None:
        raise ValueError(f"{of} has no report: its fit is not over. Accepted is {_ACCEPTED}. Call its fit first.")
    if report["dense"] is not None:
        raise ValueError(f"{of} is of a run that compressed its model. Accepted is {_ACCEPTED}. {_FIX}")
    metric, totals = report["metric"], report["compressed"]
    if monitor is not None and metric != monitor:
        raise ValueError(
            f"{of} is of the metric {metric!r}, and this one's monitor is {monitor!r}. Accepted is a report of the "
            f"same metric. Train the plain run with CompressionReport(monitor={monitor!r})."
        )
    return {"metrics": {metric: totals["metric"]}, "step": report.get("steps", {}).get("compressed"), **totals}


def _read(path: Path, of: str) -> Any:
    try:
        report = json.loads(path.read_text())
        if not {"metric", "dense", "compressed"} <= report.keys():
            raise ValueError("it is no report")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{of} cannot be read ({first_line(error)}). Accepted is {_ACCEPTED}. {_FIX}") from error
    return report


def why_no_control(control: Mapping[str, Any], compressed: Mapping[str, Any], metric: str | None) -> list[str]:
    """Why what was given as control says less of this run than it seems to, in words; nothing of a good one.

    Args:
        control: The plain run, as it was read.
        compressed: The compressed model, as it was measured.
        metric: What both are judged by.
    """
    said = []
    if metric is not None and metric not in control["metrics"]:
        said.append(
            f"CompressionReport.control is of the metric {', '.join(map(repr, control['metrics']))}, and this run of "
            f"{metric!r}: the two are not compared. Give both reports the same monitor."
        )
    if None not in (control["step"], compressed["step"]) and control["step"] != compressed["step"]:
        said.append(
            f"CompressionReport.control was trained for {control['step']} steps, and this run for "
            f"{compressed['step']}: a control is of the same length. Give both Trainers the same max_epochs or "
            "max_steps."
        )
    return said
