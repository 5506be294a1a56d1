"""Where activations are quantized: found by watching one batch run, without capturing a graph.

Every tensor that an integer kernel reads is quantized once, at the module that produced it (the end of a conv-bn-relu
chain) or, where a function produced it, at the outermost module that receives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_compress.layers import EMBEDDING, modules_by_name

__all__ = ["Placement", "Tracer"]

_SAME_VALUES = {
    *(
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "contiguous",
        "squeeze",
        "unsqueeze",
    ),
    *(
        "expand",
        "chunk",
        "split",
        "unbind",
        "__getitem__",
        "clone",
        "movedim",
        "swapaxes",
        "view_as",
        "float",
        "to",
    ),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
    *("boolean_dispatch", "repeat", "roll", "pad", "detach"),
}
_INTEGER_KERNELS = {
    *("add", "add_", "__add__", "__radd__", "__iadd__", "cat", "concat", "concatenate"),
    *("mean", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
}


@dataclass
class Placement:
    """Names of the modules that quantize, and of the batch norms that a layer swallows.

    Args:
        inputs: Modules whose input is quantized.
        outputs: Modules whose output is quantized.
        folds: Batch norm by the convolution or linear layer right before it.
        feeds: The place (``name:input`` or ``name:output``) whose values a layer reads, by the layer's name.
    """

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    folds: dict[str, str] = field(default_factory=dict)
    feeds: dict[str, str] = field(default_factory=dict)

    def without(self, is_gone: Callable[[str], bool]) -> Placement:
        """What is left of it where modules are gone; a layer that one of them fed reads floats."""

        def left(names: dict[str, str]) -> dict[str, str]:
            return {a: b for a, b in names.items() if not is_gone(a) and not is_gone(b.partition(":")[0])}

        inputs, outputs = ([name for name in names if not is_gone(name)] for names in (self.inputs, self.outputs))
        return Placement(inputs, outputs, left(self.folds), left(self.feeds))


@dataclass
class _Call:
    name: str
    receives: int | None
    began: int


class Tracer(TorchFunctionMode):
    """Watches one batch; use as a context around it, then read :attr:`placement`.

    Args:
        model: The root; its own call is watched, but it never quantizes.
        quantized: Names of the modules with quantized weights.
        skip_root_calls: How many nested calls of the root to overlook (a DDP wrapper calls it once more).
    """

    def __init__(self, model: nn.Module, quantized: set[str], skip_root_calls: int = 0) -> None:
        super().__init__()
        self.placement = Placement()
        self._model = model
        self._quantized = quantized
        self._skip = skip_root_calls
        self._skipped = 0
        self._keep: list[Any] = []  # tensors stay alive, so that an id stays theirs
        self._same: dict[int, int] = {}
        self._producer: dict[int, tuple[str, int]] = {}
        self._uses: Counter[int] = Counter()
        self._calls: Counter[str] = Counter()
        self._bn_inputs: list[tuple[str, Tensor]] = []
        self._stack: list[_Call] = []
        self._time = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Tracer:
        """Hook every module that may quantize."""
        for name, module in modules_by_name(self._model).items():
            if type(module).__module__.startswith("torchmetrics") or isinstance(module, nn.modules.loss._Loss):
                continue
            self._handles.append(module.register_forward_pre_hook(self._before(name)))
            self._handles.append(module.register_forward_hook(self._after(name), always_call=False))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Unhook, and settle which batch norms can be folded."""
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        modules = modules_by_name(self._model)
        for norm, value in self._bn_inputs:
            layer, _ = self._producer.get(id(value), ("", 0))
            has_statistics = modules[norm].running_var is not None
            once = self._calls[layer] == self._calls[norm] == self._uses[id(value)] == 1
            if layer in self._quantized and once and has_statistics and _channels_agree(modules[layer], value):
                self.placement.folds[layer] = norm
        self._keep.clear()
        self._bn_inputs.clear()

    def __torch_function__(  # noqa: C901  # one branch per kind of function
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Follow values through functions inside the model's forward."""
        output = func(*args, **(kwargs or {}))
        if not self._stack:
            return output
        name = getattr(func, "__name__", "")
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)]
        if name == "__get__" or not results:  # an attribute such as shape or grad
            return output
        self._keep.append((tensors, results))
        self._time += 1
        for x in tensors:
            self._uses[id(x)] += 1
        if name in _INTEGER_KERNELS:
            values = [x for x in tensors if _is_activation(x)]
            if len(values) >= (1 if "pool" in name or name == "mean" else 2):
                for x in values:
                    self._need(x)
        for result in results:
            if name in _SAME_VALUES:
                if result is not tensors[0]:
                    self._same[id(result)] = self._root(tensors[0])
            elif any(result is x for x in tensors):  # changed in place: from now on another value
                self._same[id(result)] = -self._time
        return output

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not name and self._skipped < self._skip:
                self._skipped += 1
                return
            x = args[0] if args and isinstance(args[0], Tensor) else None
            self._keep.append(x)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and x is not None:
                self._bn_inputs.append((name, x))
            self._calls[name] += 1
            self._time += 1
            self._stack.append(_Call(name, None if x is None else self._root(x), self._time))
            if name in self._quantized and not isinstance(module, EMBEDDING):
                for value in args[:3] if isinstance(module, nn.MultiheadAttention) else args[:1]:
                    if isinstance(value, Tensor) and torch.is_floating_point(value):
                        self.placement.feeds[name] = self._need(value)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._stack:  # the end of a skipped call of the root
                self._skipped -= 1
                return
            call = self._stack.pop()
            self._time += 1
            if not self._stack:  # what leaves the model is used there
                self._uses.update(id(x) for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor))
            if not isinstance(output, Tensor) or not name:
                return
            self._keep.append(output)
            root = self._root(output)
            _, since = self._producer.get(root, ("", -1))
            if root != call.receives and since < call.began:  # made here, neither handed through nor made inside
                self._producer[root] = (name, self._time)

        return hook

    def _root(self, x: Tensor) -> int:
        key = id(x)
        while key in self._same:
            key = self._same[key]
        return key

    def _need(self, x: Tensor) -> str:
        """Let the module that produced a value, or else the outermost that receives it, quantize it; name the place."""
        root = self._root(x)
        producer, _ = self._producer.get(root, ("", 0))
        if producer:
            if producer not in self.placement.outputs:
                self.placement.outputs.append(producer)
            return f"{producer}:output"
        for call in self._stack:
            if call.name and call.receives == root:
                if call.name not in self.placement.inputs:
                    self.placement.inputs.append(call.name)
                return f"{call.name}:input"
        return ""


def _channels_agree(layer: nn.Module, output: Tensor) -> bool:
    """Whether the channels that a batch norm sees, axis 1, are those that have a scale of their own in the weight."""
    if isinstance(layer, nn.Linear):
        return output.dim() == 2
    if not isinstance(layer, nn.modules.conv._ConvNd) or output.dim() != layer.weight.dim():
        return False
    return layer.groups == 1 or not layer.transposed


def _is_activation(x: Tensor) -> bool:
    return torch.is_floating_point(x) and x.dim() >= 2 and not isinstance(x, nn.Parameter)
