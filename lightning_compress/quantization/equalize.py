"""Cross-layer equalization: channels of like ranges, by moving scales between layers (Nagel 2019, arXiv:1906.04721).

Section 4.1. Where only positively homogeneous functions lie between two layers, f(s x) = s f(x), a channel may be
divided by s at the first and multiplied by s at the second without a change of the function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functions import COPIES, DROPOUTS, LAYERS, POOLS, RESHAPES
from lightning_compress.layers import Layer, modules_by_name
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.trace import Began, Ran, Trace, Value

__all__ = ["Chains", "equalize", "find_pairs"]

# f(s x) = s f(x) for s > 0, value by value
_ELEMENTWISE = {"relu", "leaky_relu", "prelu", *COPIES, *DROPOUTS}
_REDUCTIONS = {"mean", "sum", "amax"}


@dataclass
class Chains:
    """What scales can be moved between, by name.

    Args:
        pairs: Two layers, of which the second alone reads the first, through positively homogeneous functions.
        norms: The batch norm right behind a layer, by the layer.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)


def find_pairs(trace: Trace, model: nn.Module, layers: Sequence[Layer]) -> Chains:
    """What scales can be moved between.

    Args:
        trace: Of one batch of the model, from :class:`lightning_compress.trace.Watch`.
        model: The root.
        layers: The layers that may be scaled; convolutions and linear layers are taken.
    """
    walk = _Walk(trace, model, layers)
    chains = Chains()
    for origin in walk.normed:
        if walk.is_only_read_on(origin) and walk.is_read_once(origin.norm):
            chains.norms[origin.layer] = origin.norm
    for origin, second in walk.read:
        # the norm on the way must be one that scales can be moved to
        is_whole = chains.norms.get(origin.layer, "") == origin.norm
        if walk.is_only_read_on(origin) and walk.is_read_once(second) and is_whole:
            chains.pairs.append((origin.layer, second))
    return chains


@dataclass(frozen=True)
class _Origin:
    """The layer whose output channels a value still has.

    Args:
        layer: Its name.
        path: Numbers of the values from the layer's output to here.
        last: Whether the channels lie along the last axis rather than along axis 1.
        norm: Name of the batch norm right behind it.
    """

    layer: str
    path: tuple[int, ...]
    last: bool
    norm: str = ""


