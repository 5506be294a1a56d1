"""Goes through the trace of one batch, and finds where what integer kernels read and give can be quantized.

What a place is: ``name:input`` and ``name:output`` of a module, ``name:silu.1`` of a function in its forward.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_compress.functions import ADDITIONS, AVERAGES, CLIPS, LAYERS, MULTIPLICATIONS, STATISTICS, keeps_values
from lightning_compress.layers import EMBEDDING, QUANTIZABLE
from lightning_compress.multiplied import Product
from lightning_compress.trace import Began, Ended, Ran, Trace, Value

__all__ = ["Walk"]

_CONVOLUTION = nn.modules.conv._ConvNd


@dataclass
class _Call:
    name: str
    receives: int | None
    began: int
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class _Wish:
    """Operands that are quantized where the result is, with the place of each."""

    result: int
    operands: list[tuple[int, str]]


class Walk:
    """Where values are quantized.

    Values of the same numbers, such as a tensor and its transpose, have one root: the first of them.

    Args:
        trace: Of one batch.
        modules: All modules by name.
        quantized: Names of those with quantized weights.
        products: The multiplications by quantized raw parameters, by the index of the event.
    """

    def __init__(
        self,
        trace: Trace,
        modules: Mapping[str, nn.Module],
        quantized: Collection[str],
        products: Mapping[int, Sequence[Product]],
    ) -> None:
        self.places: list[str] = []
        self.feeds: dict[str, str] = {}
        self.num_calls: Counter[str] = Counter()
        self.num_reads: Counter[int] = Counter()
        self.outputs: dict[str, Value] = {}
        self._every_output: dict[str, list[Value]] = defaultdict(list)
        self._modules = modules
        self._quantized = quantized
        self._same: dict[int, int] = {}
        self._producer: dict[int, tuple[str, int]] = {}
        self._function: dict[int, str] = {}  # the call site that made a value
        self._maker: dict[int, str] = {}  # the function that made it
        self._readers: dict[int, list[Ran]] = defaultdict(list)
        self._receivers: dict[int, set[str]] = {}  # modules that receive a value and hold all that reads it
        self._quantized_at: dict[int, str] = {}
        self._received: dict[str, set[int]] = defaultdict(set)  # what is quantized at the input of a module
        self._wishes: list[_Wish] = []
        self._calls: list[_Call] = []
        # the layer that a stored weight belongs to, and the layers that multiply by it as it is stored
        own = {name: number for (name, key), number in trace.tensors.items() if key == "weight"}
        layers = [name for name in quantized if isinstance(modules.get(name), QUANTIZABLE)]
        self._weight_of = {name: own[name] for name in layers if name in own}
        self._owners = {number: name for name, number in self._weight_of.items()}
        self._as_stored: set[str] = set()
        self._computed: set[str] = set()
        for time, event in enumerate(trace.events):
            self._step(time, event)
            for product in products.get(time, ()):
                if self._calls:
                    self.feeds.setdefault(product.name, self._need(product.by))

    @property
    def transformed(self) -> set[str]:
        """Layers that multiply by what they compute from their weight, and never by the weight."""
        return self._computed - self._as_stored

    def quantize_outputs(self, folds: Mapping[str, str]) -> None:
        """Quantize what convolutions give, behind the batch norm that is folded into them and behind a relu.

        Kernels of onnxruntime give integers or are float kernels. Then the operands of what gives integers.
        """
        for name in self._every_output:
            if name in self._quantized and isinstance(self._modules[name], _CONVOLUTION):
                for output in self._every_output[folds.get(name, name)]:
                    self._quantize_output(output)
        for wish in reversed(self._wishes):
            if self._is_quantized(wish.result):
                for root, place in wish.operands:
                    self._quantize(root, place)
        self._quantize_once()

    def _is_quantized(self, number: int) -> bool:
        """Whether a value is, or what a relu alone makes of it."""
        readers = self._readers[number]
        is_clipped = self.num_reads[number] == 1 and bool(readers) and readers[0].name in CLIPS
        result = readers[0].results[0].number if is_clipped and readers[0].results else number
        return bool({number, result} & self._quantized_at.keys())

    def _quantize_output(self, output: Value) -> None:
        readers = self._readers[output.number]
        if self.num_reads[output.number] == 1 and readers and readers[0].name in CLIPS and readers[0].results:
            output = readers[0].results[0]
        at = self._quantized_at.get(self._root(output), "")
        # what a module quantizes at its input is in float for readers around it
        if not at.endswith(":input") or at.rpartition(":")[0] not in self._receivers[self._root(output)]:
            self._need(output)

    def _step(self, time: int, event: Began | Ended | Ran) -> None:
        if isinstance(event, Began):
            self._begin(time, event)
        elif isinstance(event, Ended):
            self._end(time, event)
        elif self._calls:  # a loss outside of the model quantizes nothing
            self._run(event)

    def _begin(self, time: int, event: Began) -> None:
        first = next(iter(event.args or event.kwargs.values()), None)
        self.num_calls[event.name] += 1
        self._calls.append(_Call(event.name, None if first is None else self._root(first), time))
        module = self._modules[event.name]
        is_layer = isinstance(module, QUANTIZABLE) and not isinstance(module, EMBEDDING)
        if event.name in self._quantized and is_layer:
            for value in _read_by(module, event):
                if value is not None and value.dtype.is_floating_point:
                    self.feeds[event.name] = self._need(value)

    def _end(self, time: int, event: Ended) -> None:
        call = self._calls.pop()
        if not self._calls:  # what leaves the model is read there
            self.num_reads.update(value.number for value in event.outputs)
            self._receivers.update({self._root(value): set() for value in event.outputs})
        if event.output is None:
            return
        self.outputs[event.name] = event.output
        self._every_output[event.name].append(event.output)
        if not event.name:
            return
        root = self._root(event.output)
        _, since = self._producer.get(root, ("", -1))
        if root != call.receives and since < call.began:  # made here, neither handed through nor made inside
            self._producer[root] = (event.name, time)

    def _run(self, event: Ran) -> None:
        if event.name == "get" or not event.results:  # an attribute such as shape or grad
            return
        call = self._calls[-1]
        site = f"{call.name}:{event.name}.{call.counts[event.name]}"
        call.counts[event.name] += 1
        self.num_reads.update(value.number for value in event.reads)
        for value in event.reads:
            self._readers[value.number].append(event)
            root = self._root(value)
            inside = {call.name for call in self._calls if call.receives == root}
            self._receivers[root] = inside & self._receivers.get(root, inside)
        self._read(event)
        out = f"{call.name}.out_proj".removeprefix(".")
        if event.name == "multi_head_attention_forward" and {call.name, out} <= {*self._quantized}:
            self.feeds[out] = site
            self.places += [site] if site not in self.places else []
        if keeps_values(event.name, event.kwargs):
            self._same.update((result.number, self._root(event.reads[0])) for result in event.results)
        elif len(event.results) == 1:
            self._function[event.results[0].number] = site
            self._maker[event.results[0].number] = event.name

    def _read(self, event: Ran) -> None:
        """Quantize what a function reads."""
        operands = [value for value in event.reads if _is_activation(value)]
        result = event.results[0].number
        if event.name in LAYERS:
            self._read_by_layer(event)
        elif event.name in AVERAGES:
            # what a function made may be anything, a mask with infinities, say: an integer kernel must gain by it
            made = [value for value in operands if not self._is_made_by_function(value)]
            for value in made:
                self._need(value)
            self._wish(result, [value for value in operands if value not in made])
        elif event.name in ADDITIONS and len(operands) > 1:
            # a sum that a norm reads in float has no integer kernel, and in transformers the widest ranges of all
            self._wish(result, operands)
        elif event.name in MULTIPLICATIONS and len(operands) > 1:
            made_by = {self._maker.get(self._root(value), "") for value in operands}
            self._wish(result, [] if made_by & STATISTICS else operands)

    def _read_by_layer(self, event: Ran) -> None:
        """A convolution or a linear layer, by whoever calls it."""
        x, weight, *_ = (*event.args, event.kwargs.get("input"), event.kwargs.get("weight"), None)
        weight = event.kwargs.get("weight", weight)
        if not isinstance(x, Value) or not isinstance(weight, Value):
            return
        inside = self._calls[-1].name
        owner = self._owners.get(weight.number)
        if owner is not None:
            self._as_stored |= {owner, inside}
            place = self._need(x)
            self.feeds.setdefault(owner, place)
        elif inside in self._weight_of and self._readers[self._weight_of[inside]]:
            self._computed.add(inside)

    def _wish(self, result: int, operands: Iterable[Value]) -> None:
        known = [(self._root(value), self._place_of(value)) for value in operands]
        self._wishes.append(_Wish(result, [(root, place) for root, place in known if place]))

    def _root(self, value: Value) -> int:
        return self._same.get(value.number, value.number)

    def _is_made_by_function(self, value: Value) -> bool:
        place = self._place_of(value)
        return bool(place) and place == self._function.get(self._root(value))

    def _place_of(self, value: Value) -> str:
        """Where a value can be quantized: by what module made it, the outermost that receives it, or the function."""
        root = self._root(value)
        at = self._quantized_at.get(root, "")
        if at and not at.endswith(":input"):  # which quantizes for what runs in that module alone
            return at
        producer, _ = self._producer.get(root, ("", 0))
        if producer:
            return f"{producer}:output"
        for call in self._calls:
            if call.name and call.receives == root:
                return f"{call.name}:input"
        return self._function.get(root, "")

    def _need(self, value: Value) -> str:
        """Let a value be quantized; the place, empty without one."""
        place = self._place_of(value)
        self._quantize(self._root(value), place)
        return place

    def _quantize(self, root: int, place: str) -> None:
        if not place:
            return
        if place.endswith(":input"):
            self._received[place].add(root)
            self._quantized_at.setdefault(root, place)
        else:
            self._quantized_at[root] = place
        if place not in self.places:
            self.places.append(place)

    def _quantize_once(self) -> None:
        """No module quantizes at its input what was quantized where it was made."""
        for place, roots in self._received.items():
            made = {self._quantized_at[root] for root in roots}
            if not any(at.endswith(":input") for at in made):
                self.places.remove(place)
                feeds = {layer: min(made) for layer, at in self.feeds.items() if at == place}
                self.feeds.update(feeds)


def _read_by(module: nn.Module, event: Began) -> list[Value | None]:
    """The values that a layer multiplies its weights by."""
    if not isinstance(module, nn.MultiheadAttention):
        return [next(iter(event.args or event.kwargs.values()), None)]
    names = ("query", "key", "value")
    return [*event.args[:3], *(event.kwargs.get(name) for name in names[len(event.args) :])]


def _is_activation(value: Any) -> bool:
    return value.dtype.is_floating_point and len(value.shape) >= 2 and not value.is_parameter
