"""Many runs side by side: which of them no other beats, by more than noise, and which to take."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_compress.analysis.latency import show_ms
from lightning_compress.analysis.noise import is_cheaper, noise_of
from lightning_compress.analysis.page import html_table, picture, save_picture, write_page
from lightning_compress.analysis.report import change, short
from lightning_compress.analysis.runs import COSTS, Run, differing
from lightning_compress.checks import check_flag, check_list, check_number, check_one_of, check_text
from lightning_compress.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Frontier", "frontier"]

_CAPTION = "What is not on the frontier is grey; the one to take is circled. Bars that overlap are within noise."
_LABELLED = 10  # points that can all have a label
_WAYS = {True: "more is better", False: "less is better"}


@dataclass
class Frontier:
    """The runs, cheapest first, and what they are worth.

    Args:
        metric: The metric's name.
        cost: Key of ``COSTS``.
        runs: All runs.
        best: Indices of those that no other beats in both, by more than noise.
        chosen: Index of the one to take.
        more_is_better: Whether a higher metric is better.
        noise: The smallest difference of the metric that counts; 0 where that is not known.
        noise_from: Where that is from, in a sentence.
        within_noise: Indices of those that are better than all cheaper ones, but by no more than noise.
        left_out: Runs that are not compared, by name, and why.
    """

    metric: str
    cost: str
    runs: list[Run]
    best: list[int]
    chosen: int
    more_is_better: bool = True
    noise: float = 0.0
    noise_from: str = ""
    within_noise: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """pareto.json and pareto.html, and with matplotlib pareto.png."""
        marks = [{"on_frontier": i in self.best, "within_noise": i in self.within_noise} for i in range(len(self.runs))]
        runs = [{**asdict(run), **mark} for run, mark in zip(self.runs, marks, strict=True)]
        write_whole(folder / "pareto.json", json.dumps({**asdict(self), "runs": runs}, indent=2) + "\n")
        body = [f"<h1>{html.escape(self.title())}</h1>", f"<p>{html.escape(self.noise_from)}</p>"]
        try:
            figure = self.figure()
            save_picture(figure, folder / "pareto.png")
            body.append(picture(figure, _CAPTION))
        except ModuleNotFoundError:
            body.append("<p>No picture: pip install 'lightning-compress[report]'.</p>")
        classes = ["chosen" if mark == "*" else "" if mark == "+" else "pale" for mark in self._marks()]
        body.append(html_table(*self._table(short_counts=False), classes, [run.report for run in self.runs]))
        body.append(f'<p class="legend">{html.escape(self.legend())}</p>')
        missed = [f"{run.name}: {text}" for run in self.runs for text in run.missed]
        body += [f'<p class="missed">{html.escape(text)}</p>' for text in missed]
        body += [f'<p class="warning">Left out {html.escape(text)}</p>' for text in self.words_of_left_out()]
        body.append(f"<h2>Again</h2><pre>{html.escape(self.runs[self.chosen].command)}</pre>")
        write_page(folder / "pareto.html", self.title(), body)

    def title(self) -> str:
        """How many runs, and what they are compared in."""
        return f"{len(self.runs)} runs, {self.metric} against {COSTS[self.cost]}: {len(self.best)} on the frontier"

    def legend(self) -> str:
        """What the marks say."""
        return "* the one to take, + on the frontier" + ", ~ better than all cheaper ones, but within noise" * bool(
            self.within_noise
        )

    def words_of_left_out(self) -> list[str]:
        """The runs that are not compared, each with the reason."""
        return [f"{name}: {reason}" for name, reason in self.left_out.items()]

    def _marks(self) -> list[str]:
        marks = dict.fromkeys(self.within_noise, "~") | dict.fromkeys(self.best, "+") | {self.chosen: "*"}
        return [marks.get(i, "") for i in range(len(self.runs))]

    def _table(self, short_counts: bool) -> tuple[list[str], list[list[str]]]:
        """Column names and rows; milliseconds of each runtime stand in a column of their own."""
        fields, asked = differing(self.runs)
        runtimes = sorted({run.runtime for run in self.runs if run.latency_ms is not None})
        times = [f"{COSTS['latency_ms']}{f', {name}' * bool(name)}" for name in runtimes]
        names = ["run", *(f"{name}=" for name in fields), self.metric, "deployed minus trained", "zeros"]
        names += [COSTS["bytes"], COSTS["bytes_zstd"], *times, COSTS["macs"]]

        def count(value: int | None) -> str:
            return short(value) if short_counts or value is None else f"{value:,}"

        rows = []
        for run, mark, values in zip(self.runs, self._marks(), asked, strict=True):
            name = f"{run.name} {mark}".rstrip() + " (target missed)" * bool(run.missed)
            sparsity = "-" if run.sparsity is None else f"{run.sparsity:.1%}"
            own = [show_ms(run.latency_ms, run.latency_ms_quartiles) if run.runtime == x else "-" for x in runtimes]
            cells = [name, *values, f"{run.metric:.4f}", change(run.deployed_minus_trained), sparsity]
            rows.append([*cells, count(run.bytes), count(run.bytes_zstd), *own, count(run.macs)])
        return names, rows

    def table(self) -> Table:
        """The same for a terminal: runs that are not on the frontier are dim, the one to take is bold."""
        names, rows = self._table(short_counts=True)
        shown = Table(title=self.title(), box=box.SIMPLE_HEAD, padding=0, header_style="bold", show_edge=False)
        for i, name in enumerate(names):
            shown.add_column(name.replace(" ", "\n"), justify="right" if i else "left", overflow="fold")
        for mark, row in zip(self._marks(), rows, strict=True):
            style = "bold" if mark == "*" else None if mark == "+" else "dim"
            shown.add_row(*(escape(f" {cell}" if i else cell) for i, cell in enumerate(row)), style=style)
        shown.caption = self.legend()
        return shown

    def figure(self) -> Figure:
        """The runs as points, the frontier as steps; bars are the noise."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        points = [(getattr(run, self.cost), run.metric) for run in self.runs]
        others = [i for i in range(len(points)) if i not in self.best]
        for indices, color, label in ((others, "#999999", "not on the frontier"), (self.best, "#1f5fa8", "frontier")):
            if indices:
                x, y = zip(*(points[i] for i in indices), strict=True)
                axes.errorbar(
                    x,
                    y,
                    xerr=self._spread(indices),
                    yerr=self.noise / 2 or None,
                    fmt="o",
                    markersize=5,
                    color=color,
                    elinewidth=0.8,
                    label=label,
                )
        x, y = zip(*(points[i] for i in self.best), strict=True)
        axes.step(x, y, where="post", color="#1f5fa8", linewidth=1, alpha=0.6)
        axes.scatter(
            *points[self.chosen], s=160, facecolors="none", edgecolors="#c0392b", linewidths=1.6, label="taken"
        )
        few = len(self.runs) <= _LABELLED
        for i in range(len(self.runs)) if few else (*self.best, *self.within_noise):
            right = points[i][0] > sum(axes.get_xlim()) / 2  # where a label beside the point would leave the picture
            place: Any = {"xytext": (-4 if right else 4, -9), "ha": "right" if right else "left"}
            axes.annotate(self._label(i), points[i], fontsize=7, textcoords="offset points", **place)
        axes.set_xlabel(f"{COSTS[self.cost]} (less is better)")
        axes.set_ylabel(f"{self.metric} ({_WAYS[self.more_is_better]})")
        axes.legend(frameon=False, fontsize=8)
        return figure

    def _label(self, i: int) -> str:
        """What a run differs in from the others, or its name."""
        names, values = differing(self.runs)
        return " ".join(f"{a}={b}" for a, b in zip(names, values[i], strict=True)) or self.runs[i].name

    def _spread(self, indices: Sequence[int]) -> list[list[float]] | None:
        """How far the quartiles of milliseconds lie to the left and to the right of their medians."""
        runs = [self.runs[i] for i in indices]
        if self.cost != "latency_ms":
            return None
        known = [(run.latency_ms or 0.0, run.latency_ms_quartiles or (run.latency_ms or 0.0,) * 2) for run in runs]
        return [[ms - low for ms, (low, _) in known], [high - ms for ms, (_, high) in known]]


