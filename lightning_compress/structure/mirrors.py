"""Averages that a module keeps of its own parts: they are compressed with what they are averages of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.layers import plain_name

if TYPE_CHECKING:
    from lightning_compress.structure.record import Record

__all__ = ["check_mirrors", "find_mirrors", "mirrored"]

T = TypeVar("T")


def find_mirrors(model: nn.Module) -> dict[str, str | None]:
    """What each ``AveragedModel`` in a model is an average of.

    Returns:
        By the name of the averaged copy, the name of the module with its class and the shapes of its parameters; None
        where there is none.
    """
    named = dict(model.named_modules())
    averages = {name: module for name, module in named.items() if isinstance(module, AveragedModel)}
    inside = tuple(f"{name}." for name in averages)
    found: dict[str, str | None] = {}
    for name, average in averages.items():
        others = [key for key in named if key not in averages and not f"{key}.".startswith(inside)]
        alike = [key for key in others if key and _shapes(named[key]) == _shapes(average.module)]
        found[f"{name}.module"] = next((key for key in alike if type(named[key]) is type(average.module)), None)
    return found


def check_mirrors(name: str, model: nn.Module) -> None:
    """Raise unless it is known of each ``AveragedModel`` in a model what it is an average of.

    Args:
        name: Who is to change the shapes, for the message.
        model: The model.

    Raises:
        ValueError: If an average has the names and shapes of no module.
    """
    unknown = [copy.removesuffix(".module") for copy, source in find_mirrors(model).items() if source is None]
    if unknown:
        raise ValueError(
            f"{name}: {', '.join(unknown)} is an AveragedModel of something that is no module of the model. Accepted "
            "are averages of modules of its own, which shrink with them: set AveragedModel(self.net) with self.net a "
            "module, or leave averages to the callback WeightAveraging."
        )


def mirrored(model: nn.Module, record: Record) -> Record:
    """A record that changes the averages with what they are averages of."""
    for copy, source in find_mirrors(model).items():
        if source is not None:
            record = replace(
                record,
                kept=_also(record.kept, source, copy),
                attributes=_also(record.attributes, source, copy),
                removed=[*record.removed, *(_renamed(n, source, copy) for n in record.removed if _is_of(n, source))],
            )
    return record


def _also(values: Mapping[str, T], source: str, copy: str) -> dict[str, T]:
    return {**values, **{_renamed(n, source, copy): value for n, value in values.items() if _is_of(n, source)}}


def _is_of(name: str, module: str) -> bool:
    return plain_name(f"{name}.").startswith(plain_name(f"{module}."))


def _renamed(name: str, source: str, copy: str) -> str:
    return copy + name.removeprefix(source)


def _shapes(module: nn.Module) -> list[Any]:
    return [(name, p.shape) for name, p in module.named_parameters()]
