"""What the compression of each layer alone costs in accuracy, without retraining."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.analysis.replay import Replay
from lightning_compress.checks import (
    check_callable,
    check_flag,
    check_instance,
    check_list,
    check_names,
    check_numbers,
    check_whole_number,
    first_line,
    refusal,
    shown,
)
from lightning_compress.files import write_whole
from lightning_compress.forward import Inputs
from lightning_compress.layers import PRUNABLE, Layer, find_layers
from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.fake_quantizers import WeightFakeQuantize
from lightning_compress.quantization.overflow import portable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Row", "Sensitivity", "heat_map", "hessian_traces", "sensitivity", "table"]


@dataclass(frozen=True)
class Row:
    """One layer, compressed in one way.

    Args:
        layer: Its name.
        kind: ``"sparsity"`` or ``"bits"``.
        level: How much.
        metric: The metric of the whole model then.
        drop: How much worse than without.
    """

    layer: str
    kind: str
    level: float
    metric: float
    drop: float


@dataclass
class Sensitivity:
    """The metric as it is, and a row for each layer and level.

    Args:
        metric: Of the model as it is.
        rows: The rows, in the layers' order.
        seconds: How long it took.
        cached: For how many of the layers what stands before them was computed only once.
        traces: Mean eigenvalue of the loss's Hessian by layer, where it was asked for.
    """

    metric: float
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    cached: int = 0
    traces: dict[str, float] = field(default_factory=dict)

    @property
    def levels(self) -> list[tuple[str, float]]:
        """The kinds and levels tried."""
        return list(dict.fromkeys((row.kind, row.level) for row in self.rows))

    @property
    def layers(self) -> list[str]:
        """The layers' names."""
        return list(dict.fromkeys(row.layer for row in self.rows))

    def drop(self, layer: str, kind: str, level: float) -> float:
        """How much worse the metric is with one layer at a level; 0 for a level that changes nothing."""
        return next((r.drop for r in self.rows if (r.layer, r.kind, r.level) == (layer, kind, level)), 0.0)

    def write(self, path: str | Path) -> None:
        """As JSON."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(path: str | Path) -> Sensitivity:
        """From the JSON of :meth:`write`.

        Raises:
            ValueError: If it is none.
        """
        text = Path(path).read_bytes()
        try:
            state = json.loads(text)
            found = Sensitivity(**{**state, "rows": [Row(**row) for row in state["rows"]]})
            found._check()
        except Exception as error:  # a file that is cut, or another tool's
            raise ValueError(
                f"path={str(path)!r} cannot be read as a sensitivity: {first_line(error)}. Accepted is what "
                "Sensitivity.write wrote. Measure anew, or give another file."
            ) from error
        return found

    def _check(self) -> None:
        """Raise for a value of another kind than its field's."""
        numbers: list[object] = [self.metric, self.seconds, self.cached, *self.traces.values()]
        numbers += [number for row in self.rows for number in (row.level, row.metric, row.drop)]
        wrong: list[object] = [number for number in numbers if type(number) not in (int, float)]
        names = [*self.traces, *(row.layer for row in self.rows)]
        wrong += [name for name in names if not isinstance(name, str)]
        wrong += [row.kind for row in self.rows if row.kind not in ("sparsity", "bits")]
        if wrong:
            raise ValueError(f"a value is {shown(wrong[0])}")


