"""One call of an operation, with the axes of the tensors that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_compress.structure.axes import Axis, leaves_of, pin, unite

__all__ = ["Axes", "Call", "Rule", "joined"]

Axes = tuple[Axis, ...]


class Call:
    """A call that has run.

    Args:
        name: The operation's name, without the underscore of those that write in place.
        arguments: Its arguments by the names that they have in its schema.
        outputs: The tensors that it gave.
        axes_of: Gives the axes of a tensor.
        where: Gives the line of the model that made the call.
    """

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        outputs: list[Tensor],
        axes_of: Callable[[Tensor], Axes],
        where: Callable[[], str],
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.outputs = outputs
        self.axes_of = axes_of
        self._where = where

    def __getitem__(self, key: str) -> Any:
        return self.arguments.get(key)

    def axes(self, key: str = "self") -> Axes:
        """The axes of an argument that is a tensor."""
        return self.axes_of(self.arguments[key])

    def optional(self, *keys: str) -> list[Axes]:
        """The axes of those arguments that are tensors and not None."""
        return [self.axes(key) for key in keys if isinstance(self[key], Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in lists too."""
        found: list[Tensor] = []
        for value in self.arguments.values():
            found.extend(x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor))
        return found

    def new(self, output: int = 0) -> Axes:
        """New axes for an output."""
        return tuple(Axis(size) for size in self.outputs[output].shape)

    def keep(self, axis: Axis, what: str) -> None:
        """Pin an axis, and say what was done to it, and in which line."""
        if axis.size > 1 and not all(leaf.why for leaf in leaves_of(axis)):
            pin(axis, f"{what} in {self._where()}")


Rule = Callable[[Call], Sequence[Axes] | None]
"""Unites and pins the axes that a call reads; gives those of its outputs, None where it knows nothing of the call."""


def joined(several: Sequence[Axes]) -> Axes:
    """The axes of a result that operands are broadcast to, whose axes are united."""
    num = max(map(len, several), default=0)
    result: list[Axis] = []
    for i in range(num):
        at = [axes[i - num] for axes in several if len(axes) >= num - i]
        size = max((axis.size for axis in at), default=1)
        if 0 in [axis.size for axis in at]:
            size = 0
        wide = [axis for axis in at if axis.size == size]
        for other in wide[1:]:
            unite(wide[0], other)
        result.append(wide[0])
    return tuple(result)
