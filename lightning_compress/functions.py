"""Names of torch functions by what they do to values, be it in place (``relu_``) or as an operator (``__add__``).

A name stands here without the underscores around it, as :class:`lightning_compress.trace.Ran` has it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "ADDITIONS",
    "ATTRIBUTES",
    "AVERAGES",
    "COPIES",
    "DROPOUTS",
    "LAYERS",
    "POOLS",
    "RESHAPES",
    "SAME_VALUES",
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
    *("expand", "repeat", "roll", "pad", "chunk", "split", "unbind", "getitem"),
    *("boolean_dispatch", "detach"),  # the first is what torch calls a max pool before it knows which
}

# What an integer kernel computes from quantized operands: of two tensors at least, or of one.
ADDITIONS = {"add", "radd", "iadd", "cat", "concat", "concatenate"}
AVERAGES = {"mean", *_AVERAGE_POOLS}
