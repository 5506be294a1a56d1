"""What a checkpoint holds of a model's structure, and whether it can be that of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torch import nn

from lightning_compress.checks import is_whole, shown

__all__ = ["Structure", "Value", "check_saved"]

Value = int | tuple[int, ...]
"""A module's attribute that counts channels, such as ``out_features`` or ``normalized_shape``."""


class Structure(TypedDict, total=False):
    """How a model differs from its dense self, in plain values: what a checkpoint holds.

    Args:
        attributes: Values of attributes, by the module's name.
        shapes: Dense shapes, by the tensor's name.
        removed: Names of removed blocks.
    """

    attributes: dict[str, dict[str, Value]]
    shapes: dict[str, list[int]]
    removed: list[str]


def check_saved(model: nn.Module, structure: Any) -> None:
    """Refuse what is no structure, or sets what counts nothing; what the model has not is left to loading.

    Raises:
        ValueError: If it is so.
    """
    parts = structure if isinstance(structure, Mapping) else {"": structure}
    kinds = {"attributes": Mapping, "shapes": Mapping, "removed": list}
    for name, value in parts.items():
        if not isinstance(name, str) or not isinstance(value, kinds.get(name, ())):
            raise ValueError(f"a structure whose {shown(name)} is {shown(value)}")
    names = parts.get("removed", [])
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"a structure without a block of the name {shown(wrong[0])}")
    for name, shape in parts.get("shapes", {}).items():
        if not isinstance(name, str) or not isinstance(shape, list) or not all(is_whole(size) for size in shape):
            raise ValueError(f"a structure in which {shown(name)} was of shape {shown(shape)}")
    modules = dict(model.named_modules())
    for name, values in parts.get("attributes", {}).items():
        if not isinstance(name, str) or not isinstance(values, Mapping):
            raise ValueError(f"a structure whose attributes of {shown(name)} are {shown(values)}")
        for key, value in values.items():
            _check_attribute(modules.get(name), f"{name}.{key}", key, value)


def _check_attribute(module: nn.Module | None, name: str, key: Any, value: Any) -> None:
    """Refuse what counts no channels, and what the module has of another kind."""
    several = isinstance(value, list | tuple) and all(is_whole(size) for size in value)
    if not isinstance(key, str) or not (several or is_whole(value)):
        raise ValueError(f"a structure in which {name} is {shown(value)}")
    ours = getattr(module, key, value)
    if not (isinstance(ours, list | tuple) if several else is_whole(ours)):
        raise ValueError(f"a structure in which {name} is {shown(value)}, where it is {shown(ours)} here")
