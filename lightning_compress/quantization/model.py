"""The quantization of a model: its fake-quantized layers as one thing to switch, save and load."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_compress.checks import check_instance
from lightning_compress.layers import QUANTIZABLE, find_layers, know, known, modules_by_name
from lightning_compress.quantization.call_sites import attach_call_sites
from lightning_compress.quantization.fake_quant import (
    computes_weight,
    detach,
    downgrade,
    hold_on,
    take_off,
    upgrade,
    weights,
    with_stored_weights,
)
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize, WeightFakeQuantize
from lightning_compress.quantization.per_token import at_their_readers
from lightning_compress.quantization.placement import Placement, find_placement, without_data
from lightning_compress.quantization.processes import Processes
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.quantization.state import (
    QuantizationState,
    Stage,
    check_overrides,
    placement_in,
    schemes_differ,
    take_ranges,
)
from lightning_compress.structure.record import Record, is_removed, kept_by_id
from lightning_compress.trace import Trace
from lightning_compress.watch import Watch

__all__ = [
    "ModelQuantization",
    "check_whole",
    "quantization_of",
    "quantize_layers",
    "restore_quantization",
    "store_weights",
]

_ATTRIBUTE = "_compress_quantization"


class ModelQuantization:
    """The fake-quantized layers of a model; made by :func:`quantize_layers`.

    ``stage`` says how far the model is::

        plain --start_tracing--> tracing --end_batch--> observing --enable(True)--> quantized --freeze--> frozen
              <--stop_tracing--                                   <--enable(False)--          <--thaw---
              --------------- place, where known --------------->

    =============  ================  =====================================================================
    stage          layers compute    what happens in a batch
    =============  ================  =====================================================================
    ``plain``      in float          nothing; activations have no quantizers
    ``tracing``    in float          values are followed, to find where activations are quantized
    ``observing``  in float          ranges follow the activations, where :meth:`observe` was called
    ``quantized``  quantized values  the same, and what is learned is trained
    ``frozen``     quantized values  neither ranges nor the statistics of folded batch norms move
    =============  ================  =====================================================================

    Args:
        model: The model, whose layers are upgraded in place.
        scheme: What is quantized how.
    """

    def __init__(self, model: nn.Module, scheme: Scheme) -> None:
        self.stage: Stage = "plain"
        self.scheme = scheme
        self.layers, self.skipped = find_layers(model, QUANTIZABLE, scheme.include, scheme.exclude)
        self.known = known(model)
        self.placement: Placement | None = None
        self.activations: dict[str, ActivationFakeQuantize] = {}
        self.watch: Watch | None = None  # of the batch that is traced
        self._frozen: list[nn.Module] = []
        check_overrides(scheme, [layer.name for layer in self.layers])
        for layer in self.layers:
            upgrade([layer], scheme.weight_of(layer.name), scheme.for_layer(layer.name).weight_granularity)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets. A copy is not traced: the watch's hooks are on the modules of the original."""
        stage = "plain" if self.stage == "tracing" else self.stage
        return {**self.__dict__, "stage": stage, "watch": None}

    @property
    def enabled(self) -> bool:
        """Whether the layers compute with quantized values."""
        return self.stage in ("quantized", "frozen") and bool(self.layers)

    def is_by(self, scheme: Scheme) -> bool:
        """Whether this is what :func:`quantize_layers` makes of a scheme."""
        return not schemes_differ(self.scheme.to_state(), scheme.to_state())

    def moved(self, model: nn.Module) -> str:
        """A layer that has another name than when the model was quantized, as after a merge of adapters; or nothing."""
        modules = modules_by_name(model)
        here = {id(module) for module in modules.values() if module is not model}
        moved = (x.name for x in self.layers if id(x.module) in here and modules.get(x.module_name) is not x.module)
        return next(moved, "")

    def is_stale(self, model: nn.Module) -> bool:
        """Whether layers have moved, or it is from before the model's raw parameters were looked at."""
        return bool(self.moved(model)) or (not self.enabled and self.known != known(model))

    def start_tracing(self, model: nn.Module, wrapped: bool = False) -> None:
        """Follow the next batch, to find where activations are quantized; ``wrapped`` by DDP, say, the model or not."""
        self.watch = Watch(model, skip_root_calls=int(wrapped))
        self.watch.start()
        if self.placement is None:
            self.stage = "tracing"

    def stop_tracing(self) -> Trace | None:
        """Stop following values; what was seen of the batch, or None if no batch was traced."""
        if self.watch is None:
            return None
        trace = self.watch.trace
        self.watch.stop()
        self.watch = None
        if self.placement is None:
            self.stage = "plain"
        return trace

    def place(self, model: nn.Module, placement: Placement) -> None:
        """Put the activation quantizers where a placement says, beside those that are there."""
        placement = at_their_readers(placement, self.scheme)
        self.placement = placement if self.placement is None else self.placement.beside(placement)
        # of several layers that read one place, the first decides: it is the last to be entered here
        readers = {place: layer for layer, place in reversed(self.placement.feeds.items())}
        for place in self.placement.places:
            name, _, kind = place.rpartition(":")
            scheme = self.scheme.for_layer(readers.get(place, name))
            if scheme.inputs is not None and place not in self.activations:
                self.activations[place] = ActivationFakeQuantize(scheme.inputs, scheme.observer, kind == "input")
        hold_on(model, self.activations)
        if not self.enabled:
            self.stage = "observing"
        # compiled code does not notice new hooks (torch._dynamo.config.skip_nnmodule_hook_guards)
        torch.compiler.reset()

    def _displace(self, model: nn.Module) -> None:
        """Take the activation quantizers away."""
        if self.placement is not None:
            detach(model)
            self.placement = None
            self.activations = {}
            self.stage = "plain"
            torch.compiler.reset()

    def observe(self, on: bool, once: bool = True) -> None:
        """Let the ranges follow what they see, or stop; without ``once``, those that count values if they saw none."""
        for activation in self.activations.values():
            activation.observing = on and (once or not activation.observer.counts or not activation.has_seen)

    def end_batch(self, model: nn.Module, processes: Processes) -> None:
        """Place quantizers where a traced batch says; or stop observing and bring the processes together.

        Between batches nothing is observed, so that validation never moves a range.
        """
        trace = self.stop_tracing()
        if trace is not None:
            found = find_placement(trace, model, {layer.module_name for layer in self.layers})
            self.place(model, processes.share(found))
        if any(activation.observing for activation in self.activations.values()):
            # a histogram is merged once, when it is complete: merged again, it would count its values twice
            moving = [a for a in self.activations.values() if not a.observer.counts or (self.enabled and a.observing)]
            processes.merge(moving)
            self.observe(False)
            # what was seen for the first time is quantized from now on
            self.enable(self.enabled)

    def quantize(self, processes: Processes) -> None:
        """End the observation in float: from now on the layers compute with quantized values."""
        if not self.enabled:
            processes.merge([a for a in self.activations.values() if a.observer.counts])
            self.observe(False)
        self.enable(True)

    def give_parameters(self) -> None:
        """Let the layers give the parameters themselves, for optimizers that are made of them, until :meth:`enable`."""
        for layer in self.layers:
            weights(layer.module)[layer.parameter].enabled = False

    def enable(self, on: bool) -> None:
        """Let the layers compute with quantized values, or in float; what saw no data stays in float."""
        in_float = self.without_data()
        for layer in self.layers:
            weights(layer.module)[layer.parameter].enabled = on and layer.name not in in_float
        for activation in self.activations.values():
            activation.enabled = on and activation.has_seen
        if not on:
            self.stage = "plain" if self.placement is None else "observing"
        elif self.stage != "frozen":
            self.stage = "quantized"

    @property
    def waiting(self) -> bool:
        """Whether layers have not run in any batch that was traced."""
        return self.placement is not None and any(x.module_name not in self.placement.ran for x in self.layers)

    def without_data(self) -> dict[str, str]:
        """The layers that stay in float because no data reached them, with the reason."""
        return without_data(self.placement, self.layers, {name: a.has_seen for name, a in self.activations.items()})

    def freeze(self, model: nn.Module) -> None:
        """Stop the ranges and the statistics of folded batch norms; to call before every batch."""
        self.observe(False)
        for norm in self.folded(model).values():
            # Lightning puts the model into training mode again after a validation
            if norm.training:
                self._frozen.append(norm)
            norm.eval()
        self.stage = "frozen"

    def thaw(self) -> None:
        """Let batch norms that were frozen train on."""
        for norm in self._frozen:
            norm.train()
        self._frozen.clear()
        if self.stage == "frozen":
            self.stage = "quantized"

    def begin(self) -> None:
        """Let what is learned begin from the present weights and ranges; what has begun goes on."""
        for layer in self.layers:
            weights(layer.module)[layer.parameter].begin(layer.multiplied)
        for activation in self.activations.values():
            activation.begin()

    def learned(self) -> dict[str, nn.Parameter]:
        """The logarithms of what training learns of the quantizers, by place and field."""
        return {f"{place}:{name}": log for place, q in self._quantizers().items() for name, log in q.logarithms.items()}

    def rewrite(self, scheme: Scheme) -> None:
        """Quantize the weights in another way from now on; what their quantizers learned is forgotten."""
        for layer in self.layers:
            quantizer = scheme.weight_of(layer.name)
            if quantizer != self.scheme.weight_of(layer.name):
                weights(layer.module)[layer.parameter].rewrite(quantizer)
        self.scheme = scheme
        torch.compiler.reset()

    def _quantizers(self) -> dict[str, WeightFakeQuantize | ActivationFakeQuantize]:
        of_weights = {layer.name: weights(layer.module)[layer.parameter] for layer in self.layers}
        return {**of_weights, **self.activations}

    def follow(self, model: nn.Module, record: Record) -> None:
        """Follow a change of shape that the model has just undergone."""
        present = {id(p) for p in model.parameters()}
        kept = kept_by_id(model, record)
        self.layers = [layer for layer in self.layers if id(layer.weight) in present]
        for layer in self.layers:
            weights(layer.module)[layer.parameter].keep(layer.multiplied, kept.get(id(layer.weight), {}))
        if self.placement is not None:
            self.placement = self.placement.without(partial(is_removed, record=record))
            for place in list(self.activations):
                if is_removed(place.rpartition(":")[0], record):
                    del self.activations[place]
            attach_call_sites(model, self.activations)

    def remove(self, model: nn.Module) -> None:
        """Leave the model as it was before: plain layers, no hooks."""
        self._displace(model)
        downgrade(self.layers)
        model.__dict__.pop(_ATTRIBUTE, None)

    def folded(self, model: nn.Module) -> dict[str, nn.Module]:
        """The batch norm that is folded into a layer, by the layer's name."""
        modules = modules_by_name(model)
        folds = {} if self.placement is None else self.placement.folds
        return {layer: modules[norm] for layer, norm in folds.items()}

    def state_dict(self) -> QuantizationState:
        """Scheme, places and ranges as plain values."""
        state: QuantizationState = {"scheme": self.scheme.to_state(), "enabled": self.enabled}
        if self.known:
            state["layers"] = dict(self.known)
        if self.placement is not None:
            state["placement"] = asdict(self.placement)
            state["ranges"] = {name: a.state.detach().cpu() for name, a in self.activations.items()}
            held = {name: q.to_state() for name, q in self._quantizers().items()}
            state["learned"] = {name: values for name, values in held.items() if values}
        return state

    def load_state_dict(self, model: nn.Module, state: QuantizationState) -> None:
        """Restore places, ranges and what was learned from a checkpoint.

        Raises:
            ValueError: If the model has no module where the checkpoint quantizes one, or its scheme is another.
        """
        placement = placement_in(state, self.scheme, [x.name for x in self.layers], modules_by_name(model).keys())
        if self.placement != placement:
            self._displace(model)
        if placement is not None:
            if self.placement is None:
                self.place(model, placement)
            take_ranges(self.activations, state["ranges"])
        for name, quantizer in self._quantizers().items():
            quantizer.from_state(state.get("learned", {}).get(name, {}))
        self.enable(state["enabled"])


