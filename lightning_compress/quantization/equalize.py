"""Cross-layer equalization: channels of like ranges, by moving scales between layers (Nagel 2019, arXiv:1906.04721).

Section 4.1. Where only positively homogeneous functions lie between two layers, f(s x) = s f(x), a channel may be
divided by s at the first and multiplied by s at the second without a change of the function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.layers import Layer, modules_by_name
from lightning_compress.quantization.fake_quant import weights

__all__ = ["ChainTracer", "Chains", "equalize"]

_LAYERS = ("linear", *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)))
_ELEMENTWISE = {
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "contiguous", "clone", "float", "to"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d"),
}
_POOLS = {
    f"{adaptive}{kind}_pool{d}d": d for adaptive in ("", "adaptive_") for kind in ("max", "avg") for d in (1, 2, 3)
}
_SHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
_REDUCTIONS = {"mean", "sum", "amax"}
_NO_VALUES = {"size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "__len__", "type", "get_device"}


@dataclass
class Chains:
    """What scales can be moved between, by name.

    Args:
        pairs: Two layers, of which the second alone reads the first, through positively homogeneous functions.
        norms: The batch norm right behind a layer, by the layer.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Origin:
    """The layer whose output channels a value still has.

    Args:
        layer: Its name.
        norm: Name of the batch norm right behind it.
        path: The values from the layer's output to here.
        last: Whether the channels lie along the last axis rather than along axis 1.
    """

    layer: str
    path: tuple[tuple[int, int], ...]
    last: bool
    norm: str = ""


class ChainTracer(TorchFunctionMode):
    """Watches one batch; use as a context around it, then read :attr:`chains`.

    Args:
        model: The root.
        layers: The layers that may be scaled; convolutions and linear layers are taken.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.chains = Chains()
        self._model = model
        self._modules = modules_by_name(model)
        simple = [x for x in layers if isinstance(x.module, nn.Linear | nn.modules.conv._ConvNd)]
        owners = Counter(id(p) for m in dict.fromkeys(model.modules()) for p in m._parameters.values())
        self._layers = {id(x.weight): x for x in simple if owners[id(x.weight)] == 1}
        norms = {n: m for n, m in self._modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        self._norms = {id(m.running_var): n for n, m in norms.items() if m.running_var is not None}
        self._keep: list[Any] = []  # tensors stay alive, so that an id stays theirs
        self._version: Counter[int] = Counter()
        self._uses: Counter[tuple[int, int]] = Counter()
        self._origin: dict[tuple[int, int], _Origin] = {}
        self._read: list[tuple[_Origin, str]] = []
        self._normed: list[_Origin] = []
        self._handle: Any = None

    def __enter__(self) -> ChainTracer:
        """Watch what leaves the model, too."""
        self._handle = self._model.register_forward_hook(lambda module, args, output: self.use(output))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Settle which values only one layer reads."""
        super().__exit__(*error)
        self._handle.remove()
        for origin in self._normed:
            if self._is_only_read_on(origin) and self._is_one(origin.norm):
                self.chains.norms[origin.layer] = origin.norm
        for origin, second in self._read:
            is_whole = self.chains.norms.get(origin.layer, "") == origin.norm
            if self._is_only_read_on(origin) and self._is_one(second) and is_whole:
                self.chains.pairs.append((origin.layer, second))
        for held in (self._keep, self._read, self._normed):
            held.clear()

    def use(self, values: Any) -> None:
        """Count values as used outside of the model."""
        tensors = [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Tensor)]
        self._uses.update(self._key(x) for x in tensors)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Follow channels through functions."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)]
        if not results and name in ("__get__", *_NO_VALUES):
            return output
        self._keep.append((tensors, results))
        for x in tensors:
            self._uses[self._key(x)] += 1
        origin = self._origin_of(name, args, kwargs, results[0]) if len(results) == 1 and args else None
        for result in results:
            if any(result is x for x in tensors):  # changed in place: from now on another value
                self._version[id(result)] += 1
        if origin is not None:
            key = self._key(results[0])
            self._origin[key] = replace(origin, path=(*origin.path, key))
            if name == "batch_norm":
                self._normed.append(replace(origin, path=origin.path[:1]))
        return output

    def _origin_of(self, name: str, args: Any, kwargs: dict[str, Any], result: Tensor) -> _Origin | None:
        x = args[0]
        origin = self._origin.get(self._key(x)) if isinstance(x, Tensor) else None
        if name in _LAYERS and len(args) > 1 and id(args[1]) in self._layers:
            layer = self._layers[id(args[1])]
            linear = isinstance(layer.module, nn.Linear)
            if not linear and x.dim() != layer.weight.dim():
                return None
            if origin is not None and (x.dim() == 2 or origin.last if linear else not origin.last):
                self._read.append((origin, layer.name))
            return _Origin(layer.name, (), last=linear and x.dim() != 2)
        if origin is None or not torch.is_floating_point(result):
            return None
        if name == "batch_norm":
            norm = self._norms.get(id(args[2] if len(args) > 2 else kwargs.get("running_var")), "")
            fits = bool(norm) and not origin.last and len(origin.path) == 1
            return replace(origin, norm=norm) if fits else None
        return origin if _keeps_channels(name, args, kwargs, result, origin.last) else None

    def _key(self, x: Tensor) -> tuple[int, int]:
        return id(x), self._version[id(x)]

    def _is_only_read_on(self, origin: _Origin) -> bool:
        return self._is_one(origin.layer) and all(self._uses[key] == 1 for key in origin.path)

    def _is_one(self, name: str) -> bool:
        """Whether every parameter of a module was read once."""
        return all(self._uses[id(p), 0] == 1 for p in self._modules[name]._parameters.values() if p is not None)


def _keeps_channels(name: str, args: Any, kwargs: dict[str, Any], result: Tensor, last: bool) -> bool:
    """Whether a function is positively homogeneous and its result has the channels of its input, in their order."""
    x = args[0]
    if name in _ELEMENTWISE:
        return result.shape == x.shape
    if name in _POOLS:
        return not last and x.dim() == _POOLS[name] + 2
    if name in _SHAPES:
        if last:
            return result.shape[-1:] == x.shape[-1:]
        return result.shape[:2] == x.shape[:2] or (result.dim() == 2 and len(result) == len(x))
    if name in _REDUCTIONS:
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or range(x.dim())
        return not {d % x.dim() for d in dims} & ({x.dim() - 1} if last else {0, 1})
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
        chains: Where scales can be moved, from :class:`ChainTracer`.
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
