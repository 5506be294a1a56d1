"""What happened over a run, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_compress.layers import Layer
from lightning_compress.thinning import Thinning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["History", "figures", "histogram"]

_BITS = [1, 2, 3, 4, 6, 8, 16, 32]


@dataclass
class History:
    """What happened over the run; of a long one not every look and every validation, but as many as a picture shows.

    Args:
        steps: Optimizer steps at which the layers were looked at.
        sparsity: Sparsity by layer, one value per step of ``steps``; None where the model has no such layer.
        bits: Bits of the weights by layer, likewise.
        metric: Pairs of step and validation metric.
        phases: Phase names with the step they began at.
        bins: Edges of the weight histogram.
        before: Counts before compression.
        after: Counts at the end.
        looks: Which looks are kept.
        validations: Which values of the metric are kept.
    """

    steps: list[int] = field(default_factory=list)
    sparsity: dict[str, list[float | None]] = field(default_factory=dict)
    bits: dict[str, list[int | None]] = field(default_factory=dict)
    metric: list[list[float]] = field(default_factory=list)
    phases: list[list[Any]] = field(default_factory=list)
    bins: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    looks: Thinning = field(default_factory=Thinning)
    validations: Thinning = field(default_factory=Thinning)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """The inverse of to_state; an earlier version has kept all."""
        values: dict[str, Any] = dict(state)
        for name in ("looks", "validations"):
            values[name] = Thinning(**state.get(name, {}))
        return cls(**values)

    def to_state(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def look(self, step: int, sparsity: Mapping[str, float], bits: Mapping[str, int]) -> None:
        """Add what the layers are at a step, in the place of what they were at that step before."""
        if step not in self.steps[-1:]:
            kept = self.looks.make_room(self.steps)
            self.steps = [*self.steps[kept], step]
            self.sparsity = {name: values[kept] for name, values in self.sparsity.items()}
            self.bits = {name: values[kept] for name, values in self.bits.items()}
        _append(self.sparsity, sparsity, len(self.steps))
        _append(self.bits, bits, len(self.steps))

    def validate(self, step: int, value: float) -> None:
        """Add a value of the metric."""
        self.validations.add(self.metric, [step, value])

    @property
    def rows(self) -> list[list[Any]]:
        """Step, layer, sparsity and bits, a row for every look at every layer that is there."""
        return [
            [step, name, values[i], self.bits[name][i]]
            for i, step in enumerate(self.steps)
            for name, values in self.sparsity.items()
            if values[i] is not None
        ]


def _append(columns: dict[str, list[Any]], now: Mapping[str, Any], num: int) -> None:
    """Bring every column to a length, with its value of now at the end."""
    for name in {**columns, **now}:
        values = columns.setdefault(name, [])[: num - 1]
        columns[name] = [*values, *[None] * (num - 1 - len(values)), now.get(name)]


def histogram(layers: Sequence[Layer], bins: list[float]) -> tuple[list[float], list[float]]:
    """Edges and counts of the non-zero weights; the edges are kept where there are some."""
    values = np.concatenate([layer.weight.detach().float().cpu().numpy().ravel() for layer in layers] or [np.zeros(1)])
    values = values[np.isfinite(values) & (values != 0)]
    if not bins:
        limit = float(np.abs(values).max(initial=1e-6))
        bins = np.linspace(-limit, limit, 102).tolist()
    counts, _ = np.histogram(np.clip(values, bins[0], bins[-1]), bins)
    return bins, counts.tolist()


def figures(history: History, metric: str | None) -> dict[str, Figure]:
    """The pictures by name; none where matplotlib is not installed (``pip install 'lightning-compress[report]'``)."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return {}

    def blank(height: float) -> tuple[Figure, Axes]:
        figure = Figure(figsize=(7, height), layout="constrained")
        return figure, figure.subplots()

    made: dict[str, Figure] = {}
    if history.metric:
        made["metric"], axes = blank(3.2)
        _metric(axes, history, metric or "metric")
    if any(share for layer in history.sparsity.values() for share in layer):
        made["sparsity"], axes = blank(3.6)
        _heat_map(axes, history.steps, history.sparsity, "sparsity", 0.0, 1.0)
    if len({bits for layer in history.bits.values() for bits in layer} - {None}) > 1:
        made["bits"], axes = blank(3.6)
        _heat_map(axes, history.steps, history.bits, "bits of a weight", 1.0, 32.0)
    if history.before and history.after:
        made["weights"], axes = blank(3.0)
        axes.stairs(history.before, history.bins, fill=True, alpha=0.35, color="#888888", label="before")
        axes.stairs(history.after, history.bins, color="#1f5fa8", linewidth=1.4, label="after, non-zero")
        axes.set_yscale("log")
        axes.set_xlabel("weight")
        axes.set_ylabel("number of weights")
        axes.legend(frameon=False)
    return made


def _metric(axes: Axes, history: History, name: str) -> None:
    """The validation metric, and the phases behind it."""
    steps, values = zip(*history.metric, strict=True)
    axes.plot(steps, values, marker="o", markersize=3, color="#1f5fa8")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(name)
    begins = [*(begin for begin, _ in history.phases), max([*steps, *history.steps])]
    for i, (begin, label) in enumerate(history.phases):
        axes.axvspan(begin, begins[i + 1], color=f"C{i % 10}", alpha=0.10, linewidth=0)
        if begins[i + 1] > begin:
            place = axes.get_xaxis_transform()
            axes.text(begin, 1.01, f" {label}", transform=place, fontsize=7, rotation=30, va="bottom")


def _heat_map(axes: Axes, steps: list[int], layers: Any, label: str, low: float, high: float) -> None:
    """A value of each layer over the steps; bits on a scale of ratios."""
    from matplotlib.colors import LogNorm, Normalize

    names = list(layers)
    ratios = low > 0
    values = np.array([layers[name] for name in names], dtype=float)
    edges = np.array([*steps, steps[-1] + 1], dtype=float)
    norm = LogNorm(low, high) if ratios else Normalize(low, high)
    image = axes.pcolormesh(edges, np.arange(len(names) + 1), values, norm=norm, cmap="viridis")
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=max(4, min(8, 160 // len(names))))
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, label=label)
    if ratios:
        bar.minorticks_off()
        bar.set_ticks(_BITS, labels=list(map(str, _BITS)))
