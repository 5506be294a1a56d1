"""Follows the axes of all tensors through a forward: which of them are of the same channels, and what is made of them.

The operations are seen where they reach ATen, below everything that a model is written in: modules, functions, einsum,
scripted code, a user's own autograd functions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_compress.layers import plain_name
from lightning_compress.structure.axes import Axis, leaves_of, split_in_two, unite
from lightning_compress.structure.record import tensors_by_name
from lightning_compress.structure.rules import RULES, Call
from lightning_compress.structure.rules.call import Axes
from lightning_compress.structure.rules.same import elementwise

__all__ = ["AN_INPUT", "AN_OUTPUT", "RECURRENT", "Follow", "name_of"]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
AN_OUTPUT = "an output layer"
AN_INPUT = "the model's input"


class Follow(TorchDispatchMode):
    """Follows the axes of tensors while it is open.

    Args:
        model: The model that runs. Its parameters and buffers keep their axes from one forward to the next.
        named: Axes of its parameters and buffers, by their names, where they are known; else new ones.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad(), Follow(model) as follow:
        ...     y = model(torch.randn(3, 4))
        >>> follow.named["0.weight"][0].now is follow.named["2.weight"][1].now
        True
    """

    def __init__(self, model: nn.Module, named: Mapping[str, Axes] | None = None) -> None:
        super().__init__()
        self.model = model
        self.axes: MutableMapping[Tensor, Axes] = WeakTensorKeyDictionary()
        self.named: dict[str, Axes] = {}
        self.read: set[str] = set()
        self._names: dict[int, list[str]] = {}
        self._paused = 0
        self._hooks = ExitStack()
        known: dict[int, Axes] = {}
        for name, tensor in tensors_by_name(model).items():
            new = tuple(map(Axis, tensor.shape)) if named is None else named[name]
            axes = known.setdefault(id(tensor), new)
            self.named[name] = axes
            self._names.setdefault(id(tensor), []).append(name)
            self.axes[tensor] = axes

    def __enter__(self) -> Follow:
        """Begin to follow."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if isinstance(module, RECURRENT):
                    for hook in (
                        module.register_forward_pre_hook(self._pause),
                        module.register_forward_hook(partial(self._resume, plain_name(name)), always_call=True),
                    ):
                        stack.callback(hook.remove)
                elif isinstance(module, nn.MultiheadAttention):
                    hook = module.register_forward_hook(partial(self._attended, name), with_kwargs=True)
                    stack.callback(hook.remove)
            super().__enter__()
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        self._hooks.close()
        super().__exit__(*error)

    def axes_of(self, x: Tensor) -> Axes:
        """The axes of a tensor; one whose origin was not seen came from outside, and keeps all that it has."""
        axes = self.axes.get(x)
        if axes is None or len(axes) != x.dim():
            axes = self.axes[x] = tuple(Axis(size, AN_INPUT) for size in x.shape)
        return axes

    def pin(self, values: object, why: str) -> None:
        """Keep all axes of the tensors in some values, for a reason that counts more than those given before."""
        for x in tree_leaves(values):
            if isinstance(x, Tensor):
                for leaf in (leaf for axis in self.axes_of(x) for leaf in leaves_of(axis)):
                    leaf.why = why

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = self.run(func, args, kwargs)
        if self._paused:
            return output
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if outputs:
            self._follow(func, args, kwargs, outputs)
            self.made(func, outputs)
        return output

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation."""
        return func(*args, **kwargs)

    def made(self, func: Any, outputs: list[Tensor]) -> None:
        """Look at what an operation made."""

    def call_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> Call:
        """An operation's call, its arguments by their names."""
        arguments = {**_defaults(func), **dict(zip(_names(func), args, strict=False)), **kwargs}
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor):
                self.read.update(self._names.get(id(tensor), ()))
        return Call(name_of(func), arguments, outputs, self.axes_of, line_of_model)

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
        call = self.call_of(func, args, kwargs, outputs)
        rule = RULES.get(call.name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = elementwise
        found = None if rule is None else rule(call)
        if found is None and call.tensors:
            for x in call.tensors:
                for axis in self.axes_of(x):
                    call.keep(axis, f"{call.name}, which is not followed, reads its channels")
        for i, x in enumerate(outputs):
            axes = found[i] if found is not None and i < len(found) else ()
            if len(axes) != x.dim():
                axes = call.new(i)
                if found is None:
                    for axis in axes:
                        call.keep(axis, f"made by {call.name}, which is not followed,")
            self.axes[x] = axes

    def _pause(self, module: nn.Module, args: object) -> None:
        self._paused += 1

    def _resume(self, name: str, module: nn.Module, args: object, output: object) -> None:
        self._paused -= 1
        for p in module.parameters(recurse=False):
            self.read.update(self._names.get(id(p), ()))
            self.pin(p, f"{type(module).__name__} is left whole")
        self.pin(args, f"leads to {name}, a recurrent layer, which is left whole")
        self.pin(output, f"{type(module).__name__} is left whole")

    def _attended(
        self, name: str, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        """Torch's attention refuses inputs of another width than that of its heads: all of these go together."""
        out = self.axes_of(module.out_proj.weight)
        ins: list[Axis] = [out[0], out[1]]
        if module.in_proj_weight is None:
            self.pin(
                (module.q_proj_weight, module.out_proj.weight), f"keys and values of {name} have sizes of their own"
            )
            return
        stacked = self.axes_of(module.in_proj_weight)
        halves = split_in_two(stacked[0], 3)
        ins += [stacked[1], *([] if halves is None else [halves[1]])]
        ins += [self.axes_of(bias)[-1] for bias in (module.bias_k, module.bias_v) if bias is not None]
        for other in ins[1:]:
            unite(ins[0], other)


def name_of(func: Any) -> str:
    """An operation's name; one that writes in place has that of the one that does not."""
    name = str(func.overloadpacket.__name__)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


@cache
def _names(func: Any) -> list[str]:
    """Names of an operation's arguments."""
    return [argument.name for argument in func._schema.arguments]  # noqa: SLF001  # torch has no public name


@cache
def _defaults(func: Any) -> dict[str, Any]:
    """The values of those that need not be given."""
    arguments = func._schema.arguments  # noqa: SLF001  # torch has no public name
    return {each.name: each.default_value for each in arguments if each.has_default_value()}


_OWN = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)


def line_of_model() -> str:
    """The line of the model, or of what it is made of, that runs now."""
    frame = sys._getframe(1)  # noqa: SLF001  # a traceback of every frame would cost more
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_OWN, _TORCH, "<")) and "/contextlib.py" not in path:
            return f"{'/'.join(Path(path).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"
