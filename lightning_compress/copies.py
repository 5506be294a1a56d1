"""Copies of a model in the middle of its run, which hold no graph and nothing of the original.

Tensors with the graph that they come from are losses that a training step keeps, and the weight of
``torch.nn.utils.weight_norm``; torch does not copy them. Functions are copied by nobody: a hook that was made inside a
method of the model would go on to read and write the original.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import CellType, FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["copy_module", "forget_graphs"]

Module = TypeVar("Module", bound=nn.Module)


def copy_module(model: Module, instead: Mapping[int, Any] | None = None) -> Module:
    """A deep copy, which has the values alone of the tensors that have a graph.

    Functions that it holds, such as hooks, see the copy where they saw the model, and containers of their own.

    Args:
        model: The model.
        instead: What the copy holds in the place of objects that are not to be copied, by their ``id``.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.losses = [layer.weight.sum()]
        >>> copy_module(layer).losses[0].grad_fn is None
        True
    """
    held = tree_leaves([vars(module) for module in model.modules()])
    memo: dict[int, Any] = {id(x): x.detach().clone() for x in _with_graph(held)}
    memo |= instead or {}
    cells = _twins(held, memo)
    copied = copy.deepcopy(model, memo)
    for cell, seen in cells:
        # anything else, such as a file, is shared
        own = id(seen) in memo or isinstance(seen, list | dict | set)
        cell.cell_contents = copy.deepcopy(seen, memo) if own else seen
    return copied


def forget_graphs(model: nn.Module) -> None:
    """Leave the tensors of a model their values alone: a graph holds on to the shapes that parameters had."""
    for x in _with_graph(tree_leaves([vars(module) for module in model.modules()])):
        # torch can take no view out of its graph, and has no public name for it
        if not x._is_view():  # noqa: SLF001
            x.detach_()


def _with_graph(held: Iterable[Any]) -> list[Tensor]:
    return [x for x in held if isinstance(x, Tensor) and not x.is_leaf]


def _twins(held: Iterable[Any], memo: dict[int, Any]) -> list[tuple[CellType, Any]]:
    """Put a twin of each function with a closure into the memo; gives the twins' cells, and what they are to see."""
    cells: list[tuple[CellType, Any]] = []
    waiting = [x for x in held if isinstance(x, FunctionType)]
    while waiting:
        function = waiting.pop()
        if not function.__closure__ or id(function) in memo:
            continue
        closure = tuple(CellType() for _ in function.__closure__)
        twin = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
        twin.__kwdefaults__ = function.__kwdefaults__
        twin.__dict__.update(function.__dict__)
        memo[id(function)] = twin
        for cell, original in zip(closure, function.__closure__, strict=True):
            with suppress(ValueError):  # of one that is empty
                cells.append((cell, original.cell_contents))
                waiting += [x for x in (original.cell_contents,) if isinstance(x, FunctionType)]
    return cells
