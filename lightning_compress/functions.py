"""Names of torch functions by what they do to values, be it in place (``relu_``) or as an operator (``__add__``).

A name stands here without the underscores around it, as :class:`lightning_compress.trace.Ran` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "ADDITIONS",
    "ATTRIBUTES",
    "AVERAGES",
    "CLIPS",
    "COPIES",
    "DROPOUTS",
    "LAYERS",
    "MULTIPLICATIONS",
    "POOLS",
    "RESHAPES",
    "SAME_VALUES",
    "STATISTICS",
    "keeps_values",
]

# What asks a tensor for something that does not depend on its values: only a result that is a tensor (``x.T``) counts.
ATTRIBUTES = {
    "get",
    "size",
    "dim",
    "numel",
    "stride",
    "is_floating_point",
    "is_contiguous",
    "len",
    "type",
    "get_device",
}

LAYERS = {"linear", *(f"conv{transpose}{d}d" for transpose in ("", "_transpose") for d in (1, 2, 3))}

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

# Dimensions that a pool slides over, by its name.
_MAX_POOLS = {f"{kind}max_pool{d}d": d for kind in ("", "adaptive_") for d in (1, 2, 3)}
_AVERAGE_POOLS = {f"{kind}avg_pool{d}d": d for kind in ("", "adaptive_") for d in (1, 2, 3)}
POOLS = _MAX_POOLS | _AVERAGE_POOLS

COPIES = {"contiguous", "clone", "float", "to"}
DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d"}
RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}

# Each value of the result is one of the input's (dropout: while not training), so that one quantizer serves both.
SAME_VALUES = {
    *COPIES,
    *DROPOUTS,
    *RESHAPES,
    *_MAX_POOLS,
    *("feature_dropout", "alpha_dropout"),
    *("permute", "transpose", "t", "movedim", "swapaxes", "view_as"),
    *("expand", "repeat", "roll", "pad", "chunk", "split", "unbind", "getitem", "index_select", "narrow", "flip"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat_interleave", "pack_padded_sequence"),
    *("boolean_dispatch", "detach"),  # the first is what torch calls a max pool before it knows which
}

# What an integer kernel computes from quantized operands: of two tensors at least, or of one.
ADDITIONS = {"add", "radd", "iadd", "cat", "concat", "concatenate"}
AVERAGES = {"mean", *_AVERAGE_POOLS}
MULTIPLICATIONS = {"mul", "rmul", "imul", "multiply"}

# Kernels of convolutions clip what they give: a relu between them and the quantization costs nothing.
CLIPS = {"relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min"}

# What a norm divides by: of too wide a range for 8 bits.
STATISTICS = {"rsqrt", "sqrt", "reciprocal", "exp", "pow", "var", "std", "norm", "vector_norm"}


def keeps_values(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether each value that a function gives is one of its input's, so that one quantizer serves both.

    Args:
        name: The function.
        arguments: Its arguments by name.

    Example:
        >>> keeps_values("interpolate", {"mode": "nearest"}), keeps_values("interpolate", {"mode": "bilinear"})
        (True, False)
    """
    return name in SAME_VALUES or (name == "interpolate" and str(arguments.get("mode", "")).startswith("nearest"))