@torch.no_grad()
def sensitivity(  # noqa: PLR0913  # each a setting of its own, given by name
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    sparsities: Sequence[float] = (0.5, 0.7, 0.9),
    bits: Sequence[int] = (8, 4, 3, 2),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    more_is_better: bool = True,
    inputs: Inputs | None = None,
    max_bytes: int = 1 << 30,
) -> Sensitivity:
    """Compress one layer at a time: its smallest weights zero, or its weights rounded, and see what the metric loses.

    As in Li 2017 (arXiv:1608.08710). Nothing is retrained, so that the drops rank layers and do not foretell accuracy.
    With ``inputs`` the model is captured, and for each layer what stands before it is computed only once.

    Args:
        model: In eval mode on the CPU; it is as before in the end.
        evaluate: The metric of the model over the same batches in the same order, by calling it.
        sparsities: Shares of a layer's weights to drop, 0..1.
        bits: Bits of a layer's weights, 2..8, symmetric with a scale an output channel.
        include: Name patterns of the layers; empty for all.
        exclude: Name patterns of layers to leave out.
        more_is_better: Whether a lower metric is worse.
        inputs: Example inputs of the model's forward.
        max_bytes: How many bytes of activations may be remembered.

    Raises:
        ValueError: If a level is out of range or a pattern matches no layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> x = torch.randn(16, 4)
        >>> found = sensitivity(net, lambda net: float(net(x).square().mean()), sparsities=[0.5], bits=[4])
        >>> [(row.layer, row.kind) for row in found.rows]
        [('0', 'sparsity'), ('0', 'bits'), ('2', 'sparsity'), ('2', 'bits')]
    """
    _check_arguments(model, evaluate, include=include, exclude=exclude, more_is_better=more_is_better, inputs=inputs)
    _check_levels(sparsities, bits)
    check_whole_number("sensitivity.max_bytes", max_bytes, "a whole number of bytes from 0", low=0)
    begin = time.perf_counter()
    sign = 1 if more_is_better else -1
    layers, _ = find_layers(model, PRUNABLE, include, exclude, skip_tied=True)
    found = Sensitivity(evaluate(model))
    replay = None
    if inputs is not None:
        try:
            replay = Replay(model, inputs, max_bytes)
        except Exception:  # what cannot be captured is computed whole, every time
            replay = None
    names = {id(p): name for name, p in model.named_parameters()}
    for layer in layers:
        before = layer.weight.detach().clone()
        turn = nullcontext(False) if replay is None else replay.of(names[id(layer.weight)], layer.weight)
        with turn as cached:
            found.cached += cached
            for kind, level in [("sparsity", s) for s in sparsities] + [("bits", b) for b in bits]:
                layer.weight.copy_(_pruned(before, level) if kind == "sparsity" else _rounded(layer, before, level))
                if replay is not None:
                    replay.begin()
                try:
                    metric = evaluate(model)
                finally:
                    layer.weight.copy_(before)
                found.rows.append(Row(layer.name, kind, level, metric, sign * (found.metric - metric)))
    found.seconds = time.perf_counter() - begin
    return found


def _check_arguments(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    more_is_better: bool,
    inputs: Inputs | None,
) -> None:
    check_instance("sensitivity.model", model, nn.Module, "an nn.Module")
    check_callable("sensitivity.evaluate", evaluate, "a function of the model that returns its metric")
    check_names("sensitivity.include", include)
    check_names("sensitivity.exclude", exclude)
    check_flag("sensitivity.more_is_better", more_is_better)
    if inputs is not None:
        check_instance("sensitivity.inputs", inputs, Inputs, "Inputs(args, kwargs) of the forward, or None")


def _check_levels(sparsities: Sequence[float], bits: Sequence[int]) -> None:
    shares = "a list of shares in 0..1, such as [0.5, 0.9]"
    check_numbers("sensitivity.sparsities", sparsities, shares, low=0, high=1)
    widths = "a list of whole numbers in 2..8, such as [8, 4]"
    check_numbers("sensitivity.bits", bits, widths, low=2, high=8, whole=True)
    if not sparsities and not bits:
        raise refusal("sensitivity.sparsities", sparsities, f"{shares}, where bits is empty too", "Name one at least.")


def _pruned(weight: Tensor, sparsity: float) -> Tensor:
    num = round(sparsity * weight.numel())
    index = weight.abs().flatten().topk(num, largest=False).indices
    return weight.flatten().index_fill(0, index, 0.0).view_as(weight)


def _rounded(layer: Layer, weight: Tensor, bits: float) -> Tensor:
    fake = WeightFakeQuantize(portable(Affine(int(bits), symmetric=True), Affine()), layer.out_axis)
    fake.enabled = True
    return fake(weight)


