"""Copies of a model in the middle of its run, which hold no graph and nothing of the original.

Tensors with the graph that they come from are losses that a training step keeps, the state of a metric, and the weight
of ``torch.nn.utils.weight_norm``; torch does not copy them. Functions are copied by nobody: a hook that was made inside
a method of the model would go on to read and write the original. Locks and files are shared, as there is one of each.
"""

from __future__ import annotations

import copy
import sys
import traceback
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import CellType, FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.checks import first_line

__all__ = ["copy_module", "forget_graphs"]

# of the standard library: what holds threads, processes, files and connections, as a whole
_WHOLE: tuple[str, ...] = (
    "_thread",
    "threading",
    "concurrent",
    "queue",
    "_queue",
    "multiprocessing",
    "io",
    "_io",
    "socket",
    "sqlite3",
)
_WHOLE += ("subprocess", "asyncio", "tempfile", "contextvars", "_contextvars", "ssl", "select", "mmap")
# whose objects lead out of the model, such as to the Trainer and from there to the data
_OTHERS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")

Module = TypeVar("Module", bound=nn.Module)


def copy_module(model: Module, instead: Mapping[int, Any] | None = None) -> Module:
    """A deep copy, which has the values alone of the tensors that have a graph.

    Functions that it holds, such as hooks, see the copy where they saw the model, and containers of their own; weak
    references to a part of the model refer to the copy's. What nobody can copy, such as locks, open files, generators
    and pools of threads, is shared.

    Args:
        model: The model.
        instead: What the copy holds in the place of objects that are not to be copied, by their ``id``.

    Raises:
        TypeError: If an object in it refuses to be copied; the attribute is named.

    Example:
        >>> import threading
        >>> layer = nn.Linear(2, 2)
        >>> layer.losses, layer.lock = [layer.weight.sum()], threading.Lock()
        >>> copy_module(layer).losses[0].grad_fn is None
        True
        >>> copy_module(layer).lock is layer.lock
        True
    """
    known = dict(instead or {})
    while True:
        try:
            return _copy(model, dict(known))
        except Exception as error:
            chain = _being_copied(error)
            if not chain:
                raise
            found = _uncopied(chain, error)
            if found is None or id(found) in known:
                raise _refused(model, chain, error) from error
            known[id(found)] = found.detach().clone() if isinstance(found, Tensor) else found


def _copy(model: Module, memo: dict[int, Any]) -> Module:
    held = _held(model)
    memo |= {id(x): x.detach().clone() for x in _with_graph(held) if id(x) not in memo}
    cells = _twins(held, memo)
    copied = copy.deepcopy(model, memo)
    for cell, seen in cells:
        # anything else, such as a file, is shared
        own = id(seen) in memo or isinstance(seen, list | dict | set)
        cell.cell_contents = copy.deepcopy(seen, memo) if own else seen
    if any(isinstance(x, weakref.ref) for x in held):
        for module in copied.modules():
            _refer_to_own(module, memo)
    return copied


def _refer_to_own(module: nn.Module, memo: Mapping[int, Any]) -> None:
    """Turn the weak references of a copied module to what was copied along with it."""

    def turned(x: Any) -> Any:
        own = memo.get(id(x())) if type(x) is weakref.ref else None
        return x if own is None else weakref.ref(own)

    for key, value in list(vars(module).items()):
        if any(isinstance(x, weakref.ref) for x in tree_leaves(value)):
            module.__dict__[key] = tree_map(turned, value)


def _being_copied(error: Exception) -> list[Any]:
    """The objects that were being copied when it failed, each inside of the one before."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [frame.f_locals["x"] for frame in frames if frame.f_code is copy.deepcopy.__code__]


def _uncopied(chain: list[Any], error: Exception) -> Any:
    """The object that the copy does without a copy of its own; None where that would not do."""
    if isinstance(chain[-1], Tensor):
        return chain[-1]
    if not isinstance(error, TypeError) or isinstance(chain[-1], nn.Module):
        return None
    inside = chain[max(i for i, x in enumerate(chain) if isinstance(x, nn.Module)) + 1 :]
    # half of a pool of threads or of a queue is of no use to anybody
    return next((x for x in inside if type(x).__module__.partition(".")[0] in _WHOLE), chain[-1])


def _refused(model: nn.Module, chain: list[Any], error: Exception) -> TypeError:
    names = {id(module): name for name, module in model.named_modules()}
    at = max((i for i, x in enumerate(chain) if id(x) in names), default=-1)
    holder = chain[at] if at >= 0 else model
    inside = chain[at + 1 :]
    held = [key for key, value in vars(holder).items() if any(value is x for x in inside)]
    where = ".".join(part for part in (names[id(holder)], *held[:1]) if part)
    kind = type(chain[-1]).__name__
    return TypeError(
        f"{type(model).__name__}{f'.{where}' if where else ''} cannot be copied, and what is compressed is first tried "
        f"on copies: {kind} raised {first_line(error)}. Accepted is what copy.deepcopy takes. Make it in setup or "
        f"on_train_start, or give {kind} a __deepcopy__ that returns what a copy may share."
    )


def forget_graphs(model: nn.Module) -> None:
    """Leave the tensors of a model their values alone: a graph holds on to the shapes that parameters had."""
    for x in _with_graph(_held(model)):
        # torch can take no view out of its graph, and has no public name for it
        if not x._is_view():  # noqa: SLF001
            x.detach_()


def _held(model: nn.Module) -> list[Any]:
    """What modules hold, also inside of containers and of objects that are the user's own."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [vars(module) for module in model.modules()]
    while waiting:
        for x in tree_leaves(waiting.pop()):
            if id(x) in found:
                continue
            found[id(x)] = x
            if isinstance(x, Mapping):
                waiting.append(list(x.values()))
            elif isinstance(x, set | list | tuple):
                waiting.append(list(x))
            elif hasattr(x, "__dict__") and not isinstance(x, Tensor | nn.Module | type):
                known = type(x).__module__.partition(".")[0]
                waiting += [] if known in sys.stdlib_module_names or known in _OTHERS else [vars(x)]
    return list(found.values())


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
