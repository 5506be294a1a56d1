"""Many runs side by side: which of them no other beats, and which to take."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_compress.analysis.page import html_table, picture, save_picture, write_page
from lightning_compress.analysis.report import change, describe_missed
from lightning_compress.checks import (
    check_flag,
    check_list,
    check_number,
    check_one_of,
    check_path,
    check_text,
    first_line,
    is_number,
    shown,
)
from lightning_compress.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COSTS", "Frontier", "Run", "frontier", "read_runs"]

COSTS = {"bytes": "bytes", "bytes_zstd": "bytes as zstd", "latency_ms": "ms at batch 1", "macs": "MACs"}


@dataclass(frozen=True)
class Run:
    """What a run's report says of what it ships.

    Args:
        name: Its folder, below that of all runs.
        metric: Of the first exported file, or of the compressed model where there is no file.
        bytes: Of that file.
        bytes_zstd: Of that file, compressed.
        latency_ms: Of that file, one sample.
        macs: Multiply-accumulates.
        sparsity: Share of zero weights.
        command: What makes the run again.
        missed: What it was asked for and did not reach, in sentences.
        deployed_minus_trained: The metric of the file less that of the trained model in PyTorch.
    """

    name: str
    metric: float
    bytes: int | None
    bytes_zstd: int | None
    latency_ms: float | None
    macs: int | None
    sparsity: float | None
    command: str
    missed: tuple[str, ...] = ()
    deployed_minus_trained: float | None = None


@dataclass
class Frontier:
    """The runs, cheapest first, and what they are worth.

    Args:
        metric: The metric's name.
        cost: Key of ``COSTS``.
        runs: All runs.
        best: Indices of those that no other beats in both.
        chosen: Index of the one to take.
    """

    metric: str
    cost: str
    runs: list[Run]
    best: list[int]
    chosen: int

    def write(self, folder: Path) -> None:
        """pareto.json and pareto.html, and with matplotlib pareto.png."""
        state = {**asdict(self), "runs": [{**asdict(run), "on_frontier": i in self.best} for i, run in self.rows()]}
        write_whole(folder / "pareto.json", json.dumps(state, indent=2) + "\n")
        body = [f"<h1>{html.escape(self.title())}</h1>"]
        try:
            figure = self.figure()
            save_picture(figure, folder / "pareto.png")
            body.append(picture(figure, "Runs that another beats are grey; the one to take is circled."))
        except ModuleNotFoundError:
            body.append("<p>No picture: pip install 'lightning-compress[report]'.</p>")
        classes = ["chosen" if i == self.chosen else "" if i in self.best else "pale" for i, _ in self.rows()]
        body.append(html_table(self._names(), [self._cells(run) for _, run in self.rows()], classes))
        missed = [f"{run.name}: {text}" for run in self.runs for text in run.missed]
        body += [f'<p class="missed">{html.escape(text)}</p>' for text in missed]
        body.append(f"<h2>Again</h2><div class='wide'><pre>{html.escape(self.runs[self.chosen].command)}</pre></div>")
        write_page(folder / "pareto.html", self.title(), body)

    def rows(self) -> list[tuple[int, Run]]:
        """The runs with their indices, cheapest first."""
        return list(enumerate(self.runs))

    def title(self) -> str:
        """How many runs, and what they are compared in."""
        return f"{len(self.runs)} runs, {self.metric} against {COSTS[self.cost]}: {len(self.best)} on the frontier"

    def _names(self) -> list[str]:
        return ["run", self.metric, "deployed minus trained", "sparsity", *COSTS.values()]

    def _cells(self, run: Run) -> list[str]:
        whole = [("-" if v is None else f"{v:,}") for v in (run.bytes, run.bytes_zstd)]
        latency = "-" if run.latency_ms is None else f"{run.latency_ms:.3f}"
        sparsity = "-" if run.sparsity is None else f"{run.sparsity:.1%}"
        name = f"{run.name} (target missed)" if run.missed else run.name
        macs = "-" if run.macs is None else f"{run.macs:,}"
        return [name, f"{run.metric:.4f}", change(run.deployed_minus_trained), sparsity, *whole, latency, macs]

    def table(self) -> Table:
        """The same for a terminal: dominated runs are dim, the one to take is bold."""
        shown = Table(title=self.title(), box=box.SIMPLE_HEAD, padding=0, header_style="bold")
        for i, name in enumerate(["", *self._names()]):
            shown.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
        for i, run in self.rows():
            mark = "*" if i == self.chosen else "+" if i in self.best else " "
            style = "bold" if i == self.chosen else None if i in self.best else "dim"
            shown.add_row(mark, *(f" {escape(cell)}" for cell in self._cells(run)), style=style)
        shown.caption = "* the one to take, + on the frontier"
        return shown

    def figure(self) -> Figure:
        """The runs as points, the frontier as steps."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        points = [(getattr(run, self.cost), run.metric) for run in self.runs]
        others = [point for i, point in enumerate(points) if i not in self.best]
        if others:
            x, y = zip(*others, strict=True)
            axes.scatter(x, y, color="#bbbbbb", s=22, label="beaten")
        x, y = zip(*(points[i] for i in self.best), strict=True)
        axes.step(x, y, where="post", color="#1f5fa8", linewidth=1, alpha=0.6)
        axes.scatter(x, y, color="#1f5fa8", s=28, label="frontier")
        axes.scatter(
            *points[self.chosen], s=160, facecolors="none", edgecolors="#c0392b", linewidths=1.6, label="taken"
        )
        for i in self.best:
            axes.annotate(self.runs[i].name, points[i], fontsize=7, xytext=(4, -9), textcoords="offset points")
        axes.set_xlabel(COSTS[self.cost])
        axes.set_ylabel(self.metric)
        axes.legend(frameon=False, fontsize=8)
        return figure