def quantize_layers(model: nn.Module, scheme: Scheme) -> ModelQuantization:
    """Upgrade a model's layers in place: still in float, and bitwise equal to before.

    A model whose layers are upgraded already is left as it is: see :meth:`ModelQuantization.is_by` and
    :meth:`ModelQuantization.remove`.

    Raises:
        ValueError: If a name pattern matches no layer.

    Example:
        >>> from lightning_compress.quantization import int8
        >>> model = nn.Linear(3, 2)
        >>> quantization = quantize_layers(model, int8())
        >>> quantization.stage, quantization.enabled, quantization_of(model) is quantization
        ('plain', False, True)
    """
    if quantization_of(model) is None:
        take_off(model)
        model.__dict__[_ATTRIBUTE] = ModelQuantization(model, scheme)
    return model.__dict__[_ATTRIBUTE]


def restore_quantization(model: nn.Module, scheme: Scheme, state: QuantizationState) -> ModelQuantization:
    """Upgrade a model's layers as those of a model that was saved, and take its places, ranges and what it learned.

    Args:
        model: The model.
        scheme: The scheme that it was quantized by.
        state: From :meth:`ModelQuantization.state_dict`.

    Raises:
        ValueError: If the state is of another model or scheme.
    """
    know(model, state.get("layers", {}))
    quantization = quantize_layers(model, scheme)
    quantization.load_state_dict(model, state)
    return quantization


