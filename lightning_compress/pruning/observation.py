"""What criteria want to know about data: seen online, during the normal training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_compress.layers import Layer, modules_by_name
from lightning_compress.pruning.criteria import Criterion

__all__ = ["Chain", "Observation"]

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@dataclass
class Chain:
    """What follows a layer.

    Args:
        norm: Name of the batch norm that reads the layer's output.
        activation: Name of the function that reads the output of the layer or of its batch norm.
        arguments: What the function is called with besides, such as a slope.
        options: The same by name.
    """

    norm: str = ""
    activation: str = ""
    arguments: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def activate(self, values: Tensor) -> Tensor:
        """What the activation function makes of values."""
        return _ACTIVATIONS[self.activation](values, *self.arguments, **self.options) if self.activation else values


class _Watcher(TorchFunctionMode):
    """Follows the outputs of the layers through batch norm and activation function while a batch runs."""

    def __init__(self, layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.chains = {name: Chain() for name in layers}
        self._ends: dict[int, str] = {}
        self._keep: list[Tensor] = []  # tensors stay alive, so that an id stays theirs
        self._handles = [m.register_forward_hook(partial(self._after_layer, name)) for name, m in layers.items()]
        self._handles += [m.register_forward_hook(partial(self._after_norm, name)) for name, m in norms.items()]

    def _after_layer(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._ends[id(output)] = name
            self._keep.append(output)

    def _after_norm(self, norm: str, module: nn.Module, inputs: Any, output: Any) -> None:
        layer = self._ends.get(id(inputs[0])) if inputs else None
        if layer is not None and self.chains[layer].norm in ("", norm):
            self.chains[layer].norm = norm
            self._after_layer(layer, module, inputs, output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = args[0] if args else kwargs.get("input")
        layer = self._ends.get(id(values)) if isinstance(values, Tensor) else None
        output = func(*args, **kwargs)
        if layer is not None:
            name, chain = getattr(func, "__name__", "").rstrip("_"), self.chains[layer]
            if name in _ACTIVATIONS and not chain.activation:
                chain.activation = name
                chain.arguments = [v for v in args[1:] if not isinstance(v, bool)]  # all but inplace
                chain.options = {k: v for k, v in kwargs.items() if k not in ("input", "inplace")}
            if output is values:
                self._ends.pop(id(values), None)  # what was the layer's output is now something else
        return output

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._keep.clear()


class Observation:
    """Running averages of what a criterion observes.

    Args:
        criterion: Says what to observe.
        layers: The layers it scores.
        model: The model they are in.
    """

    def __init__(self, criterion: Criterion, layers: Sequence[Layer], model: nn.Module) -> None:
        self.criterion = criterion
        self.layers = {layer.name: layer for layer in layers}
        self.seen: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._batch: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._watcher: _Watcher | None = None
        self._chains: dict[str, Chain] | None = None
        self._blind = False
        self._modules = modules_by_name(model)

    @property
    def ready(self) -> bool:
        """Whether the criterion has all it needs to score, or there is nothing that it could wait for."""
        needs_chains = self.criterion.observes_activations or self.criterion.needs_norm
        observes = self.criterion.observes_activations or self.criterion.observes_gradients
        seen = not observes or bool(self.seen) or self._blind or not self.layers
        return seen and (not needs_chains or self._chains is not None)

    def layer(self, layer: Layer) -> Layer:
        """The layer with what was seen of it."""
        norm = (self._chains or {}).get(layer.name, Chain()).norm
        return replace(layer, seen=self.average(layer.name), norm=self._modules.get(norm) if norm else None)

    def average(self, name: str) -> Tensor | None:
        """The average for a layer; None before anything was seen."""
        if name not in self.seen:
            return None
        return self.seen[name] / self._weights[name] if self.criterion.memory < 1 else self.seen[name]

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
        if not (self.criterion.observes_activations or self.criterion.needs_norm):
            return
        if self._chains is None:
            norms = {k: m for k, m in self._modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
            self._watcher = _Watcher({name: layer.module for name, layer in self.layers.items()}, norms)
            self._watcher.__enter__()
        elif self.criterion.observes_activations:
            for name, layer in self.layers.items():
                self._hook(name, layer)

    def _hook(self, name: str, layer: Layer) -> None:
        chain = (self._chains or {}).get(name, Chain())
        inputs: list[Tensor] = []

        def read(module: nn.Module, args: Any) -> None:
            if args:
                inputs.append(args[0].detach())

        @torch.no_grad()
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            if inputs and isinstance(output, Tensor):
                found = self.criterion.observe(layer, inputs.pop(), chain.activate(output.detach()))
                self._batch.setdefault(name, []).append(found)

        end = self._modules[chain.norm] if chain.norm else layer.module
        self._handles += [layer.module.register_forward_pre_hook(read), end.register_forward_hook(observe)]

    def observe_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients with which an optimizer is about to step."""
        if self.criterion.observes_gradients:
            theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
            gradients = {k: x.weight.grad for k, x in self.layers.items() if id(x.weight) in theirs}
            known = {name: g.detach() for name, g in gradients.items() if g is not None}
            finite = [torch.isfinite(g).all() for g in known.values()]
            if finite and bool(torch.stack(finite).all()):  # else a gradient scaler will skip the step
                for name, gradient in known.items():
                    found = self.criterion.observe_gradient(self.layers[name], gradient)
                    self._batch.setdefault(name, []).append(found)

    def end_batch(self, average: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add what the batch showed to the averages.

        Args:
            average: Averages a tensor over the processes; None in a single one.
        """
        hooked, keep = bool(self._handles), self.criterion.memory
        self.cancel()
        batch = {name: torch.stack(found) for name in self.layers if (found := self._batch.get(name))}
        means = {name: found.sum(0) if keep == 1 else found.mean(0) for name, found in batch.items()}
        if average is not None and not self.criterion.observes_gradients:
            called = average(torch.tensor([float(name in means) for name in self.layers]))
            everywhere = [name for name, share in zip(self.layers, called.tolist(), strict=True) if share == 1]
            means = {name: average(means[name]) for name in everywhere}
        for name, value in means.items():
            self.seen[name] = value + keep * self.seen[name] if name in self.seen else value
            self._weights[name] = 1 + keep * self._weights.get(name, 0.0)
        self._blind = hooked and not self.seen
        self._batch.clear()

    def cancel(self) -> None:
        """Take all hooks away."""
        if self._watcher is not None:
            self._watcher.__exit__(None, None, None)
            self._chains, self._watcher = self._watcher.chains, None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def follow(self, model: nn.Module) -> None:
        """Forget what was seen of other shapes, and the layers that are gone; the next batch is the first one again."""
        self.cancel()
        present = {id(p) for p in model.parameters()}
        self.layers = {name: layer for name, layer in self.layers.items() if id(layer.weight) in present}
        self._modules, self._chains = modules_by_name(model), None
        for known in (self.seen, self._weights, self._batch):
            known.clear()

    def state_dict(self) -> dict[str, Any]:
        """Averages, chains and what a batch has shown so far, as plain values."""
        known = self._chains if self._watcher is None else self._watcher.chains
        chains = (
            None if known is None else {k: [c.norm, c.activation, c.arguments, c.options] for k, c in known.items()}
        )
        batch = {name: list(found) for name, found in self._batch.items()}
        return {"seen": dict(self.seen), "weights": dict(self._weights), "chains": chains, "batch": batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the averages of a checkpoint."""
        devices = {name: layer.weight.device for name, layer in self.layers.items()}
        self.seen = {name: value.to(devices[name]) for name, value in state["seen"].items()}
        self._weights = dict(state["weights"])
        self._chains = None if state["chains"] is None else {k: Chain(*c) for k, c in state["chains"].items()}
        self._batch = {name: [v.to(devices[name]) for v in found] for name, found in state["batch"].items()}
        self.end_batch()
