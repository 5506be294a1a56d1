"""Operations that look values up by their position, or put them there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_compress.structure.axes import Axis, unite
from lightning_compress.structure.rules.call import Axes, Call, Rule, joined

__all__ = ["RULES"]

_LOOKED_UP = "channels are looked up by their position"


def _embedding(call: Call) -> Sequence[Axes]:
    weight = call.axes("weight")
    call.keep(weight[0], "rows are looked up")
    return [(*call.axes("indices"), *weight[1:])]


def _embedding_bag(call: Call) -> Sequence[Axes]:
    weight = call.axes("weight")
    call.keep(weight[0], "rows are looked up")
    new = call.new()
    return [(new[0], weight[1]), *(call.new(i) for i in range(1, len(call.outputs)))]


def _index(call: Call) -> Sequence[Axes]:
    """The axes that are not indexed stay; what the indices give comes first, or where they follow each other."""
    axes = call.axes()
    indices: Sequence[Tensor | None] = call["indices"]
    taken, kept = _indexed(call, axes, indices)
    dims = [dim for dim, _ in taken]
    adjacent = all(second == first + 1 for first, second in pairwise(dims))
    start = dims[0] if dims and adjacent else 0
    new = call.new()
    found = new[start : start + len(new) - len(kept)]
    own = [call.axes_of(index) for index in indices if index is not None]
    of_indices = joined(own) if own else ()
    if [axis.size for axis in of_indices] == [axis.size for axis in found]:
        found = of_indices
    return [(*kept[:start], *found, *kept[start:])]


def _indexed(
    call: Call, axes: Axes, indices: Sequence[Tensor | None]
) -> tuple[list[tuple[int, Axis]], tuple[Axis, ...]]:
    """The axes that are indexed, with their numbers, and the others."""
    taken: list[tuple[int, Axis]] = []
    dim = 0
    for index in indices:
        # a mask stands for as many axes as it has
        num = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.dim()
        if index is not None:
            taken += [(dim + i, axes[dim + i]) for i in range(num)]
        dim += num
    for _, axis in taken:
        call.keep(axis, _LOOKED_UP)
    gone = {dim for dim, _ in taken}
    return taken, tuple(axis for dim, axis in enumerate(axes) if dim not in gone)


def _index_put(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    _, kept = _indexed(call, axes, call["indices"])
    if call["values"].dim() >= len(kept) > 0 and call["values"].numel() > 1:
        joined([kept, call.axes("values")[-len(kept) :]])
    return [axes]


def _index_select(call: Call) -> Sequence[Axes]:
    axes = list(call.axes())
    dim = call["dim"]
    call.keep(axes[dim], _LOOKED_UP)
    index = call.axes("index")
    axes[dim] = index[0] if index else Axis(1)
    return [tuple(axes)]


def _gather(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    index = call.axes("index")
    dim = call["dim"] % max(len(axes), 1)
    if axes:
        call.keep(axes[dim], _LOOKED_UP)
    _unite_others(axes, index, dim)
    return [index]


def _scatter(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    dim = call["dim"] % max(len(axes), 1)
    if axes:
        call.keep(axes[dim], _LOOKED_UP)
    for other in call.optional("index", "src", "source"):
        if len(other) == len(axes):
            _unite_others(axes, other, dim)
    return [axes]


def _unite_others(axes: Axes, others: Axes, dim: int) -> None:
    for i, (axis, other) in enumerate(zip(axes, others, strict=True)):
        if i != dim and axis.size == other.size:
            unite(axis, other)


def _top(call: Call) -> Sequence[Axes]:
    axes = list(call.axes())
    dim = -1 if call["dim"] is None else call["dim"]
    call.keep(axes[dim], f"{call.name} is taken over its channels")
    new = call.new()
    axes[dim] = new[dim]
    return [tuple(axes)] * len(call.outputs)


RULES: dict[str, Rule] = {
    "embedding": _embedding,
    "_embedding_bag": _embedding_bag,
    "_embedding_bag_forward_only": _embedding_bag,
    "index": _index,
    "_unsafe_index": _index,
    "index_put": _index_put,
    "_index_put_impl": _index_put,
    "_unsafe_index_put": _index_put,
    "index_select": _index_select,
    "gather": _gather,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce"), _scatter),
    "topk": _top,
}
