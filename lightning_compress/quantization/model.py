"""A model prepared for quantization: its fake-quantized layers as one thing to switch, save and load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_compress.layers import QUANTIZABLE, find_layers, matches, modules_by_name
from lightning_compress.quantization.fake_quant import ActivationFakeQuantize, attach, downgrade, upgrade, weights
from lightning_compress.quantization.placement import Placement
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.structure.record import Record, is_removed, kept_by_id

__all__ = ["ModelQuantization", "quantization_of", "quantize_layers"]

_ATTRIBUTE = "_compress_quantization"


class ModelQuantization:
    """The fake-quantized layers of a model; made by :func:`quantize_layers`.

    Args:
        model: The model, whose layers are upgraded in place.
        scheme: What is quantized how.
    """

    def __init__(self, model: nn.Module, scheme: Scheme) -> None:
        self.scheme = scheme
        self.layers, self.skipped = find_layers(model, QUANTIZABLE, scheme.include, scheme.exclude)
        self.placement: Placement | None = None
        self.activations: dict[str, ActivationFakeQuantize] = {}
        _check_overrides(scheme, [layer.name for layer in self.layers])
        for layer in self.layers:
            granularity = scheme.for_layer(layer.name).weight_granularity
            upgrade([layer], scheme.weight_of(layer.name), granularity)

    @property
    def enabled(self) -> bool:
        """Whether the layers compute with quantized values."""
        return any(q.enabled for layer in self.layers for q in weights(layer.module).values())

    def is_by(self, scheme: Scheme) -> bool:
        """Whether this is what preparing by a scheme gives."""
        return not _differ(self.scheme.to_state(), scheme.to_state())

    def place(self, model: nn.Module, placement: Placement) -> None:
        """Put the activation quantizers where a placement says."""
        self.placement = placement
        modules = modules_by_name(model)
        readers = {place: layer for layer, place in reversed(placement.feeds.items())}
        for kind, names in (("input", placement.inputs), ("output", placement.outputs)):
            for name in names:
                place = f"{name}:{kind}"
                scheme = self.scheme.for_layer(readers.get(place, name))
                if scheme.inputs is not None:
                    self.activations[place] = ActivationFakeQuantize(scheme.inputs, scheme.observer, kind == "input")
                    attach(modules[name], self.activations[place])
        # compiled code does not notice new hooks (torch._dynamo.config.skip_nnmodule_hook_guards)
        torch.compiler.reset()

    def _displace(self, model: nn.Module) -> None:
        """Take the activation quantizers away."""
        if self.placement is not None:
            for module in model.modules():
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for key in [key for key, hook in hooks.items() if isinstance(hook, ActivationFakeQuantize)]:
                        del hooks[key]
            self.placement, self.activations = None, {}
            torch.compiler.reset()

    def rewrite(self, scheme: Scheme) -> None:
        """Quantize the weights in another way from now on; what their quantizers learned is forgotten."""
        for layer in self.layers:
            quantizer = scheme.weight_of(layer.name)
            if quantizer != self.scheme.weight_of(layer.name):
                weights(layer.module)[layer.parameter].rewrite(quantizer)
        self.scheme = scheme
        torch.compiler.reset()

    def observe(self, on: bool, once: bool = True) -> None:
        """Whether the ranges of the activations follow what is seen; without ``once`` not those that count values."""
        for activation in self.activations.values():
            activation.observing = on and (once or not activation.observer.counts or not activation.has_seen)

    def enable(self, on: bool) -> None:
        """Whether the layers compute with quantized values; an activation that has seen nothing stays in float."""
        for layer in self.layers:
            weights(layer.module)[layer.parameter].enabled = on
        for activation in self.activations.values():
            activation.enabled = on and activation.has_seen

    def begin(self) -> None:
        """Let what is learned begin from the present weights and ranges; what has begun goes on."""
        for layer in self.layers:
            weights(layer.module)[layer.parameter].begin(layer.weight)
        for activation in self.activations.values():
            activation.begin()

    def follow(self, model: nn.Module, record: Record) -> None:
        """Follow a change of shape that the model has just undergone."""
        present, kept = {id(p) for p in model.parameters()}, kept_by_id(model, record)
        self.layers = [layer for layer in self.layers if id(layer.weight) in present]
        for layer in self.layers:
            weights(layer.module)[layer.parameter].keep(layer.weight, kept.get(id(layer.weight), {}))
        if self.placement is not None:
            self.placement = self.placement.without(partial(is_removed, record=record))
            gone = [place for place in self.activations if is_removed(place.rpartition(":")[0], record)]
            for place in gone:
                del self.activations[place]

    def remove(self, model: nn.Module) -> None:
        """Leave the model as it was before: plain layers, no hooks."""
        self._displace(model)
        downgrade(self.layers)
        model.__dict__.pop(_ATTRIBUTE, None)

    def learned(self) -> dict[str, nn.Parameter]:
        """The logarithms of what training learns of the quantizers, by place and field."""
        return {f"{place}:{name}": log for place, q in self._quantizers().items() for name, log in q.logarithms.items()}

    def _quantizers(self) -> dict[str, Any]:
        return {layer.name: weights(layer.module)[layer.parameter] for layer in self.layers} | self.activations

    def state_dict(self) -> dict[str, Any]:
        """Scheme, places and ranges as plain values."""
        state: dict[str, Any] = {"scheme": self.scheme.to_state(), "enabled": self.enabled}
        if self.placement is not None:
            state["placement"] = {
                "inputs": list(self.placement.inputs),
                "outputs": list(self.placement.outputs),
                "folds": dict(self.placement.folds),
                "feeds": dict(self.placement.feeds),
            }
            state["ranges"] = {name: a.state.detach().cpu() for name, a in self.activations.items()}
            held = {name: q.to_state() for name, q in self._quantizers().items()}
            state["learned"] = {name: values for name, values in held.items() if values}
        return state

    def load_state_dict(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take places and ranges of a checkpoint.

        Raises:
            ValueError: If the model has no module where the checkpoint quantizes one, or its scheme is another.
        """
        if "placement" in state:
            _check_scheme(state["scheme"], self.scheme.to_state())
            self._check_codes(state["scheme"].get("exact_kernels", True))
            placement = Placement(**state["placement"])
            known = modules_by_name(model)
            unknown = [name for name in (*placement.inputs, *placement.outputs) if name not in known]
            if unknown:
                raise ValueError(
                    f"The checkpoint quantizes modules that this model has not: {', '.join(unknown[:8])}. "
                    "Load it into the model it was made from."
                )
            if self.placement != placement:
                self._displace(model)
                self.place(model, placement)
            for name, activation in self.activations.items():
                activation.state = state["ranges"][name].clone()
        else:
            self._displace(model)
        for name, quantizer in self._quantizers().items():
            quantizer.from_state(state.get("learned", {}).get(name, {}))
        self.enable(state["enabled"])

    def _check_codes(self, exact_kernels: bool) -> None:
        """Raise if a checkpoint's weights were trained with other codes than they would be written with here."""
        if exact_kernels == self.scheme.exact_kernels:
            return
        other = replace(self.scheme, exact_kernels=exact_kernels)
        differing = [
            layer.name for layer in self.layers if other.weight_of(layer.name) != self.scheme.weight_of(layer.name)
        ]
        if differing:
            raise ValueError(
                f"The checkpoint was trained with exact_kernels={exact_kernels}, and the scheme here has "
                f"exact_kernels={self.scheme.exact_kernels}: the weights of {differing[0]} would be written with other "
                f"codes. Give Scheme(..., exact_kernels={exact_kernels}) to go on as it was trained."
            )

    def batch_norms(self, model: nn.Module) -> Iterator[nn.Module]:
        """The batch norms that are folded into quantized layers."""
        yield from self.folded(model).values()

    def folded(self, model: nn.Module) -> dict[str, nn.Module]:
        """The batch norm that is folded into a layer, by the layer's name."""
        modules = modules_by_name(model)
        return {layer: modules[norm] for layer, norm in (self.placement.folds if self.placement else {}).items()}