def hessian_traces(
    loss: Callable[[], Tensor], layers: Sequence[Layer], num_samples: int = 16, seed: int = 0
) -> dict[str, float]:
    """Mean eigenvalue of the Hessian of the loss in each layer's weight, by Hutchinson's estimate.

    The average trace of HAWQ-V2 (Dong 2020, arXiv:1911.03852): a layer's rank is this times the squared error that its
    compression makes. No evaluation is needed, but gradients of gradients.

    Args:
        loss: Computes the loss on the same batch each time.
        layers: The layers.
        num_samples: Random vectors of signs.
        seed: Of these.

    Returns:
        By layer, the trace over the number of weights.

    Example:
        >>> layer = Layer("w", nn.Linear(2, 1, bias=False))
        >>> hessian_traces(lambda: (3 * layer.weight.square()).sum(), [layer], 4)
        {'w': 6.0}
    """
    check_callable("hessian_traces.loss", loss, "a function that returns the loss")
    check_list("hessian_traces.layers", layers, Layer, "a Layer of find_layers", fewest=1)
    check_whole_number("hessian_traces.num_samples", num_samples, "a whole number from 1", low=1)
    check_whole_number("hessian_traces.seed", seed, "a whole number from 0", low=0, high=2**63 - 1)
    generator = torch.Generator().manual_seed(seed)
    weights = [layer.weight for layer in layers]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), weights, create_graph=True, allow_unused=True)
        sums = dict.fromkeys((layer.name for layer in layers), 0.0)
        for _ in range(num_samples):
            signs = [torch.randint(0, 2, w.shape, generator=generator).mul_(2).sub_(1).to(w) for w in weights]
            product = sum((g * v).sum() for g, v in zip(gradients, signs, strict=True) if g is not None)
            assert isinstance(product, Tensor)
            again = torch.autograd.grad(product, weights, retain_graph=True, allow_unused=True)
            for layer, h, v in zip(layers, again, signs, strict=True):
                sums[layer.name] += 0.0 if h is None else float((h * v).sum()) / v.numel()
    return {name: total / num_samples if math.isfinite(total) else math.nan for name, total in sums.items()}


def table(found: Sensitivity, metric: str) -> Table:
    """A row a layer, a column a level; each cell how much worse the metric gets."""
    title = f"{metric} {found.metric:.4f}; what each layer alone costs"
    caption = (
        f"{len(found.rows)} evaluations in {found.seconds:.1f} s; {found.cached} of {len(found.layers)} layers cached"
    )
    shown = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0, header_style="bold")
    shown.add_column("layer", overflow="fold")
    for kind, level in found.levels:
        shown.add_column(_label(kind, level), justify="right", no_wrap=True)
    if found.traces:
        shown.add_column("Hessian", justify="right", no_wrap=True)
    for layer in found.layers:
        cells = [f"{found.drop(layer, *level):.3f}" for level in found.levels]
        cells += [f"{found.traces[layer]:.1e}"] if found.traces else []
        shown.add_row(layer, *(f" {cell}" for cell in cells))
    return shown


def heat_map(found: Sensitivity, metric: str) -> Figure:
    """The same as a picture; what costs nothing is pale."""
    from matplotlib.figure import Figure

    drops = [[found.drop(layer, *level) for level in found.levels] for layer in found.layers]
    figure = Figure(figsize=(2.5 + 0.75 * len(found.levels), 1.6 + 0.3 * len(found.layers)), layout="constrained")
    axes = figure.subplots()
    most = max((d for row in drops for d in row if math.isfinite(d)), default=0.0)
    image = axes.imshow(drops, cmap="Oranges", vmin=0, vmax=max(most, 1e-9), aspect="auto")
    axes.set_xticks(range(len(found.levels)), [_label(*level) for level in found.levels])
    axes.set_yticks(range(len(found.layers)), found.layers)
    for i, row in enumerate(drops):
        for j, drop in enumerate(row):
            color = "white" if drop > 0.6 * most else "black"
            axes.text(j, i, f"{drop:.3f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_title(f"what each layer alone costs in {metric} ({found.metric:.4f})", fontsize=10)
    figure.colorbar(image, ax=axes)
    return figure


def _label(kind: str, level: float) -> str:
    return f"-{100 * level:g}%" if kind == "sparsity" else f"{level:g} bit"
