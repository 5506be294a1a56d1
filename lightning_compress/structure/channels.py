"""Where a module's channels lie in its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ChannelPlace", "Entry", "entries", "located", "tensor_of"]


@dataclass(frozen=True)
class Entry:
    """Where a module's channels lie in one of its tensors.

    Args:
        key: The tensor's name in the module.
        axis: The axis.
        offsets: Channel i lies at i plus each of these.
        modulo: Channel i lies at i modulo this, in every group of a grouped convolution.
    """

    key: str
    axis: int
    offsets: tuple[int, ...] = (0,)
    modulo: int = 0

    def positions(self, channels: Tensor) -> Tensor:
        """Positions of channels along the axis, one row per offset."""
        channels = channels % self.modulo if self.modulo else channels
        return torch.stack([channels + offset for offset in self.offsets])


@dataclass(frozen=True)
class ChannelPlace:
    """Channels of one side of a module, and the root channel that each belongs to.

    Args:
        module: The module's name, or a raw parameter's.
        side: ``"out"`` or ``"in"``; ``"out"`` where both are the same.
        channels: Channels of the module.
        roots: For each of them a channel of the group's root.
        axis: Axis of a raw parameter.
    """

    module: str
    side: str
    channels: Tensor
    roots: Tensor
    axis: int = 0


def entries(module: nn.Module, side: str) -> list[Entry]:
    """The tensors of a module in which the channels of one side lie."""
    if isinstance(module, nn.modules.conv._ConvNd):
        found = _entries_of_convolution(module, side)
    elif isinstance(module, nn.Linear):
        found = [Entry("weight", 0), Entry("bias", 0)] if side == "out" else [Entry("weight", 1)]
    elif isinstance(module, nn.Embedding):
        found = [Entry("weight", 1)]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        last = len(module.normalized_shape) - 1
        found = [Entry("weight", last), Entry("bias", last)]
    elif isinstance(module, nn.MultiheadAttention):
        thrice = (0, module.embed_dim, 2 * module.embed_dim)
        found = [Entry("in_proj_weight", 0, thrice), Entry("in_proj_weight", 1), Entry("in_proj_bias", 0, thrice)]
        found += [Entry("bias_k", 2), Entry("bias_v", 2)]
        found += [Entry("out_proj.weight", 0), Entry("out_proj.weight", 1), Entry("out_proj.bias", 0)]
    else:  # batch, group and instance norms, PReLU
        found = [Entry(key, 0) for key in ("weight", "bias", "running_mean", "running_var")]
    return [entry for entry in found if tensor_of(module, entry.key) is not None]


def _entries_of_convolution(module: nn.modules.conv._ConvNd, side: str) -> list[Entry]:
    """Of a depthwise one both sides are the same; else axis 0 counts all channels, axis 1 those of one group."""
    if 1 < module.groups == module.out_channels == module.in_channels:
        return [Entry("weight", 0), Entry("bias", 0)]
    first = "in" if module.transposed else "out"
    if side == first:
        found = [Entry("weight", 0)]
    else:
        num = module.out_channels if side == "out" else module.in_channels
        found = [Entry("weight", 1, modulo=num // module.groups if module.groups > 1 else 0)]
    return [*found, Entry("bias", 0)] if side == "out" else found


def tensor_of(module: nn.Module, key: str) -> Tensor | None:
    """A stored parameter or buffer of a module, whatever the module shows under that name."""
    *path, last = key.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    parameter = module._parameters.get(last)
    return module._buffers.get(last) if parameter is None else parameter


def located(place: ChannelPlace, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """The tensors of a place: name, axis, positions of the channels (offsets by channels), root channels."""
    if place.side == "raw":
        yield place.module, place.axis, place.channels[None], place.roots
        return
    for entry in entries(modules[place.module], place.side):
        yield f"{place.module}.{entry.key}".lstrip("."), entry.axis, entry.positions(place.channels), place.roots
