"""Fake-quantized layers: upgraded in place, so that names, order and identity of parameters stay.

A weight is quantized by a property of the layer's own (upgraded) class, an activation by a hook. Nothing of it
stands in ``state_dict``: a checkpoint of a quantized model loads into the plain one and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers import Layer
from lightning_compress.quantization.observers import Observer
from lightning_compress.quantization.quantizers import QParams, Quantizer

__all__ = ["ActivationFakeQuantize", "WeightFakeQuantize", "activations", "attach", "upgrade", "weights"]

_WEIGHTS = "_compress_weights"


class WeightFakeQuantize:
    """Shows a weight as its quantized value.

    Args:
        quantizer: How the weight is written.
        axis: Axis of the channels that have a scale each; None for one scale.
    """

    def __init__(self, quantizer: Quantizer, axis: int | None) -> None:
        self.quantizer = quantizer
        self.axis = axis
        self.enabled = False

    def qparams(self, weight: Tensor) -> QParams:
        """Parameters from the weight's present range."""
        weight = weight.detach().float()
        if self.axis is None:
            low, high = torch.aminmax(weight)
        else:
            rows = weight.transpose(0, self.axis).flatten(1)
            low, high = rows.amin(1), rows.amax(1)
        return self.quantizer.qparams(low, high, self.axis)

    def codes(self, weight: Tensor) -> tuple[Tensor, QParams]:
        """Integer codes of the weight, as int8, and their parameters."""
        qparams = self.qparams(weight)
        return self.quantizer.quantize(weight.detach().float(), qparams).to(torch.int8), qparams

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight, or its fake-quantized value when enabled."""
        if not self.enabled:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return self.quantizer.fake_quantize(weight.float(), self.qparams(weight)).to(weight.dtype)


class ActivationFakeQuantize:
    """Quantizes the input or the output of a module; a hook.

    Args:
        quantizer: How the activation is written.
        observer: What determines its range.
        of_input: Quantize the module's inputs rather than its output.
    """

    def __init__(self, quantizer: Quantizer, observer: Observer, of_input: bool) -> None:
        self.quantizer = quantizer
        self.observer = observer
        self.of_input = of_input
        self.observing = False
        self.enabled = False
        self.range = torch.tensor([torch.inf, -torch.inf])

    def qparams(self) -> QParams:
        """Parameters from the range seen so far."""
        return self.quantizer.qparams(self.range[0], self.range[1])

    def quantize(self, x: Any) -> Any:
        """The value observed and fake-quantized, as the flags say; what is not a float tensor passes."""
        if not isinstance(x, Tensor) or not torch.is_floating_point(x) or not (self.observing or self.enabled):
            return x
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            if self.range.device != x.device:
                self.range = self.range.to(x.device)
            if self.observing:
                self.range = self.observer.update(self.range, values.detach())
            if not self.enabled:
                return x
            return self.quantizer.fake_quantize(values, self.qparams()).to(x.dtype)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        """A forward pre-hook without ``output``, a forward hook with it."""
        if not self.of_input:
            return self.quantize(output[0])
        if isinstance(module, nn.MultiheadAttention):
            done: dict[int, Any] = {}
            for x in args[:3]:
                if id(x) not in done:
                    done[id(x)] = self.quantize(x)
            return tuple(done[id(x)] for x in args[:3]) + args[3:]
        return (self.quantize(args[0]), *args[1:]) if args else args


def upgrade(layers: Iterable[Layer], quantizer: Quantizer, per_channel: bool) -> None:
    """Give the layers quantized weights, disabled for now and bitwise equal to the plain ones."""
    for layer in layers:
        module = layer.module
        quantizers = module.__dict__.setdefault(_WEIGHTS, {})
        quantizers[layer.parameter] = WeightFakeQuantize(quantizer, layer.out_axis if per_channel else None)
        kind: Any = type(module)
        module.__class__ = _upgraded(getattr(kind, "_base", kind), tuple(quantizers))


def attach(module: nn.Module, activation: ActivationFakeQuantize) -> None:
    """Let a module quantize its input or output."""
    if activation.of_input:
        module.register_forward_pre_hook(activation)
    else:
        module.register_forward_hook(activation)


def weights(module: nn.Module) -> dict[str, Any]:
    """The weight quantizers of one module, by parameter."""
    return module.__dict__.get(_WEIGHTS, {})


def activations(module: nn.Module) -> list[ActivationFakeQuantize]:
    """The activation quantizers of one module."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in hooks if isinstance(hook, ActivationFakeQuantize)]


def _rebuild(base: Any, names: tuple[str, ...]) -> nn.Module:
    return _upgraded(base, names).__new__(_upgraded(base, names))


@cache
def _upgraded(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a layer's class whose weights are properties; pickled by its base and names."""

    def weight_property(name: str) -> property:
        def get(self: nn.Module) -> Tensor:
            return self.__dict__[_WEIGHTS][name](self._parameters[name])

        return property(get)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = base.__getstate__(self) if hasattr(base, "__getstate__") else self.__dict__
        return _rebuild, (base, names), dict(state)

    members: dict[str, Any] = {name: weight_property(name) for name in names}
    members |= {"_base": base, "__reduce_ex__": reduce, "__module__": __name__}
    if issubclass(base, nn.RNNBase):
        # forward reads a cached list of the weights, so the list is made anew from the properties
        flat = property(
            lambda self: [getattr(self, name) for name in self._flat_weights_names], lambda self, value: None
        )
        members["_flat_weights"] = flat
    return type(f"FakeQuant{base.__name__}", (base,), members)
