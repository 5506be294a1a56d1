"""What functions do to the axes of a tensor whose values they only move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_compress.trace import Ran, Value

__all__ = ["moved"]

Sources = tuple[frozenset[int], ...]

_SAME = {
    *("contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as", "detach", "cpu", "cuda"),
    *("alias", "requires_grad", "narrow", "index_select", "chunk", "split", "split_with_sizes", "tensor_split", "flip"),
    *("roll", "resolve_conj", "as_subclass"),
}
_SAME_ATTRIBUTES = {"data", "real"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"}
_SWAPS = {"transpose", "swapaxes", "swapdims"}
_LAST_TWO = {"mT", "mH", "adjoint"}


def moved(event: Ran) -> Iterator[Sources | None]:
    """For each result of a function the axes of its first tensor that each axis comes from; None where unknown.

    Example:
        >>> import torch
        >>> x, y = (Value(i, shape, torch.float32, False) for i, shape in enumerate([(2, 3), (3, 2)]))
        >>> [sorted(axes) for axes in next(moved(Ran("t", (x,), {}, (x,), (y,))))]
        [[1], [0]]
    """
    for result in event.results:
        sources = _sources(event, event.reads[0], result)
        yield sources if sources is not None and len(sources) == len(result.shape) else None


def _sources(event: Ran, x: Value, result: Value) -> Sources | None:  # noqa: C901  # one branch per kind of function
    own = tuple(frozenset([axis]) for axis in range(len(x.shape)))
    name = event.attribute or event.name
    arguments = [*event.args[1:], *event.kwargs.values()]
    if name in _SAME or (event.attribute and name in _SAME_ATTRIBUTES):
        return own
    if name in ("t", "T", "H"):
        return own[::-1]
    if name in _LAST_TWO and len(own) > 1:
        return (*own[:-2], own[-1], own[-2])
    if name in _SWAPS and len(arguments) == 2 and all(isinstance(axis, int) for axis in arguments):
        return _swapped(own, *arguments)
    if name == "permute":
        order = arguments[0] if len(arguments) == 1 and not isinstance(arguments[0], int) else arguments
        return tuple(own[axis] for axis in order)
    if name in ("movedim", "moveaxis"):
        return _shifted(own, *arguments)
    if name in _RESHAPES:
        return _reshaped(x.shape, result.shape)
    if name in ("select", "unbind"):
        axis = arguments[0] if arguments else 0
        return tuple(s for i, s in enumerate(own) if i != axis % len(own))
    if name in ("expand", "expand_as", "broadcast_to"):
        return (*[frozenset[int]()] * (len(result.shape) - len(own)), *own)
    if name == "getitem":
        return _indexed(own, event.args[1], len(result.shape))
    return None


def _swapped(own: Sources, a: int, b: int) -> Sources:
    order = [*own]
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _shifted(own: Sources, source: Any, destination: Any) -> Sources:
    """As ``movedim`` does."""
    pairs = [(source, destination)] if isinstance(source, int) else zip(source, destination, strict=True)
    goal = {to % len(own): own[at % len(own)] for at, to in pairs}
    rest = iter([s for s in own if s not in goal.values()])
    return tuple(goal[i] if i in goal else next(rest) for i in range(len(own)))


def _reshaped(before: Sequence[int], after: Sequence[int]) -> Sources | None:
    """Axes that are merged or split; of equal sizes only the smallest stretches of axes are taken together."""
    sources: list[frozenset[int]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i], [j]
        a = before[i] if i < len(before) else 1
        b = after[j] if j < len(after) else 1
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(before):
                a, left, i = a * before[i], [*left, i], i + 1
            elif b < a and j < len(after):
                b, right, j = b * after[j], [*right, j], j + 1
            else:
                return None
        here = frozenset(axis for axis in left if axis < len(before) and before[axis] != 1)
        sources += [here if after[axis] != 1 else frozenset() for axis in right if axis < len(after)]
    return tuple(sources)


def _indexed(own: Sources, index: Any, num_axes: int) -> Sources | None:
    """As ``x[index]`` does, with one tensor of indices at most."""
    parts = [*index] if isinstance(index, tuple) else [index]
    if any(isinstance(part, list) for part in parts):
        return None
    used = sum(part is not None and part is not Ellipsis for part in parts)
    if Ellipsis not in [part for part in parts if not isinstance(part, Value)]:
        parts.append(Ellipsis)
    tensors = [part for part in parts if isinstance(part, Value)]
    sources: list[frozenset[int]] = []
    axis = 0
    for part in parts:
        if part is None:
            sources.append(frozenset())
        elif part is Ellipsis:
            num = len(own) - used
            sources += own[axis : axis + num]
            axis += num
        elif isinstance(part, Value):
            # each of its own axes chooses along the one that it indexes
            num = 1 if str(part.dtype) == "torch.bool" else len(part.shape)
            sources += [own[axis]] * num
            axis += 1
        elif isinstance(part, slice):
            sources.append(own[axis])
            axis += 1
        elif isinstance(part, int):
            axis += 1
        else:
            return None
    return tuple(sources) if len(tensors) < 2 and len(sources) == num_axes else None