class _Walk:
    """Follows channels through the functions of a trace; what the functions read counts, and what leaves the model.

    Weights are known by the tensor that a function reads, not by the module that is called: so are those that
    ``F.linear`` is given.
    """

    def __init__(self, trace: Trace, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.read: list[tuple[_Origin, str]] = []
        self.normed: list[_Origin] = []
        self._tensors = trace.tensors
        self._modules = modules_by_name(model)
        self._layers = self._by_weight(model, layers)
        self._norms = {
            trace.tensors[name, "running_var"]: name
            for name, module in self._modules.items()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None
        }
        self._origins: dict[int, _Origin] = {}
        self._num_reads: Counter[int] = Counter()
        for event in trace.events:
            if isinstance(event, Ran):
                self._run(event)
            elif not isinstance(event, Began) and not event.name:
                self._num_reads.update(value.number for value in event.outputs)

    def is_only_read_on(self, origin: _Origin) -> bool:
        """Whether nothing else reads a value on the way from a layer."""
        return self.is_read_once(origin.layer) and all(self._num_reads[number] == 1 for number in origin.path)

    def is_read_once(self, name: str) -> bool:
        """Whether every parameter of a module was read once."""
        own = [key for key, p in self._modules[name]._parameters.items() if p is not None]
        return all(self._num_reads[self._tensors[name, key]] == 1 for key in own)

    def _by_weight(self, model: nn.Module, layers: Sequence[Layer]) -> dict[int, Layer]:
        owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        names = {id(module): name for name, module in self._modules.items()}
        found = {}
        for layer in layers:
            is_simple = isinstance(layer.module, nn.Linear | nn.modules.conv._ConvNd)
            if is_simple and owners[id(layer.weight)] == 1:
                found[self._tensors[names[id(layer.module)], layer.parameter]] = layer
        return found

    def _run(self, event: Ran) -> None:
        self._num_reads.update(value.number for value in event.reads)
        if len(event.results) != 1 or not event.args or not isinstance(event.args[0], Value):
            return
        result = event.results[0]
        origin = self._origin_of(event, event.args[0], result)
        if origin is None:
            return
        self._origins[result.number] = replace(origin, path=(*origin.path, result.number))
        if event.name == "batch_norm":
            self.normed.append(replace(origin, path=origin.path[:1]))

    def _origin_of(self, event: Ran, x: Value, result: Value) -> _Origin | None:
        origin = self._origins.get(x.number)
        if event.name in LAYERS:
            weight = event.args[1] if len(event.args) > 1 else None
            layer = self._layers.get(weight.number) if isinstance(weight, Value) else None
            if layer is not None:
                return self._origin_at(layer, x, origin)
        if origin is None or not result.dtype.is_floating_point:
            return None
        if event.name == "batch_norm":
            variance = event.args[2] if len(event.args) > 2 else event.kwargs.get("running_var")
            norm = self._norms.get(variance.number, "") if isinstance(variance, Value) else ""
            fits = bool(norm) and not origin.last and len(origin.path) == 1
            return replace(origin, norm=norm) if fits else None
        return origin if _keeps_channels(event, x.shape, result.shape, origin.last) else None

    def _origin_at(self, layer: Layer, x: Value, origin: _Origin | None) -> _Origin | None:
        """Where the channels of a layer's output come from: the layer itself, which may be the second of a pair."""
        num_axes = len(x.shape)
        is_linear = isinstance(layer.module, nn.Linear)
        if not is_linear and num_axes != layer.weight.dim():
            return None
        if origin is not None:
            reads_channels = num_axes == 2 or origin.last if is_linear else not origin.last
            if reads_channels:
                self.read.append((origin, layer.name))
        return _Origin(layer.name, (), last=is_linear and num_axes != 2)


def _keeps_channels(event: Ran, before: tuple[int, ...], after: tuple[int, ...], last: bool) -> bool:
    """Whether a function is positively homogeneous and its result has the channels of its input, in their order.

    Args:
        event: The function.
        before: Shape of its input.
        after: Shape of its result.
        last: Whether the channels lie along the last axis rather than along axis 1.
    """
    num_axes = len(before)
    if event.name in _ELEMENTWISE:
        return after == before
    if event.name in POOLS:
        return not last and num_axes == POOLS[event.name] + 2
    if event.name in RESHAPES:
        if last:
            return after[-1:] == before[-1:]
        return after[:2] == before[:2] or (len(after) == 2 and after[0] == before[0])
    if event.name in _REDUCTIONS:
        dims = event.args[1] if len(event.args) > 1 else event.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or range(num_axes)
        return not {d % num_axes for d in dims} & ({num_axes - 1} if last else {0, 1})
    return False


@torch.no_grad()
def equalize(
    model: nn.Module, layers: Sequence[Layer], chains: Chains, num_sweeps: int = 50, tolerance: float = 1e-3
) -> None:
    """Give the channels between two layers equal ranges in both, in place; the function in eval mode stays.

    A range is the largest magnitude of a channel's weights: r1 of the first layer's output channel, r2 of the second's
    input channel. The first is divided by s = sqrt(r1 r2) / r2, the second multiplied. The bias counts as a weight, or
    a channel that is nearly constant would be blown up.

    With a batch norm between, its weight and bias are divided: it is they that scale the channel. The weight before it
    may then have any scale a channel, so that what is at stake are the second layer and the activation between, whose
    range is r1 = |bias| + 3 |weight| of the norm. A layer with one scale a tensor and a batch norm gets output channels
    of one range, which the norm's running statistics follow.

    Args:
        model: The model.
        layers: The layers that are quantized.
        chains: Where scales can be moved, from :func:`find_pairs`.
        num_sweeps: Most times to go over all pairs.
        tolerance: Enough is when no scale moves by more than this share.
    """
    by_name, modules = {layer.name: layer for layer in layers}, modules_by_name(model)
    norms: dict[str, Any] = {layer: modules[norm] for layer, norm in chains.norms.items()}
    pairs = [pair for pair in chains.pairs if pair[0] not in norms or norms[pair[0]].weight is not None]
    for _ in range(num_sweeps):
        moved = 0.0
        for first, second in pairs:
            scale = _balance(by_name[first], norms.get(first), by_name[second], norms.get(second))
            moved = max(moved, float(scale.log().abs().max()))
        if moved < tolerance:
            break
    for name, norm in norms.items():
        layer = by_name[name]
        if weights(layer.module)[layer.parameter].axis is None and norm.weight is not None:
            _level(layer, norm)


def _balance(first: Layer, norm: Any, second: Layer, second_norm: Any) -> Tensor:
    """Move scales from one layer to the next; the scales."""
    num = _num_outputs(first)
    if norm is not None:
        ranges = 3 * norm.weight.abs() + (0 if norm.bias is None else norm.bias.abs())
    else:
        bias = first.module._parameters.get("bias")
        ranges = _ranges(first, num, outputs=True)
        ranges = ranges if bias is None else torch.maximum(ranges, bias.abs())
    weight = second.weight.detach()
    if second_norm is not None:
        weight = weight * _spread(second, _factor(second_norm), outputs=True)
    theirs = _ranges(second, num, outputs=False, weight=weight)
    both = (ranges > 0) & (theirs > 0)
    scale = torch.where(both, (ranges / theirs.where(both, 1)).sqrt(), 1.0)
    if norm is None:
        _multiply(first, 1 / scale)
    else:
        norm.weight.div_(scale)
        if norm.bias is not None:
            norm.bias.div_(scale)
    second.weight.mul_(_spread(second, scale, outputs=False))
    return scale


def _level(layer: Layer, norm: Any) -> None:
    """Output channels of one range; the batch norm takes the scales back."""
    ranges = _ranges(layer, _num_outputs(layer), outputs=True)
    scale = torch.where(ranges > 0, ranges.max() / ranges, 1.0)
    before = _factor(norm)
    _multiply(layer, scale)
    norm.running_mean.mul_(scale)
    norm.running_var.mul_(scale.square())
    norm.weight.mul_(torch.where(before == 0, 1.0, before / (scale * _factor(norm))))


def _multiply(layer: Layer, scale: Tensor) -> None:
    """Scale what a layer puts out."""
    layer.weight.mul_(_spread(layer, scale, outputs=True))
    bias = layer.module._parameters.get("bias")
    if bias is not None:
        bias.mul_(scale)


def _factor(norm: Any) -> Tensor:
    """What a batch norm multiplies a channel by."""
    factor = (norm.running_var + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight


def _num_outputs(layer: Layer) -> int:
    module: Any = layer.module
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _channels(layer: Layer, num: int, outputs: bool) -> Tensor:
    """Which output or input channel each of the weight's two first axes' entries belongs to."""
    rows, columns = layer.weight.shape[:2]
    groups = getattr(layer.module, "groups", 1)
    along_rows = outputs != (layer.out_axis == 1)
    each = torch.arange(num, device=layer.weight.device)
    if along_rows:
        return each.view(rows, 1).expand(rows, columns)
    if isinstance(layer.module, nn.Linear):  # behind a flatten, neighbouring columns are of one channel
        return each.repeat_interleave(columns // num).expand(rows, columns)
    return each.view(groups, 1, columns).expand(groups, rows // groups, columns).reshape(rows, columns)


def _spread(layer: Layer, values: Tensor, outputs: bool) -> Tensor:
    """Values of the channels, one each, in a shape that broadcasts against the weight."""
    chosen = values[_channels(layer, len(values), outputs)]
    return chosen.view(*chosen.shape, *[1] * (layer.weight.dim() - 2)).to(layer.weight.dtype)


def _ranges(layer: Layer, num: int, outputs: bool, weight: Tensor | None = None) -> Tensor:
    """The largest magnitude of each channel's weights."""
    most = (layer.weight.detach() if weight is None else weight).abs().flatten(2 if layer.weight.dim() > 2 else 1)
    most = most.amax(2) if most.dim() > 2 else most
    index = _channels(layer, num, outputs)
    return torch.zeros(num, dtype=most.dtype, device=most.device).scatter_reduce_(
        0, index.reshape(-1), most.reshape(-1), "amax"
    )
