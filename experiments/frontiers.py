"""Pictures of the benchmark: the metric of the file that ships against its bytes and its speed."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

from experiments.arena import MAIN_TASKS, TASKS
from experiments.protocol import DENSE, POINTS
from experiments.standings import OURS, Cell, Standings

__all__ = ["pictures"]

_OURS, _PEER, _CONTROL, _DENSE = "#c2410c", "#475569", "#94a3b8", "#0f172a"
_MARKS = {"zeros": "o", "macs": "s", "bits": "^", "sparse8": "D", "dense": "*"}
_NAMES = {"zeros": "zeros", "macs": "channels", "bits": "bits", "sparse8": "zeros and bits", "dense": "dense"}


def _points(cells: list[Cell]) -> list[dict[str, Any]]:
    """What is drawn."""
    return [
        {
            "kind": cell.point.kind,
            "role": "ours" if cell.method == OURS else cell.role,
            "metric": round(cell.mean, 3),
            "KB": round((cell.average("zstd") or 0.0) / 1e3, 2),
            "faster": round(cell.times_faster or 0.0, 3),
        }
        for cell in cells
        if cell.mean is not None and cell.average("zstd")
    ]


def _floor(values: list[float], higher: bool) -> tuple[float, float]:
    """Limits of the axis of the metric: what collapsed is left out of the picture, not of the tables."""
    best, ordered = (max(values) if higher else min(values)), sorted(values, reverse=higher)
    kept = ordered[: max(3, round(0.75 * len(ordered)))]
    margin = max(abs(best - kept[-1]) * 0.1, 1e-3)
    return (kept[-1] - margin, best + margin) if higher else (best - margin, kept[-1] + margin)


def _draw(task: str, points: list[dict[str, Any]], digest: str) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    metric = TASKS[task].metric
    matplotlib.rcParams.update({"svg.hashsalt": task, "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    colors = {"ours": _OURS, "peer": _PEER, "control": _CONTROL}
    labels = {"KB": "KB after zstd", "faster": "times faster than dense, batch 1"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for kind, mark in _MARKS.items():
            for role, color in colors.items():
                here = [p for p in points if p["kind"] == kind and p["role"] == role]
                color = _DENSE if kind == "dense" else color
                size = 70 if kind == "dense" else 34
                x, y = [p[key] for p in here], [p["metric"] for p in here]
                axis.scatter(x, y, s=size, c=color, marker=mark, alpha=0.85, lw=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(metric.name)
    axes[0].set_ylim(*_floor([p["metric"] for p in points], metric.higher))
    if not metric.higher:
        axes[0].invert_yaxis()
    kinds = [kind for kind in _MARKS if any(p["kind"] == kind for p in points)]
    handles = [
        *(pyplot.Line2D([], [], color=color, marker="o", ls="", label=role) for role, color in colors.items()),
        *(pyplot.Line2D([], [], color="k", marker=_MARKS[kind], ls="", label=_NAMES[kind]) for kind in kinds),
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle(task)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": digest})
    pyplot.close(figure)
    return buffer.getvalue()


def digest_of(points: list[dict[str, Any]]) -> str:
    """Tells whether a picture shows these points; another matplotlib draws the same in other bytes."""
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()[:16]


def pictures(standings: Standings) -> dict[str, str]:
    """By file name, an SVG a task of which more than the dense model is known."""
    ran = {trial.task for trial in standings.records.outcomes}
    found = {}
    for task in [*MAIN_TASKS, *(name for name in TASKS if name not in MAIN_TASKS)]:
        points = _points(list(standings.cells([task], [DENSE, *POINTS]))) if task in ran else []
        if len(points) > 3:
            found[f"{task}.svg"] = _draw(task, points, digest_of(points))
    return found
