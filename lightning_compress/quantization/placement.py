"""Where activations are quantized: found by watching one batch run, without capturing a graph.

Every tensor that an integer kernel reads, or that a convolution gives, is quantized once: at the module that produced
it (the end of a conv-bn-relu chain), else at the outermost module that receives it, else where a function made it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_compress.layers import Layer, modules_by_name
from lightning_compress.multiplied import Product, find_products
from lightning_compress.quantization.call_sites import is_call_site
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.walk import Walk
from lightning_compress.trace import Trace, Value, find_norms, ran

__all__ = ["Placement", "find_placement", "without_data"]


@dataclass
class Placement:
    """Names of the modules that quantize, and of the batch norms that a layer swallows.

    Args:
        inputs: Modules whose input is quantized.
        outputs: Modules whose output is quantized.
        folds: Batch norm by the convolution or linear layer right before it.
        feeds: The place (``name:input``, ``name:output`` or a call site) whose values a layer reads, by the layer's
            name; empty where they are in float.
        ran: Modules with quantized weights that ran; none in a checkpoint of version 0.1.
        calls: Functions whose result is quantized, by :mod:`lightning_compress.quantization.call_sites`.
        transformed: Modules that multiply by what they compute from their weight. They stay in float where that was
            not known before (see :func:`lightning_compress.layers.know`).
    """

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    folds: dict[str, str] = field(default_factory=dict)
    feeds: dict[str, str] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    transformed: list[str] = field(default_factory=list)

    def beside(self, other: Placement) -> Placement:
        """Both in one model, which does not take the same way in every batch; what was placed first stays."""

        def both(first: list[str], second: list[str]) -> list[str]:
            return list(dict.fromkeys([*first, *second]))

        def agreed(layer: str) -> bool:
            known = [placement for placement in (self, other) if layer in placement.ran]
            return len({placement.folds.get(layer) for placement in known}) == 1

        return Placement(
            both(self.inputs, other.inputs),
            both(self.outputs, other.outputs),
            {layer: norm for layer, norm in (other.folds | self.folds).items() if agreed(layer)},
            other.feeds | self.feeds,
            both(self.ran, other.ran),
            both(self.calls, other.calls),
            both(self.transformed, other.transformed),
        )

    def without(self, is_gone: Callable[[str], bool]) -> Placement:
        """What is left of it where modules are gone; a layer that one of them fed reads floats."""

        def left(names: dict[str, str]) -> dict[str, str]:
            return {a: b for a, b in names.items() if not is_gone(a) and not is_gone(b.partition(":")[0])}

        inputs = [name for name in self.inputs if not is_gone(name)]
        outputs = [name for name in self.outputs if not is_gone(name)]
        ran = [name for name in self.ran if not is_gone(name)]
        calls = [place for place in self.calls if not is_gone(place.partition(":")[0])]
        transformed = [name for name in self.transformed if not is_gone(name)]
        return Placement(inputs, outputs, left(self.folds), left(self.feeds), ran, calls, transformed)

    @property
    def places(self) -> list[str]:
        """All places that quantize."""
        inputs = [f"{name}:input" for name in self.inputs]
        return [*inputs, *(f"{name}:output" for name in self.outputs), *self.calls]


def without_data(placement: Placement | None, layers: Sequence[Layer], seen: Mapping[str, bool]) -> dict[str, str]:
    """The layers that stay in float because no data reached them, with the reason; none before all is known.

    Args:
        placement: Where activations are quantized.
        layers: The layers with quantized weights.
        seen: Whether a quantizer of activations saw data, by its place.
    """
    if placement is None or not placement.ran:
        return {}
    found: dict[str, str] = {}
    for layer in layers:
        if layer.module_name not in placement.ran:
            found[layer.name] = "no batch of the calibration ran it, so it stays in float"
        elif layer.module_name in placement.transformed and not layer.source:
            found[layer.name] = "it multiplies by what it computes from its weight, so it stays in float"
        elif any(seen.values()) and not seen.get(_feed(placement, layer), True):
            found[layer.name] = "no data reached it while ranges were observed, so it stays in float"
    return found


def _feed(placement: Placement, layer: Layer) -> str:
    """The place whose values a layer reads: a raw parameter by itself, another one by its module."""
    return placement.feeds.get(layer.name if layer.axes else layer.module_name, "")


def _by_raw(trace: Trace, model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[int, list[Product]]:
    """The multiplications by raw parameters that are quantized, by the index of the event."""

    def is_quantized(product: Product) -> bool:
        module, _, key = product.name.rpartition(".")
        return key in weights(modules[module])

    found = find_products(trace, model)
    return {time: [product for product in products if is_quantized(product)] for time, products in found.items()}


def find_placement(trace: Trace, model: nn.Module, quantized: Collection[str]) -> Placement:
    """Where the activations of a model are quantized.

    Args:
        trace: Of one batch of the model, from :class:`lightning_compress.watch.Watch`.
        model: The root; its own call is watched, but neither its input nor its output is quantized.
        quantized: Names of the modules with quantized weights.
    """
    modules = modules_by_name(model)
    walk = Walk(trace, modules, quantized, _by_raw(trace, model, modules))
    names = ran(trace)
    placement = Placement(ran=[name for name in modules if name in names and name in quantized])
    norms = {name for name, module in modules.items() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    for layer, norm in find_norms(trace, quantized, norms)[0].items():
        output = walk.outputs[layer]
        is_called_once = walk.num_calls[layer] == walk.num_calls[norm] == 1
        has_statistics = modules[norm].running_var is not None
        is_read_once = walk.num_reads[output.number] == 1
        if is_called_once and is_read_once and has_statistics and _channels_agree(modules[layer], output):
            placement.folds[layer] = norm
    walk.quantize_outputs(placement.folds)
    for place in walk.places:
        name, _, kind = place.rpartition(":")
        if is_call_site(place):
            placement.calls.append(place)
        else:
            (placement.inputs if kind == "input" else placement.outputs).append(name)
    placement.feeds = walk.feeds
    placement.transformed = [name for name in modules if name in walk.transformed]
    return placement


def _channels_agree(layer: nn.Module, output: Value) -> bool:
    """Whether the channels that a batch norm sees, axis 1, are those that have a scale of their own in the weight."""
    num_axes = len(output.shape)
    if isinstance(layer, nn.Linear):
        return num_axes == 2
    if not isinstance(layer, nn.modules.conv._ConvNd) or num_axes != layer.weight.dim():
        return False
    return layer.groups == 1 or not layer.transposed
