"""The model without some channels as its own definition says it: the whole model, with these channels at zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_compress.structure.axes import Axis
from lightning_compress.structure.cuts import kept_along
from lightning_compress.structure.dependencies import Followed
from lightning_compress.structure.follow import Follow, name_of
from lightning_compress.structure.rules.call import Axes
from lightning_compress.structure.rules.layers import BATCH_NORMS
from lightning_compress.structure.rules.reductions import RULES as REDUCTIONS
from lightning_compress.structure.rules.reductions import reduced_dims

__all__ = ["Zeroed"]

# which give the same with zeros and without
_SUMS = ("sum", "nansum", "linalg_vector_norm", "norm", "any", "count_nonzero")


class Zeroed(Follow):
    """Runs a model with all values of some channels at zero, wherever they appear.

    What is taken over channels, such as a mean or a norm, is taken over those that are left.

    Args:
        model: The model.
        followed: What following its forward has shown.
        dropped: Which channels are zero, by their leaf.
    """

    def __init__(self, model: nn.Module, followed: Followed, dropped: Mapping[Axis, Tensor]) -> None:
        super().__init__(model, followed.named)
        self.dropped = dropped
        self._kept: dict[Axis, Tensor | None] = {}

    def kept(self, axis: Axis) -> Tensor | None:
        """Which positions of an axis are left; None for all."""
        axis = axis.now
        if axis not in self._kept:
            self._kept[axis] = kept_along(axis, self.dropped)
        return self._kept[axis]

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, over the channels that are left."""
        name = name_of(func)
        if name in REDUCTIONS and name not in _SUMS and isinstance(args[0], Tensor):
            call = self.call_of(func, args, kwargs, [])
            left = args[0]
            if call["other"] is not None:
                return func(*args, **kwargs)
            for dim in reduced_dims(call, left.dim()):
                left = self._left(left, args[0], dim)
            return func(left, *args[1:], **kwargs)
        if name in BATCH_NORMS:
            return self._batch_norm(func, args, kwargs)
        if name == "_weight_norm_interface":
            return func(self._without(args[0]), *args[1:], **kwargs)
        if name == "native_layer_norm":
            return self._layer_norm(func, *args)
        if name == "native_group_norm":
            return self._group_norm(func, *args)
        return func(*args, **kwargs)

    def made(self, func: Any, outputs: list[Tensor]) -> None:
        """Put zeros where channels are gone."""
        returns = [result.alias_info for result in func._schema.returns]  # noqa: SLF001  # torch has no public name
        if any(alias is not None and not alias.is_write for alias in returns):
            return  # a view of what has its zeros, or of a parameter
        for x in outputs:
            if x.is_floating_point():
                self._zero(x, self.axes_of(x))

    def _zero(self, x: Tensor, axes: Axes) -> None:
        for dim, axis in enumerate(axes):
            keep = self.kept(axis)
            if keep is not None:
                x.index_fill_(dim, (~keep).nonzero().flatten(), 0.0)

    def _without(self, x: Tensor) -> Tensor:
        """A copy of a tensor with zeros where channels are gone."""
        copy = x.clone()
        self._zero(copy, self.axes_of(x))
        return copy

    def _left(self, x: Tensor, like: Tensor, dim: int) -> Tensor:
        """What is left of a tensor along one of the axes of another."""
        keep = self.kept(self.axes_of(like)[dim])
        return x if keep is None else x.index_select(dim, keep.nonzero().flatten())

    def _batch_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its statistics are those of all axes but the channels', as where a weight is standardized by it."""
        left = args[0]
        for dim in range(left.dim()):
            left = left if dim == 1 else self._left(left, args[0], dim)
        result, *others = func(left, *args[1:], **kwargs)
        return (self._spread(result, args[0]), *others)

    def _layer_norm(
        self, func: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Any:
        left, own = x, [weight, bias]
        for dim in range(x.dim() - len(shape), x.dim()):
            left = self._left(left, x, dim)
            own = [w if w is None else self._left(w, x, dim - x.dim()) if w.dim() == len(shape) else w for w in own]
        result, *others = func(left, list(left.shape[x.dim() - len(shape) :]), *own, eps)
        return (self._spread(result, x), *others)

    def _group_norm(self, func: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any) -> Any:
        num, _, size, groups, eps = sizes
        keep = self.kept(self.axes_of(x)[1])
        if keep is None:
            return func(x, weight, bias, *sizes)
        left = self._left(x, x, 1).contiguous()
        own = [w if w is None else w[keep] for w in (weight, bias)]
        groups = left.shape[1] if groups == x.shape[1] else groups
        result, *others = func(left, *own, num, left.shape[1], size, groups, eps)
        return (self._spread(result, x), *others)

    def _spread(self, left: Tensor, x: Tensor) -> Tensor:
        """The values that are left in their places, with zeros between them."""
        for dim, axis in enumerate(self.axes_of(x)):
            keep = self.kept(axis)
            if keep is not None and left.shape[dim] != x.shape[dim]:
                shape = [*left.shape[:dim], x.shape[dim], *left.shape[dim + 1 :]]
                left = left.new_zeros(shape).index_copy(dim, keep.nonzero().flatten(), left)
        return left
