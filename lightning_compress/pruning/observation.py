"""What criteria want to know about data: seen online, during the normal training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.checks import check_instance, check_list
from lightning_compress.layers import Layer, modules_by_name
from lightning_compress.pruning.chains import Chain, find_chains
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.trace import Trace
from lightning_compress.watch import Watch

__all__ = ["Observation", "ObservationState"]


class ObservationState(TypedDict):
    """State of an observation: averages, chains and what the current batch has shown so far."""

    seen: dict[str, Tensor]
    weights: dict[str, float]
    chains: dict[str, list[Any]] | None
    batch: dict[str, list[Tensor]]


class Observation:
    """Running averages of what a criterion observes.

    The first batch is only watched where the criterion asks for what follows a layer; all others are observed.

    Args:
        criterion: Says what to observe.
        layers: The layers it scores.
        model: The model they are in.
    """

    def __init__(self, criterion: Criterion, layers: Sequence[Layer], model: nn.Module) -> None:
        check_instance("Observation.criterion", criterion, Criterion, "a Criterion, for instance Taylor()")
        check_list("Observation.layers", layers, Layer, "a Layer of find_layers")
        check_instance("Observation.model", model, nn.Module, "an nn.Module")
        self.criterion = criterion
        self.layers = {layer.name: layer for layer in layers}
        self.seen: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._batch: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._watch: Watch | None = None
        self._chains: dict[str, Chain] | None = None
        # a whole batch was observed, and no layer was called
        self._blind = False
        self._model = model
        self._by_name = modules_by_name(model)

    @property
    def ready(self) -> bool:
        """Whether the criterion has all it needs to score, or there is nothing that it could wait for."""
        observes = self.criterion.observes_activations or self.criterion.observes_gradients
        waits_for_values = observes and not self.seen and not self._blind and bool(self.layers)
        waits_for_chains = self._needs_chains and self._chains is None
        return not waits_for_values and not waits_for_chains

    @property
    def _needs_chains(self) -> bool:
        return self.criterion.observes_activations or self.criterion.needs_norm

    def layer(self, layer: Layer) -> Layer:
        """The layer with what was seen of it."""
        norm = self._chain(layer.name).norm
        return replace(layer, seen=self.average(layer.name), norm=self._by_name.get(norm) if norm else None)

    def average(self, name: str) -> Tensor | None:
        """The average for a layer, or the sum where the criterion forgets nothing; None before anything was seen."""
        if name not in self.seen:
            return None
        if self.criterion.memory == 1:
            return self.seen[name]
        return self.seen[name] / self._weights[name]

    def refuses(self, layer: Layer) -> str | None:
        """Why the layer cannot be scored now that batches have been seen; None where it can."""
        if self.criterion.observes_activations and layer.name not in self.seen:
            return "it was never called as a module"
        if self.criterion.observes_gradients and layer.name not in self.seen:
            return "no optimizer took a step with its gradient"
        norm = self.layer(layer).norm
        if self.criterion.needs_norm and (norm is None or norm._parameters["weight"] is None):
            return "no batch norm with a weight follows it"
        return None

    def begin_batch(self) -> None:
        """Watch the first batch; observe all others."""
        if self._needs_chains and self._chains is None:
            self._watch = Watch(self._model)
            self._watch.start()
        elif self.criterion.observes_activations:
            for layer in self.layers.values():
                self._observe(layer)

    def _observe(self, layer: Layer) -> None:
        """Hook a layer: what it reads, and what is left of it behind its norm and its activation function."""
        chain = self._chain(layer.name)
        inputs: list[Tensor] = []

        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args:
                inputs.append(args[0].detach())

        @torch.no_grad()
        def observe(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
            if inputs and isinstance(output, Tensor):
                found = self.criterion.observe(layer, inputs.pop(), chain.activate(output.detach()))
                self._batch.setdefault(layer.name, []).append(found)

        end = self._by_name[chain.norm] if chain.norm else layer.module
        self._handles.append(layer.module.register_forward_pre_hook(read))
        self._handles.append(end.register_forward_hook(observe))

    def observe_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients with which an optimizer is about to step."""
        if not self.criterion.observes_gradients:
            return
        stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            gradient = layer.gradient
            if gradient is not None and id(layer.weight) in stepping:
                gradients[name] = gradient
        # where one is not finite, a gradient scaler will skip the step
        finite = [torch.isfinite(gradient).all() for gradient in gradients.values()]
        if finite and bool(torch.stack(finite).all()):
            for name, gradient in gradients.items():
                found = self.criterion.observe_gradient(self.layers[name], gradient)
                self._batch.setdefault(name, []).append(found)

    def end_batch(self, average: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add what the batch showed to the averages.

        Args:
            average: Averages a tensor over the processes; None in a single one.
        """
        observed = bool(self._handles)
        self.cancel()
        means = self._batch_means()
        # gradients are the same in all processes already
        if average is not None and not self.criterion.observes_gradients:
            means = self._over_processes(means, average)
        memory = self.criterion.memory
        for name, value in means.items():
            self.seen[name] = value + memory * self.seen[name] if name in self.seen else value
            self._weights[name] = 1 + memory * self._weights.get(name, 0.0)
        self._blind = observed and not self.seen
        self._batch.clear()

    def _batch_means(self) -> dict[str, Tensor]:
        """The mean of what each layer showed in this batch, or the sum where the criterion forgets nothing."""
        means = {}
        for name in self.layers:
            if name in self._batch:
                found = torch.stack(self._batch[name])
                means[name] = found.sum(0) if self.criterion.memory == 1 else found.mean(0)
        return means

    def _over_processes(self, means: dict[str, Tensor], average: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The means over all processes, of the layers that all of them called: nobody waits for another's branch."""
        called = average(torch.tensor([float(name in means) for name in self.layers]))
        everywhere = [name for name, share in zip(self.layers, called.tolist(), strict=True) if share == 1]
        return {name: average(means[name]) for name in everywhere}

    def cancel(self) -> None:
        """Take all hooks away; the chains of a batch that was watched are known from now on."""
        if self._watch is not None:
            self._watch.stop()
            self._chains = self._watched_chains(self._watch.trace)
            self._watch = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watched_chains(self, trace: Trace) -> dict[str, Chain]:
        norms = [name for name, m in self._by_name.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        names = {id(module): name for name, module in self._by_name.items()}
        layers = {names[id(layer.module)]: layer.name for layer in self.layers.values() if id(layer.module) in names}
        return {name: Chain() for name in self.layers} | find_chains(trace, layers, norms)

    def _chain(self, name: str) -> Chain:
        return (self._chains or {}).get(name, Chain())

    def follow(self, model: nn.Module) -> None:
        """Forget what was seen of other shapes, and the layers that are gone; the next batch is the first one again."""
        self.cancel()
        present = {id(p) for p in model.parameters()}
        self.layers = {name: layer for name, layer in self.layers.items() if id(layer.weight) in present}
        self._model = model
        self._by_name = modules_by_name(model)
        self._chains = None
        self.seen.clear()
        self._weights.clear()
        self._batch.clear()

    def state_dict(self) -> ObservationState:
        """Averages, chains and what a batch has shown so far, as plain values."""
        # a checkpoint inside of the first batch has the chains of what has run of it
        known = self._chains if self._watch is None else self._watched_chains(self._watch.trace)
        chains: dict[str, list[Any]] | None = None
        if known is not None:
            chains = {name: [c.norm, c.activation, c.arguments, c.options] for name, c in known.items()}
        batch = {name: list(found) for name, found in self._batch.items()}
        return {"seen": dict(self.seen), "weights": dict(self._weights), "chains": chains, "batch": batch}

    def load_state_dict(self, state: ObservationState | Mapping[str, Any]) -> None:
        """Take up the averages of a checkpoint."""
        devices = {name: layer.weight.device for name, layer in self.layers.items()}
        self.seen = {name: value.to(devices[name]) for name, value in state["seen"].items()}
        self._weights = dict(state["weights"])
        chains = state["chains"]
        self._chains = None if chains is None else {name: Chain(*known) for name, known in chains.items()}
        self._batch = {name: [v.to(devices[name]) for v in found] for name, found in state["batch"].items()}
        self.end_batch()
