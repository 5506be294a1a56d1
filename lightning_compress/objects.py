"""What keeps a checkpoint from loading as plain values: found without making any of its objects."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["objects_in"]


class _Stand:
    """Stands for an object of any class: whatever pickle does to it is forgotten."""

    def __new__(cls, *args: object, **kwargs: object) -> _Stand:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> _Stand:
        return self

    def _forget(self, *args: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _forget


class _Dict(dict[Any, Any]):
    """An ordered dict, which takes attributes: a state dict has metadata."""


class _Reader(pickle.Unpickler):
    """Reads a pickle without importing or calling anything: a class of its own stands for each name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        return type(name, (_Stand,), {"__module__": module})

    def persistent_load(self, pid: object) -> None:
        """A tensor's storage."""


def objects_in(path: str | Path) -> list[str]:
    """The places in a checkpoint of torch that hold objects, and of which classes.

    Args:
        path: The file.

    Returns:
        Such as ``"hyper_parameters['loss'] is a my.Loss"``; nothing where that cannot be told.
    """
    try:
        refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            with archive.open(name) as file:
                content = _Reader(file).load()
        found = [(place, kind) for place, kind in _stands(content) if f"{kind.__module__}.{kind.__name__}" in refused]
    except Exception:  # an older format, or a damaged file
        return []
    return [f"{place} is a {kind.__module__}.{kind.__name__}" for place, kind in found]


def _stands(value: object, place: str = "") -> Iterator[tuple[str, type]]:
    """The places in nested dicts and lists of what stands for an object or a class."""
    if isinstance(value, _Stand):
        yield place, type(value)
    elif isinstance(value, type) and issubclass(value, _Stand):
        yield place, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _stands(entry, f"{place}[{key!r}]" if place else str(key))
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            yield from _stands(entry, f"{place}[{i}]")
