"""Tensors in arguments and outputs, named by where they lie in them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

__all__ = ["named_below", "named_tensors"]


def named_tensors(values: object, name: str = "") -> list[tuple[str, Tensor]]:
    """The tensors in values, in the order of :func:`lightning_compress.forward.map_tensors`, named by where they lie.

    Args:
        values: The values.
        name: Of all; the names of fields, keys and places are joined to it by underscores, those of fields and keys of
            the outermost value stand for themselves.

    Example:
        >>> import torch
        >>> [name for name, _ in named_tensors({"logits": torch.ones(1), "states": (torch.ones(1), None)}, "output")]
        ['logits', 'states_0']
        >>> [name for name, _ in named_tensors((torch.ones(1), 3, torch.ones(1)), "output")]
        ['output_0', 'output_2']
    """
    return named_below(values, (), name)


def named_below(values: object, path: tuple[str, ...], name: str = "") -> list[tuple[str, Tensor]]:
    """The same, named by where they lie below a path; ``name`` is that of all, where the path is empty."""
    if isinstance(values, Tensor):
        return [("_".join(path) or name, values)]
    parts: list[tuple[str, Any]]
    if is_dataclass(values) and not isinstance(values, type):
        parts = [(field.name, getattr(values, field.name)) for field in fields(values)]
    else:
        held = tree_flatten(values, is_leaf=lambda x: x is not values)[0]
        if len(held) == 1 and held[0] is values:
            return []
        keys = values if isinstance(values, dict) else getattr(values, "_fields", None)
        places = [(*((name,) if name and not path else ()), str(i)) for i in range(len(held))]
        names = ["_".join(place) for place in places] if keys is None else [str(key) for key in keys]
        parts = list(zip(names, held, strict=True))
    return [pair for key, part in parts for pair in named_below(part, (*path, key), name)]
