"""A model prepared for quantization: its fake-quantized layers as one thing to switch, save and load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_compress.layers import QUANTIZABLE, find_layers, modules_by_name
from lightning_compress.quantization.fake_quant import ActivationFakeQuantize, attach, upgrade, weights
from lightning_compress.quantization.placement import Placement
from lightning_compress.quantization.schemes import Scheme

__all__ = ["Prepared", "prepare", "prepared"]

_ATTRIBUTE = "_compress_quantization"


class Prepared:
    """The fake-quantized layers of a model; made by :func:`prepare`.

    Args:
        model: The model, whose layers are upgraded in place.
        scheme: What is quantized how.
    """

    def __init__(self, model: nn.Module, scheme: Scheme) -> None:
        self.scheme = scheme
        self.layers, self.skipped = find_layers(model, QUANTIZABLE, scheme.include, scheme.exclude)
        self.placement: Placement | None = None
        self.activations: dict[str, ActivationFakeQuantize] = {}
        upgrade(self.layers, scheme.weight, scheme.weight_granularity == "channel")

    @property
    def enabled(self) -> bool:
        """Whether the layers compute with quantized values."""
        return any(q.enabled for layer in self.layers for q in weights(layer.module).values())

    def place(self, model: nn.Module, placement: Placement) -> None:
        """Put the activation quantizers where a placement says."""
        self.placement = placement
        if self.scheme.inputs is None:
            return
        modules = modules_by_name(model)
        for kind, names in (("input", placement.inputs), ("output", placement.outputs)):
            for name in names:
                activation = ActivationFakeQuantize(self.scheme.inputs, self.scheme.observer, kind == "input")
                self.activations[f"{name}:{kind}"] = activation
                attach(modules[name], activation)
        # compiled code does not notice new hooks (torch._dynamo.config.skip_nnmodule_hook_guards)
        torch.compiler.reset()

    def observe(self, on: bool) -> None:
        """Whether the ranges of the activations follow what is seen."""
        for activation in self.activations.values():
            activation.observing = on

    def enable(self, on: bool) -> None:
        """Whether the layers compute with quantized values; an activation that has seen nothing stays in float."""
        for layer in self.layers:
            weights(layer.module)[layer.parameter].enabled = on
        for activation in self.activations.values():
            activation.enabled = on and bool(activation.range[0] <= activation.range[1])

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
            state["ranges"] = {name: a.range.detach().cpu() for name, a in self.activations.items()}
        return state

    def load_state_dict(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take places and ranges of a checkpoint.

        Raises:
            ValueError: If the model has no module where the checkpoint quantizes one.
        """
        if "placement" in state:
            placement = Placement(**state["placement"])
            known = modules_by_name(model)
            unknown = [name for name in (*placement.inputs, *placement.outputs) if name not in known]
            if unknown:
                raise ValueError(
                    f"The checkpoint quantizes modules that this model has not: {', '.join(unknown[:8])}. "
                    "Load it into the model it was made from."
                )
            if self.placement is None:
                self.place(model, placement)
            for name, activation in self.activations.items():
                activation.range = state["ranges"][name].clone()
        self.enable(state["enabled"])

    def batch_norms(self, model: nn.Module) -> Iterator[nn.Module]:
        """The batch norms that are folded into quantized layers."""
        modules = modules_by_name(model)
        yield from (modules[name] for name in (self.placement.folds.values() if self.placement else ()))


def prepare(model: nn.Module, scheme: Scheme) -> Prepared:
    """Upgrade a model's layers in place, disabled for now and bitwise equal; a prepared model is left as it is.

    Raises:
        ValueError: If a name pattern matches no layer.
    """
    if prepared(model) is None:
        model.__dict__[_ATTRIBUTE] = Prepared(model, scheme)
    return model.__dict__[_ATTRIBUTE]


def prepared(model: nn.Module) -> Prepared | None:
    """The fake-quantized layers of a model, if it was prepared."""
    return model.__dict__.get(_ATTRIBUTE)
