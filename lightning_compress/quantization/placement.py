"""Where activations are quantized: found by watching one batch run, without capturing a graph.

Every tensor that an integer kernel reads is quantized once, at the module that produced it (the end of a conv-bn-relu
chain) or, where a function produced it, at the outermost module that receives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import nn

from lightning_compress.functions import ADDITIONS, AVERAGES, SAME_VALUES
from lightning_compress.layers import EMBEDDING, modules_by_name
from lightning_compress.trace import Began, Ended, Ran, Trace, Value, find_norms

__all__ = ["Placement", "find_placement"]


@dataclass
class Placement:
    """Names of the modules that quantize, and of the batch norms that a layer swallows.

    Args:
        inputs: Modules whose input is quantized.
        outputs: Modules whose output is quantized.
        folds: Batch norm by the convolution or linear layer right before it.
        feeds: The place (``name:input`` or ``name:output``) whose values a layer reads, by the layer's name.
    """

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    folds: dict[str, str] = field(default_factory=dict)
    feeds: dict[str, str] = field(default_factory=dict)

    def without(self, is_gone: Callable[[str], bool]) -> Placement:
        """What is left of it where modules are gone; a layer that one of them fed reads floats."""

        def left(names: dict[str, str]) -> dict[str, str]:
            return {a: b for a, b in names.items() if not is_gone(a) and not is_gone(b.partition(":")[0])}

        inputs = [name for name in self.inputs if not is_gone(name)]
        outputs = [name for name in self.outputs if not is_gone(name)]
        return Placement(inputs, outputs, left(self.folds), left(self.feeds))


def find_placement(trace: Trace, model: nn.Module, quantized: Collection[str]) -> Placement:
    """Where the activations of a model are quantized.

    Args:
        trace: Of one batch of the model, from :class:`lightning_compress.watch.Watch`.
        model: The root; its own call is watched, but it never quantizes.
        quantized: Names of the modules with quantized weights.
    """
    modules = modules_by_name(model)
    walk = _Walk(modules, quantized)
    for time, event in enumerate(trace.events):
        walk.step(time, event)
    placement = walk.placement
    norms = {name for name, module in modules.items() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    for layer, norm in find_norms(trace, quantized, norms)[0].items():
        output = walk.outputs[layer]
        is_called_once = walk.num_calls[layer] == walk.num_calls[norm] == 1
        has_statistics = modules[norm].running_var is not None
        is_read_once = walk.num_reads[output.number] == 1
        if is_called_once and is_read_once and has_statistics and _channels_agree(modules[layer], output):
            placement.folds[layer] = norm
    return placement


@dataclass
class _Call:
    name: str
    receives: int | None
    began: int


class _Walk:
    """Goes through a trace and places quantizers.

    Values of the same numbers, such as a tensor and its transpose, have one root: the first of them.
    """

    def __init__(self, modules: dict[str, nn.Module], quantized: Collection[str]) -> None:
        self.placement = Placement()
        self.num_calls: Counter[str] = Counter()
        self.num_reads: Counter[int] = Counter()
        self.outputs: dict[str, Value] = {}
        self._modules = modules
        self._quantized = quantized
        self._same: dict[int, int] = {}
        self._producer: dict[int, tuple[str, int]] = {}
        self._calls: list[_Call] = []

    def step(self, time: int, event: Began | Ended | Ran) -> None:
        """Take the next event."""
        if isinstance(event, Began):
            self._begin(time, event)
        elif isinstance(event, Ended):
            self._end(time, event)
        elif self._calls:  # a loss outside of the model quantizes nothing
            self._run(event)

    def _begin(self, time: int, event: Began) -> None:
        first = event.args[0] if event.args else None
        receives = None if first is None else self._root(first)
        self.num_calls[event.name] += 1
        self._calls.append(_Call(event.name, receives, time))
        module = self._modules[event.name]
        if event.name in self._quantized and not isinstance(module, EMBEDDING):
            # attention reads query, key and value
            num_read = 3 if isinstance(module, nn.MultiheadAttention) else 1
            for value in event.args[:num_read]:
                if value is not None and value.dtype.is_floating_point:
                    self.placement.feeds[event.name] = self._need(value)

    def _end(self, time: int, event: Ended) -> None:
        call = self._calls.pop()
        if not self._calls:  # what leaves the model is read there
            self.num_reads.update(value.number for value in event.outputs)
        if event.output is None:
            return
        self.outputs[event.name] = event.output
        if not event.name:
            return
        root = self._root(event.output)
        _, since = self._producer.get(root, ("", -1))
        if root != call.receives and since < call.began:  # made here, neither handed through nor made inside
            self._producer[root] = (event.name, time)

    def _run(self, event: Ran) -> None:
        if event.name == "get" or not event.results:  # an attribute such as shape or grad
            return
        self.num_reads.update(value.number for value in event.reads)
        operands = [value for value in event.reads if _is_activation(value)]
        if event.name in AVERAGES or (event.name in ADDITIONS and len(operands) > 1):
            for value in operands:
                self._need(value)
        if event.name in SAME_VALUES:
            self._same.update((result.number, self._root(event.reads[0])) for result in event.results)

    def _root(self, value: Value) -> int:
        return self._same.get(value.number, value.number)

    def _need(self, value: Value) -> str:
        """Let the module that produced a value, or else the outermost that receives it, quantize it; name the place."""
        root = self._root(value)
        producer, _ = self._producer.get(root, ("", 0))
        if producer:
            if producer not in self.placement.outputs:
                self.placement.outputs.append(producer)
            return f"{producer}:output"
        for call in self._calls:
            if call.name and call.receives == root:
                if call.name not in self.placement.inputs:
                    self.placement.inputs.append(call.name)
                return f"{call.name}:input"
        return ""


def _channels_agree(layer: nn.Module, output: Value) -> bool:
    """Whether the channels that a batch norm sees, axis 1, are those that have a scale of their own in the weight."""
    num_axes = len(output.shape)
    if isinstance(layer, nn.Linear):
        return num_axes == 2
    if not isinstance(layer, nn.modules.conv._ConvNd) or num_axes != layer.weight.dim():
        return False
    return layer.groups == 1 or not layer.transposed


def _is_activation(value: Value) -> bool:
    return value.dtype.is_floating_point and len(value.shape) >= 2 and not value.is_parameter