def frontier(
    metric: str, runs: Sequence[Run], cost: str = "bytes", max_drop: float = 0.005, more_is_better: bool = True
) -> Frontier:
    """Which runs no other beats in both metric and cost; the cheapest of them close to the best metric is taken.

    A difference counts where it is larger than noise: of the metric by
    :func:`lightning_compress.analysis.noise.noise_of`, of milliseconds where their quartiles do not overlap.

    Args:
        metric: The metric's name.
        runs: The runs; those without the cost, or timed in another runtime than most, are left out and named.
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
    left_out = _not_compared(runs, cost)
    ranked = sorted((r for r in runs if r.name not in left_out), key=lambda r: (getattr(r, cost), -sign * r.metric))
    if not ranked:
        raise ValueError(f"pareto.cost={cost!r}: no run has it. Accepted are costs that the reports hold.")
    noise = noise_of(metric, runs)
    best = _unbeaten(ranked, cost, sign, noise.least)
    plain = _unbeaten([replace(run, latency_ms_quartiles=None) for run in ranked], cost, sign, 0.0)
    top = max(sign * ranked[i].metric for i in best)
    chosen = next(i for i in best if sign * ranked[i].metric >= top - max_drop - 1e-9)
    within = [i for i in plain if i not in best]
    return Frontier(metric, cost, ranked, best, chosen, more_is_better, noise.least, noise.said, within, left_out)


def _not_compared(runs: Sequence[Run], cost: str) -> dict[str, str]:
    """Runs without the cost, and runs whose milliseconds are of another runtime than those of most."""
    found = {run.name: f"its report has no {COSTS[cost]}" for run in runs if getattr(run, cost) is None}
    if cost == "latency_ms":
        runtimes = Counter(run.runtime for run in runs if run.name not in found)
        most = runtimes.most_common(1)[0][0] if runtimes else ""
        for run in runs:
            if run.name not in found and run.runtime != most:
                found[run.name] = f"it was timed in {run.runtime}, and most others in {most}"
    return found


def _unbeaten(ranked: Sequence[Run], cost: str, sign: int, noise: float) -> list[int]:
    """Indices of the runs that are better than each kept one that is cheaper, all by more than noise."""
    best: list[int] = []

    def is_better(i: int, j: int) -> bool:
        return sign * (ranked[i].metric - ranked[j].metric) > noise

    for i, run in enumerate(ranked):
        # a better one of the same cost takes its place
        while best and is_better(i, best[-1]) and not is_cheaper(ranked[best[-1]], run, cost):
            best.pop()
        if not best or is_better(i, best[-1]):
            best.append(i)
    return best
