"""Attributes of torch's own modules that say how large their tensors are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.structure.saved import Value

__all__ = ["is_sized", "sizes_of_module"]


def sizes_of_module(
    module: nn.Module, after: Mapping[str, torch.Size], inputs: tuple[int, ...] | None
) -> dict[str, Value]:
    """The attributes of a module that change when its tensors are cut.

    Args:
        module: The module as it is.
        after: The shapes that its tensors will have, by their names in the module.
        inputs: The shape of what it reads then, where it is a norm without tensors.
    """
    found = _sizes(module, after, inputs)
    return {key: value for key, value in found.items() if getattr(module, key, value) != value}


def _sizes(module: nn.Module, after: Mapping[str, torch.Size], inputs: tuple[int, ...] | None) -> dict[str, Value]:
    # of a weight norm the direction has the weight's shape
    weights = [shape for key, shape in after.items() if key in ("weight", "weight_v") or ".weight." in key]
    weight = max(weights, key=lambda shape: shape.numel(), default=None)
    if isinstance(module, nn.MultiheadAttention):
        dim = after["out_proj.weight"][0]
        return {"embed_dim": dim, "kdim": dim, "vdim": dim, "num_heads": dim // module.head_dim}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | _NormBase):
        return _sizes_of_norm(module, after, inputs)
    if weight is None:
        return {}
    if isinstance(module, nn.modules.conv._ConvNd):
        return _sizes_of_convolution(module, weight)
    if isinstance(module, nn.Linear):
        return {"in_features": weight[1], "out_features": weight[0]}
    if isinstance(module, nn.Bilinear):
        return {"out_features": weight[0], "in1_features": weight[1], "in2_features": weight[2]}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"embedding_dim": weight[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    return {}


def _sizes_of_norm(
    module: nn.Module, after: Mapping[str, torch.Size], inputs: tuple[int, ...] | None
) -> dict[str, Value]:
    own = next((after[key] for key in ("weight", "running_mean") if key in after), None)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shape = own if own is not None else inputs
        return {} if shape is None else {"normalized_shape": tuple(shape[-len(module.normalized_shape) :])}
    if own is None and inputs is None:
        return {}
    size = own[0] if own is not None else inputs[1]  # type: ignore[index]
    if isinstance(module, nn.GroupNorm):
        each = module.num_groups == module.num_channels
        return {"num_channels": size, "num_groups": size if each else module.num_groups}
    return {"num_features": size}


def _sizes_of_convolution(module: nn.modules.conv._ConvNd, weight: torch.Size) -> dict[str, Value]:
    first, second = weight[0], weight[1]
    groups = module.groups
    if groups > 1 and groups == module.in_channels and second == 1 and not module.transposed:
        groups = first * groups // module.out_channels
    ins, outs = (first, second * groups) if module.transposed else (second * groups, first)
    return {"in_channels": ins, "out_channels": outs, "groups": groups}


def is_sized(module: nn.Module) -> bool:
    """Whether a module without tensors of its own knows the size of what it reads."""
    own: list[Tensor | None] = [*module._parameters.values(), *module._buffers.values()]
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
    return isinstance(module, kinds) and not any(isinstance(x, Tensor) and x.dim() for x in own)
