"""Operations that arrange axes anew: views, permutations, slices and concatenations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_compress.structure.axes import Axis, cut, product_of, side_by_side, split_in_two, unite
from lightning_compress.structure.rules.call import Axes, Call, Rule, joined

__all__ = ["RULES"]


def _view(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    shape = call.outputs[0].shape
    if tuple(axis.size for axis in axes) == tuple(shape):
        return [axes]
    if not call.outputs[0].numel():
        return [call.new()]
    rest = product_of(axes)
    found: list[Axis] = []
    for size in shape:
        halves = split_in_two(rest, size)
        if halves is None:
            for axis in axes:
                call.keep(axis, "its channels are rearranged by a view")
            return [call.new()]
        found.append(halves[0])
        rest = halves[1]
    return [tuple(found)]


def _expand(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    shape = call.outputs[0].shape
    own = (*[Axis(1)] * (len(shape) - len(axes)), *axes)
    return [tuple(axis if axis.size == size else Axis(size) for axis, size in zip(own, shape, strict=True))]


def _repeat(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    repeats = call["repeats"]
    own = (*[Axis(1)] * (len(repeats) - len(axes)), *axes)
    return [tuple(product_of([Axis(num), axis]) for num, axis in zip(repeats, own, strict=True))]


def _permute(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    return [tuple(axes[dim] for dim in call["dims"])]


def _transpose(call: Call) -> Sequence[Axes]:
    axes = list(call.axes())
    if axes:
        first, second = (0, -1) if call["dim0"] is None else (call["dim0"], call["dim1"])
        axes[first], axes[second] = axes[second], axes[first]
    return [tuple(axes)]


def _unsqueeze(call: Call) -> Sequence[Axes]:
    axes = list(call.axes())
    dim = call["dim"]
    axes.insert(dim if dim >= 0 else dim + len(axes) + 1, Axis(1))
    return [tuple(axes)]


def _squeeze(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    dim = call["dim"]
    dims = range(len(axes)) if dim is None else dim if isinstance(dim, list | tuple) else [dim]
    gone = {d % len(axes) for d in dims if axes[d].size == 1} if axes else set()
    return [tuple(axis for d, axis in enumerate(axes) if d not in gone)]


def _slice(call: Call) -> Sequence[Axes]:
    axes = list(call.axes())
    dim = call["dim"] or 0
    size = call.outputs[0].shape[dim]
    axis = axes[dim]
    step = call["step"] or 1
    start = min(max((call["start"] or 0) + (axis.size if (call["start"] or 0) < 0 else 0), 0), axis.size)
    if size == axis.size:
        return [tuple(axes)]
    axes[dim] = _every(call, axis, step, size) if step > 1 else _piece(call, axis, start, size)
    return [tuple(axes)]


def _every(call: Call, axis: Axis, step: int, size: int) -> Axis:
    """Every second, say, of an axis: the major part of it."""
    halves = split_in_two(axis, size) if size * step == axis.size else None
    call.keep(axis if halves is None else halves[1], "channels are taken by their position")
    return Axis(size) if halves is None else halves[0]


def _piece(call: Call, axis: Axis, start: int, size: int) -> Axis:
    """Some positions that follow each other."""
    if not size:
        return Axis(0)
    behind = (None, axis) if not start else cut(axis, start)
    if behind is not None and behind[1].size == size:
        return behind[1]
    found = None if behind is None else cut(behind[1], size)
    if found is None:
        call.keep(axis, "its channels are cut where they cannot be followed")
        return Axis(size)
    return found[0]


def _select(call: Call) -> Sequence[Axes]:
    axes = list(call.axes())
    call.keep(axes.pop(call["dim"]), "channels are taken by their position")
    return [tuple(axes)]


def _unbind(call: Call) -> Sequence[Axes]:
    return list(_select(call)) * len(call.outputs) if call["dim"] is not None else None  # type: ignore[return-value]


def _split(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    dim = call["dim"] or 0
    rest = axes[dim]
    pieces: list[Axis] = []
    for output in call.outputs[:-1]:
        two = cut(rest, output.shape[dim])
        if two is None:
            call.keep(axes[dim], "its channels are cut where they cannot be followed")
            return [call.new(i) for i in range(len(call.outputs))]
        pieces.append(two[0])
        rest = two[1]
    pieces.append(rest)
    if len({piece.size for piece in pieces}) == 1:  # as many parts of equal size as before are to be left
        for piece in pieces[1:]:
            unite(pieces[0], piece)
    before = axes[: dim % len(axes)]
    return [(*before, piece, *axes[len(before) + 1 :]) for piece in pieces]


def _cat(call: Call) -> Sequence[Axes]:
    several = [call.axes_of(x) for x in call["tensors"] if x.dim() == call.outputs[0].dim()]
    dim = (call["dim"] or 0) % call.outputs[0].dim()
    others = joined([(*axes[:dim], *axes[dim + 1 :]) for axes in several])
    return [(*others[:dim], side_by_side([axes[dim] for axes in several]), *others[dim:])]


def _stack(call: Call) -> Sequence[Axes]:
    several = [call.axes_of(x) for x in call["tensors"]]
    dim = (call["dim"] or 0) % call.outputs[0].dim()
    others = joined(several)
    return [(*others[:dim], side_by_side([Axis(1) for _ in several]), *others[dim:])]


def _pad(call: Call) -> Sequence[Axes]:
    axes = list(call.axes())
    pads: Sequence[int] = call["pad"]
    for i in range(len(pads) // 2):
        dim = -1 - i
        before, after = pads[2 * i : 2 * i + 2]
        if before or after:
            inner = _piece(call, axes[dim], max(-before, 0), axes[dim].size + min(before, 0) + min(after, 0))
            zeros = [Axis(max(num, 0), "padding") for num in (before, after)]
            axes[dim] = side_by_side([zeros[0], inner, zeros[1]])
    return [tuple(axes)]


def _glu(call: Call) -> Sequence[Axes]:
    axes = list(call.axes())
    dim = -1 if call["dim"] is None else call["dim"]
    halves = cut(axes[dim], axes[dim].size // 2)
    if halves is None:
        call.keep(axes[dim], "its channels are cut where they cannot be followed")
        return [call.new()]
    unite(*halves)
    axes[dim] = halves[0]
    return [tuple(axes)]


def _shuffle(call: Call) -> Sequence[Axes]:
    """Groups of channels, and the channels of a group, change places."""
    axes = list(call.axes())
    halves = split_in_two(axes[1], call["groups"])
    if halves is None:
        return [call.new()]
    axes[1] = product_of([halves[1], halves[0]])
    return [tuple(axes)]


def _pixel_shuffle(call: Call) -> Sequence[Axes]:
    """Of each channel a square of pixels is made: (..., c * r * r, h, w) to (..., c, h * r, w * r)."""
    axes = call.axes()
    new = call.new()
    halves = split_in_two(axes[-3], new[-3].size)
    call.keep(axes[-3] if halves is None else halves[1], "channels become pixels")
    return [(*axes[:-3], new[-3] if halves is None else halves[0], *new[-2:])]


def _pixel_unshuffle(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    factor = call["downscale_factor"] ** 2
    return [(*axes[:-3], product_of([axes[-3], Axis(factor, "pixels become channels")]), *call.new()[-2:])]


def _unfold(call: Call) -> Sequence[Axes]:
    """Windows along an axis; their elements lie on a new one."""
    axes = list(call.axes())
    dim = call["dimension"]
    call.keep(axes[dim], "windows are taken of its channels")
    new = call.new()
    axes[dim] = new[dim % len(axes)]
    return [(*axes, new[-1])]


def _im2col(call: Call) -> Sequence[Axes]:
    """(n, c, h, w) to (n, c * kernel, places)."""
    axes = call.axes()
    new = call.new()
    kernel = Axis(new[-2].size // axes[-3].size, "a kernel")
    return [(*axes[:-3], product_of([axes[-3], kernel]), new[-1])]


def _as_complex(call: Call) -> Sequence[Axes]:
    axes = call.axes()
    call.keep(axes[-1], "pairs become complex numbers")
    return [axes[:-1]]


def _as_real(call: Call) -> Sequence[Axes]:
    return [(*call.axes(), Axis(2, "real and imaginary parts"))]


def _made_new(call: Call) -> Sequence[Axes]:
    """What is made of a size alone."""
    return [call.new(i) for i in range(len(call.outputs))]


def _squeezed_out(call: Call) -> Sequence[Axes] | None:
    return None if not isinstance(call["self"], Tensor) else _squeeze(call)


_NEW: tuple[str, ...] = (
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros",
    "ones",
    "full",
    "empty",
    "arange",
    "rand",
    "randn",
)
_NEW += ("randint", "randperm", "scalar_tensor", "linspace", "eye", "new_empty_strided", "empty_strided", "hann_window")

RULES: dict[str, Rule] = {
    "view": _view,
    "_unsafe_view": _view,
    "reshape": _view,
    "_reshape_alias": _view,
    "expand": _expand,
    "repeat": _repeat,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "numpy_T": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeezed_out,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "split": _split,
    "split_with_sizes": _split,
    "cat": _cat,
    "stack": _stack,
    "constant_pad_nd": _pad,
    "glu": _glu,
    "native_channel_shuffle": _shuffle,
    "channel_shuffle": _shuffle,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "unfold": _unfold,
    "im2col": _im2col,
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
    **dict.fromkeys(_NEW, _made_new),
}
