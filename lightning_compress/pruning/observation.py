"""What criteria want to know about data: seen online, during the normal training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.relu6,
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
    """

    norm: str = ""
    activation: str = ""


class _Watcher(TorchFunctionMode):
    """Follows the outputs of the layers through batch norm and activation function while a batch runs."""

    def __init__(self, layers: dict[str, nn.Module], norms: dict[int, str]) -> None:
        super().__init__()
        self.chains = {name: Chain() for name in layers}
        self._norms = norms
        self._ends: dict[int, str] = {}
        self._keep: list[Tensor] = []  # tensors stay alive, so that an id stays theirs
        self._handles = [m.register_forward_hook(partial(self._after, name)) for name, m in layers.items()]

    def _after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._put(name, output)

    def _put(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._ends[id(value)] = name
            self._keep.append(value)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").rstrip("_")
        layer = self._ends.get(id(args[0])) if args and isinstance(args[0], Tensor) else None
        output = func(*args, **(kwargs or {}))
        if layer is not None and name == "batch_norm":
            weights = [a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, Tensor)]
            norm = next((self._norms[id(w)] for w in weights if id(w) in self._norms), "")
            self.chains[layer].norm = self.chains[layer].norm or norm
            self._put(layer, output)
        elif layer is not None and name in _ACTIVATIONS:
            self.chains[layer].activation = self.chains[layer].activation or name
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
        self._modules = modules_by_name(model)

    @property
    def ready(self) -> bool:
        """Whether the criterion has all it needs to score."""
        needs_chains = self.criterion.observes_activations or self.criterion.needs_norm
        observes = self.criterion.observes_activations or self.criterion.observes_gradients
        return (not needs_chains or self._chains is not None) and (not observes or bool(self.seen))

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
        if self.criterion.needs_norm and not (self._chains or {}).get(layer.name, Chain()).norm:
            return "no batch norm follows it"
        return None

    def begin_batch(self) -> None:
        """Watch the first batch; observe all others."""
        if not (self.criterion.observes_activations or self.criterion.needs_norm):
            return
        if self._chains is None:
            norms = {
                id(m.weight): name
                for name, m in self._modules.items()
                if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None
            }
            self._watcher = _Watcher({name: layer.module for name, layer in self.layers.items()}, norms)
            self._watcher.__enter__()
        elif self.criterion.observes_activations:
            for name, layer in self.layers.items():
                self._hook(name, layer)

    def _hook(self, name: str, layer: Layer) -> None:
        chain = (self._chains or {}).get(name, Chain())
        function = _ACTIVATIONS.get(chain.activation)
        inputs: list[Tensor] = []

        def read(module: nn.Module, args: Any) -> None:
            if args and module.training:
                inputs.append(args[0].detach())

        @torch.no_grad()
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            if inputs and isinstance(output, Tensor):
                x, y = inputs.pop(), output.detach()
                y = y if function is None else function(y)
                self._batch.setdefault(name, []).append(self.criterion.observe(layer, x, y))

        end = self._modules[chain.norm] if chain.norm else layer.module
        self._handles += [layer.module.register_forward_pre_hook(read), end.register_forward_hook(observe)]

    def observe_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients with which an optimizer is about to step."""
        if self.criterion.observes_gradients:
            theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, layer in self.layers.items():
                if layer.weight.grad is not None and id(layer.weight) in theirs:
                    found = self.criterion.observe_gradient(layer, layer.weight.grad.detach())
                    self._batch.setdefault(name, []).append(found)

    def end_batch(self, average: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add what the batch showed to the averages.

        Args:
            average: Averages a tensor over the processes; None in a single one.
        """
        self.cancel()
        for name, found in self._batch.items():
            value = torch.stack(found).mean(0) if len(found) > 1 else found[0]
            if average is not None and not self.criterion.observes_gradients:
                value = average(value)
            keep = self.criterion.memory
            self.seen[name] = value + keep * self.seen[name] if name in self.seen else value
            self._weights[name] = 1 + keep * self._weights.get(name, 0.0)
        self._batch.clear()

    def cancel(self) -> None:
        """Take all hooks away."""
        if self._watcher is not None:
            self._watcher.__exit__(None, None, None)
            self._chains, self._watcher = self._watcher.chains, None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """Averages and chains as plain values."""
        chains = None if self._chains is None else {k: [c.norm, c.activation] for k, c in self._chains.items()}
        return {"seen": dict(self.seen), "weights": dict(self._weights), "chains": chains}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the averages of a checkpoint."""
        devices = {name: layer.weight.device for name, layer in self.layers.items()}
        self.seen = {name: value.to(devices[name]) for name, value in state["seen"].items()}
        self._weights = dict(state["weights"])
        self._chains = None if state["chains"] is None else {k: Chain(*c) for k, c in state["chains"].items()}