def read_runs(
    folder: str | Path, monitor: str | None = None, left_out: dict[str, str] | None = None
) -> tuple[str, list[Run]]:
    """The metric's name, and every run that left a report.json anywhere below a folder.

    Args:
        folder: The folder.
        monitor: Only runs that report this metric; all without one.
        left_out: Is told of the runs whose report cannot be read, by name, and why.

    Raises:
        ValueError: If there is none, or they report different metrics.
    """
    check_path("pareto.runs", folder, "the folder of the runs")
    folder = Path(folder)
    found = []
    metrics = set()
    reasons = {} if left_out is None else left_out
    for path in sorted(folder.rglob("report.json")):
        name = str(path.parent.relative_to(folder))
        try:
            metric, run = _read_run(path, name)
        except Exception as error:  # a report that is cut, or another tool's: it costs this run, and not the table
            reasons[name] = f"what it left cannot be read ({first_line(error)})"
            continue
        if run is None:
            reasons[name] = "its report.json has no metric"
            continue
        metrics.add(metric)
        if monitor in (None, metric):
            found.append(run)
    if metrics and not found:
        raise ValueError(
            f"pareto.monitor={monitor!r}: no report is of it. Accepted is what the reports are of: "
            f"{', '.join(sorted(map(str, metrics)))}."
        )
    if not found:
        said = "".join(f" {name}: {reason}." for name, reason in reasons.items())
        raise ValueError(
            f"runs={str(folder)!r}: no report.json with a metric is below it. Give a sweep's folder.{said}"
        )
    if monitor is not None:
        return monitor, found
    if len(metrics) > 1:
        raise ValueError(
            f"runs={str(folder)!r}: the reports are of different metrics, {', '.join(sorted(map(str, metrics)))}. Give "
            "a folder whose runs report the same one, or pareto.monitor."
        )
    return metrics.pop(), found


def _read_run(path: Path, name: str) -> tuple[str, Run | None]:
    """The metric's name, and the run; None where it has no value."""
    report = json.loads(path.read_text())
    first = next(iter(report["artifacts"]), None)
    totals = report["compressed"] or {}
    metric = totals.get("metric") if first is None or first["metric"] is None else first["metric"]
    if metric is None:
        return "", None
    source = totals if first is None else first
    latencies = report["latency_ms_pytorch"] if first is None else first["latency_ms"]
    targets = report.get("targets", [])  # an earlier version wrote none
    run = Run(
        name,
        metric,
        source.get("bytes"),
        source.get("bytes_zstd"),
        latencies.get("1"),
        totals.get("macs"),
        totals.get("sparsity"),
        _command(path.parent),
        tuple(describe_missed(row) for row in targets if row["missed"]),
        None if first is None else first.get("deployed_minus_trained"),
    )
    for field in ("metric", *COSTS, "sparsity"):
        value = getattr(run, field)
        if value is not None and (not is_number(value) or (field != "metric" and value < 0)):
            raise ValueError(f"{field} is {shown(value)}")
    if not isinstance(report["metric"], str):
        raise ValueError(f"the name of the metric is {shown(report['metric'])}")
    return report["metric"], run


def _command(folder: Path) -> str:
    """The command of a run, from the overrides that Hydra wrote down; empty where it wrote none."""
    from omegaconf import OmegaConf

    path = folder / ".hydra" / "hydra.yaml"
    if not path.is_file():
        return ""
    given = OmegaConf.to_container(OmegaConf.load(path).hydra.overrides)
    assert isinstance(given, dict)
    places = [override for override in given["hydra"] if override.startswith("hydra.searchpath")]
    return shlex.join(["lightning-compress", *given["task"], *places])


def frontier(
    metric: str, runs: Sequence[Run], cost: str = "bytes", max_drop: float = 0.005, more_is_better: bool = True
) -> Frontier:
    """Which runs no other beats in both metric and cost; the cheapest of them close to the best metric is taken.

    Args:
        metric: The metric's name.
        runs: The runs; those without the cost are left out.
        cost: Key of ``COSTS``.
        max_drop: How far below the best metric the taken one may lie.
        more_is_better: Whether a higher metric is better.

    Raises:
        ValueError: If the cost is unknown, or no run has it.

    Example:
        >>> runs = [Run(n, m, b, b, 1.0, 1, 0.0, "") for n, m, b in (("a", 0.9, 100), ("b", 0.8, 50), ("c", 0.8, 70))]
        >>> found = frontier("acc", runs, max_drop=0.2)
        >>> [found.runs[i].name for i in found.best], found.runs[found.chosen].name
        (['b', 'a'], 'b')
    """
    check_text("pareto.metric", metric, "the metric's name")
    check_list("pareto.runs", runs, Run, "a Run of read_runs", fewest=1)
    check_one_of("pareto.cost", cost, COSTS)
    check_number("pareto.max_drop", max_drop, "a number from 0, in the metric's own unit", low=0)
    check_flag("pareto.more_is_better", more_is_better)
    sign = 1 if more_is_better else -1
    ranked = sorted(
        (r for r in runs if getattr(r, cost) is not None), key=lambda r: (getattr(r, cost), -sign * r.metric)
    )
    if not ranked:
        raise ValueError(f"pareto.cost={cost!r}: no run has it. Accepted are costs that the reports hold.")
    best: list[int] = []
    for i, run in enumerate(ranked):
        if not best or sign * run.metric > sign * ranked[best[-1]].metric:
            best.append(i)
    top = sign * ranked[best[-1]].metric
    chosen = next(i for i in best if sign * ranked[i].metric >= top - max_drop - 1e-9)
    return Frontier(metric, cost, ranked, best, chosen)