def quantize_layers(model: nn.Module, scheme: Scheme) -> ModelQuantization:
    """Upgrade a model's layers in place: still disabled, and bitwise equal to before.

    A model whose layers are upgraded already is left as it is: see :meth:`ModelQuantization.is_by` and
    :meth:`ModelQuantization.remove`.

    Raises:
        ValueError: If a name pattern matches no layer.
    """
    if quantization_of(model) is None:
        model.__dict__[_ATTRIBUTE] = ModelQuantization(model, scheme)
    return model.__dict__[_ATTRIBUTE]


def quantization_of(model: nn.Module) -> ModelQuantization | None:
    """The quantization of a model, or None if its layers are plain."""
    return model.__dict__.get(_ATTRIBUTE)


def _check_scheme(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in ours.keys() - {"exact_kernels"}:
        if name in theirs and _differ(theirs[name], ours[name]):
            raise ValueError(
                f"The checkpoint is quantized by another scheme: {name} is {theirs[name]!r} there and {ours[name]!r} "
                "here. Give the scheme that it was trained with, or a checkpoint from before its calibration."
            )


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return any(_differ(a.get(key), b.get(key)) for key in a.keys() | b.keys())  # a field that is new was None
    plain = (bool, int, float, str, list, type(None))
    return bool(a != b) if isinstance(a, plain) else type(a) is not type(b)


def _check_overrides(scheme: Scheme, names: Sequence[str]) -> None:
    for pattern in scheme.overrides:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(
                f"overrides={pattern!r} matches no layer. The layers are: {', '.join(names) or 'none'}. Give a name, a "
                "prefix of a name, or a glob such as 'encoder.*'."
            )
