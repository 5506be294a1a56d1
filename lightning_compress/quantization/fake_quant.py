"""Fake-quantized layers: upgraded in place, so that names, order and identity of parameters stay.

A weight is quantized by a property of the layer's own (upgraded) class, or in its forward where the layer computes it
from others; an activation by a hook. Nothing of it stands in ``state_dict``: a checkpoint of a quantized model loads
into the plain one and the other way round.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.computed import ComputedWeights, source_of, store_weight
from lightning_compress.layers import QUANTIZABLE, Layer, modules_by_name
from lightning_compress.quantization.call_sites import attach_call_sites, detach_call_sites, is_call_site
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize, WeightFakeQuantize
from lightning_compress.quantization.quantizer import Quantizer
from lightning_compress.quantization.weight_attribute import with_writes_to

__all__ = ["activations", "attach", "computes_weight", "detach", "downgrade", "hold_on", "upgrade", "weights"]
__all__ += ["take_off", "with_stored_weights"]

_WEIGHTS = "_compress_weights"


def upgrade(layers: Iterable[Layer], quantizer: Quantizer, granularity: str | int = "channel") -> None:
    """Give the layers quantized weights, disabled for now and bitwise equal to the plain ones.

    Args:
        layers: The layers.
        quantizer: How their weights are written.
        granularity: Which weights share a scale, as in :class:`~lightning_compress.quantization.Scheme`:
            ``"channel"``, ``"tensor"``, or the size of a group.
    """
    group = granularity if isinstance(granularity, int) else None
    for layer in layers:
        module = layer.module
        quantizers = module.__dict__.setdefault(_WEIGHTS, {})
        axis = None if granularity == "tensor" else layer.out_axis
        quantizers[layer.parameter] = WeightFakeQuantize(quantizer, axis, group)
        kind: Any = type(module)
        module.__class__ = _upgraded(getattr(kind, "_base", kind), tuple(quantizers), layer.source)


def downgrade(layers: Iterable[Layer]) -> None:
    """Give upgraded layers their plain weights back."""
    for module in {id(layer.module): layer.module for layer in layers}.values():
        module.__class__ = getattr(type(module), "_base", type(module))
        module.__dict__.pop(_WEIGHTS, None)
        if isinstance(module, nn.RNNBase):  # whose list of weights an upgraded class makes anew at every call
            names = module._flat_weights_names  # noqa: SLF001  # torch has no public name for either
            module._flat_weights = [getattr(module, name, None) for name in names]  # noqa: SLF001


def take_off(model: nn.Module) -> None:
    """Make layers plain that a larger model, or one of other names, was quantized with."""
    detach(model)
    for module in model.modules():
        if weights(module):
            downgrade([Layer("", module, name) for name in weights(module)])


def with_stored_weights(model: nn.Module) -> None:
    """Let a copy that ships hold the weights that torch computes from others, and quantize those."""
    for module in model.modules():
        quantizers = weights(module)
        if source_of(module):
            module.__class__ = getattr(type(module), "_base", type(module))
            store_weight(module)
            kind: Any = type(module)
            if quantizers:
                module.__class__ = _upgraded(kind, tuple(quantizers), source_of(module))


def attach(module: nn.Module, activation: ActivationFakeQuantize) -> None:
    """Let a module quantize its input or output."""
    if activation.of_input:
        module.register_forward_pre_hook(activation, with_kwargs=True)
    else:
        module.register_forward_hook(activation)


def hold_on(model: nn.Module, placed: Mapping[str, ActivationFakeQuantize]) -> None:
    """Follow modules that others of the same names have taken the place of, such as synchronized batch norms.

    Args:
        model: The model.
        placed: Its activation quantizers by place, the module's name and ``:input``, ``:output`` or a call site.
    """
    modules = modules_by_name(model)
    attach_call_sites(model, placed)
    for place, activation in placed.items():
        if is_call_site(place):
            continue
        module = modules[place.rpartition(":")[0]]
        if not any(known is activation for known in activations(module)):
            attach(module, activation)


def detach(model: nn.Module) -> None:
    """Take the activation quantizers off all modules of a model."""
    detach_call_sites(model)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, ActivationFakeQuantize)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)  # noqa: SLF001  # torch has no public name for it


def weights(module: nn.Module) -> dict[str, Any]:
    """The weight quantizers of one module, by parameter."""
    return module.__dict__.get(_WEIGHTS, {})


def computes_weight(module: nn.Module) -> bool:
    """Whether what an upgraded layer quantizes is computed from its parameters, and not one of them."""
    return bool(getattr(type(module), "_source", ""))


def activations(module: nn.Module) -> list[ActivationFakeQuantize]:
    """The activation quantizers of one module."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in hooks if isinstance(hook, ActivationFakeQuantize)]


def _rebuild(base: object, names: tuple[str, ...], source: str = "") -> nn.Module:
    kind: Any = base
    return kind.__new__(_upgraded(kind, names, source))


@cache
def _upgraded(base: type[nn.Module], names: tuple[str, ...], source: str) -> type[nn.Module]:
    """A subclass of a layer's class whose weights are properties; pickled by its base and names.

    Where the layer computes its weight from a parameter, the source, that is quantized as the layer multiplies by it.
    """

    def weight_property(name: str) -> property:
        def get(self: nn.Module) -> Tensor:
            parameter: Any = self._parameters[name]
            quantizer = weights(self).get(name)  # none in what torch.compile makes of the class alone
            return parameter if quantizer is None else with_writes_to(parameter, quantizer(parameter))

        return property(get)

    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        state = base.__getstate__(self) if hasattr(base, "__getstate__") else self.__dict__
        return _rebuild, (base, names, source), dict(state)

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        # what type(module)(...) makes is a plain layer; torch.compile makes an empty one, and fills it, without this
        self.__class__ = base
        base.__init__(self, *args, **kwargs)

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        # that of the base may make a plain layer, as torch_geometric's does
        copied: nn.Module = _rebuild(base, names, source)
        memo[id(self)] = copied
        # a parametrized module refuses to tell its state, though torch copies it
        state = self.__dict__ if parametrize.is_parametrized(self) else reduce(self, None)[2]
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ComputedWeights(self.__dict__[_WEIGHTS]["weight"], self.get_parameter(source).shape):
            return base.forward(self, *args, **kwargs)

    members: dict[str, Any] = {} if source else {name: weight_property(name) for name in names}
    members |= {"forward": torch.compiler.disable(forward)} if source else {}
    members |= {"_base": base, "_source": source, "__reduce_ex__": reduce, "__module__": __name__, "__init__": init}
    members |= {"__deepcopy__": deepcopy} if hasattr(base, "__deepcopy__") else {}
    if issubclass(base, nn.RNNBase):
        # forward reads a cached list of the weights, so the list is made anew from the properties
        flat = property(
            lambda self: [getattr(self, name) for name in self._flat_weights_names], lambda self, value: None
        )
        members["_flat_weights"] = flat
    if issubclass(base, nn.MultiheadAttention):
        # compiled, it would be many functions, and not the one that a call site is known by
        members["forward"] = torch.compiler.disable(base.forward)
    # one of the user's own, with raw parameters, keeps its name in messages
    name = f"FakeQuant{base.__name__}" if issubclass(base, QUANTIZABLE) else base.__name__
    return type(name, (base,), members)