def store_weights(model: nn.Module) -> None:
    """Let a copy that ships hold, as those of its layers, the weights that torch computes whenever it runs."""
    with_stored_weights(model)
    quantization = quantization_of(model)
    if quantization is not None:
        is_stored = [bool(layer.source) and not computes_weight(layer.module) for layer in quantization.layers]
        of_them = zip(quantization.layers, is_stored, strict=True)
        quantization.layers = [replace(layer, source="") if stored else layer for layer, stored in of_them]


def quantization_of(model: nn.Module) -> ModelQuantization | None:
    """The quantization of a model, or None if its layers are plain."""
    check_instance("quantization_of.model", model, nn.Module, "an nn.Module")
    return model.__dict__.get(_ATTRIBUTE)


def check_whole(model: nn.Module) -> None:
    """Refuse a submodule of a quantized model, and one whose layers have moved: places are known by their names.

    Raises:
        ValueError: If a layer is quantized, and not by the model's own quantization, or has another name by now.
    """
    quantization = quantization_of(model)
    if quantization is not None:
        moved = quantization.moved(model)
        if moved:
            raise ValueError(
                f"The model was changed after it was quantized: {moved} has another name. "
                "Quantize it anew: trainer.validate(model) with PostTrainingQuantization(scheme) as callback."
            )
        return
    quantized = (name for name, m in modules_by_name(model).items() if any(q.enabled for q in weights(m).values()))
    name = next(quantized, None)
    if name is not None:
        raise ValueError(
            f"This {type(model).__name__} is a part of a quantized model, as {name or 'it'} shows. Accepted is the "
            "whole one, the LightningModule that was trained or loaded."
        )
