"""Which layers scales can be moved between: a second layer reads the first through f(s x) = s f(x) for s > 0 alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_compress.functions import COPIES, DROPOUTS, LAYERS, POOLS, RESHAPES
from lightning_compress.layers import Layer, modules_by_name
from lightning_compress.trace import Began, Ran, Trace, Value

__all__ = ["Chains", "find_pairs"]

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
        trace: Of one batch of the model, from :class:`lightning_compress.watch.Watch`.
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
        self._by_name = modules_by_name(model)
        self._layers = self._by_weight(model, layers)
        self._norms = {
            trace.tensors[name, "running_var"]: name
            for name, module in self._by_name.items()
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
        own = [key for key, p in self._by_name[name]._parameters.items() if p is not None]
        return all(self._num_reads[self._tensors[name, key]] == 1 for key in own)

    def _by_weight(self, model: nn.Module, layers: Sequence[Layer]) -> dict[int, Layer]:
        owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        names = {id(module): name for name, module in self._by_name.items()}
        found = {}
        for layer in layers:
            is_stored = not layer.axes and not layer.source
            is_simple = is_stored and isinstance(layer.module, nn.Linear | nn.modules.conv._ConvNd)
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
