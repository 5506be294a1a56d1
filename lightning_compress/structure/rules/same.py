"""Operations that give what they read, element by element."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_compress.structure.rules.call import Axes, Call, Rule, joined

__all__ = ["RULES", "elementwise"]


def elementwise(call: Call) -> Sequence[Axes]:
    """Operands are broadcast, and their axes are united."""
    axes = joined([call.axes_of(x) for x in call.tensors])
    return [axes if len(axes) == output.dim() else call.new(i) for i, output in enumerate(call.outputs)]


def _like_the_first(call: Call) -> Sequence[Axes]:
    """Also of those that read no values, such as ``zeros_like``."""
    first = next(value for value in call.arguments.values() if isinstance(value, Tensor))
    axes = call.axes_of(first)
    return [axes if output.shape == first.shape else call.new(i) for i, output in enumerate(call.outputs)]


def _along(call: Call) -> Sequence[Axes]:
    """What is computed along an axis depends on all that lies on it."""
    axes = call.axes()
    dims = call["dim"] if call["dim"] is not None else call["dims"]
    for dim in dims if isinstance(dims, list | tuple) else [dims]:
        if dim is not None and axes:
            call.keep(axes[dim], f"{call.name.strip('_')} is taken over its channels")
    return _like_the_first(call)


_COPIES: tuple[str, ...] = (
    "clone",
    "detach",
    "alias",
    "lift_fresh",
    "lift",
    "contiguous",
    "to",
    "_to_copy",
    "dropout",
    "native_dropout",
)
_COPIES += (
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "empty_like",
    "bernoulli",
    "fill",
    "zero",
)
_COPIES += (
    "normal",
    "uniform",
    "exponential",
    "tril",
    "triu",
    "positive",
    "nan_to_num",
    "alpha_dropout",
    "resolve_conj",
)
_BROADCAST: tuple[str, ...] = ("copy", "_prelu_kernel", "where", "masked_fill", "masked_scatter", "lerp", "addcmul")
_BROADCAST += ("addcdiv", "_conj")
_BROADCAST += ("hardswish", "log_sigmoid", "log_sigmoid_forward", "rrelu_with_noise", "polar", "complex", "real")
_BROADCAST += ("imag",)
_BROADCAST += ("floor_divide", "special_expit", "special_erf", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
_BROADCAST += ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_ALONG: tuple[str, ...] = (
    "_softmax",
    "_log_softmax",
    "softmax",
    "log_softmax",
    "_safe_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
)
_ALONG += ("cummax", "cummin", "sort", "argsort", "flip", "roll")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_COPIES, _like_the_first),
    **dict.fromkeys(_BROADCAST, elementwise),
    **dict.fromkeys(_ALONG, _along),
}
