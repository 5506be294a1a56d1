"""Operations that make one number of many along axes."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_compress.structure.axes import Axis
from lightning_compress.structure.rules.call import Axes, Call, Rule
from lightning_compress.structure.rules.same import elementwise

__all__ = ["RULES", "reduced_dims"]

_BY_POSITION = ("argmax", "argmin")
_OF_ALL: tuple[str, ...] = (
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "prod",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "logsumexp",
    "any",
)
_OF_ALL += ("all", "nansum", "nanmean", "linalg_vector_norm", "norm", "aminmax", "count_nonzero")
_CHOOSING = ("median", "nanmedian", "mode", "kthvalue", "quantile", "nanquantile")


def reduced_dims(call: Call, num: int) -> set[int]:
    """The axes that are reduced, of as many as there are."""
    dim = call["dim"]
    if dim is None or dim == []:
        return set(range(num))
    return {d % num for d in (dim if isinstance(dim, list | tuple) else [dim])} if num else set()


def _reduced(call: Call) -> Sequence[Axes] | None:
    if call["other"] is not None:  # the larger or smaller one of two
        return elementwise(call)
    axes = call.axes()
    dims = reduced_dims(call, len(axes))
    if call.name in _BY_POSITION or call.name in _CHOOSING:
        for dim in dims:
            call.keep(axes[dim], f"{call.name} is taken over its channels")
    if call["keepdim"]:
        left = tuple(Axis(1) if dim in dims else axis for dim, axis in enumerate(axes))
    else:
        left = tuple(axis for dim, axis in enumerate(axes) if dim not in dims)
    return [left if len(left) == output.dim() else call.new(i) for i, output in enumerate(call.outputs)]


RULES: dict[str, Rule] = dict.fromkeys((*_OF_ALL, *_BY_POSITION, *_CHOOSING), _reduced)
