"""Cross-layer equalization: channels of like ranges, by moving scales between layers (Nagel 2019, arXiv:1906.04721).

Section 4.1. Where only positively homogeneous functions lie between two layers, f(s x) = s f(x), a channel may be
divided by s at the first and multiplied by s at the second without a change of the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.layers import Layer, modules_by_name
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.pairs import Chains

__all__ = ["equalize"]

# The activation behind a batch norm is taken to reach this many standard deviations.
_DEVIATIONS = 3


@torch.no_grad()
def equalize(
    model: nn.Module, layers: Sequence[Layer], chains: Chains, num_sweeps: int = 50, tolerance: float = 1e-3
) -> None:
    """Give the channels between two layers equal ranges in both, in place; the function in eval mode stays.

    A range is the largest magnitude of a channel's weights: r1 of the first layer's output channel, r2 of the second's
    input channel. The first is divided by s = sqrt(r1 r2) / r2, the second multiplied by it. The bias counts as a
    weight, or a channel that is nearly constant would be blown up.

    With a batch norm between, its weight and bias are divided instead: they set the scale of the channel, and that of
    the weight before it does not matter, as long as the weight has one scale per channel. What is balanced then are the
    second layer and the activation between, whose range is r1 = |bias| + 3 |weight| of the norm. Where the weight
    has one scale per tensor, its output channels get one range, which the norm's running statistics follow.

    Args:
        model: The model.
        layers: The layers that are quantized.
        chains: Where scales can be moved, from :func:`lightning_compress.quantization.pairs.find_pairs`.
        num_sweeps: How often to go over all pairs at most: what one pair gains, the next may lose.
        tolerance: Stop once no scale moves by more than this share.
    """
    by_name = {layer.name: layer for layer in layers}
    modules = modules_by_name(model)
    norms = {layer: cast("_BatchNorm", modules[norm]) for layer, norm in chains.norms.items()}
    # a norm without a weight leaves nothing to move the scale to
    pairs = [pair for pair in chains.pairs if pair[0] not in norms or norms[pair[0]].weight is not None]
    for _ in range(num_sweeps):
        moved = 0.0
        for first, second in pairs:
            scale = _balance(by_name[first], norms.get(first), by_name[second], norms.get(second))
            moved = max(moved, float(scale.log().abs().max()))
        if moved < tolerance:
            break
    for name, norm in norms.items():
        layer = by_name[name]
        has_one_scale = weights(layer.module)[layer.parameter].axis is None
        if has_one_scale and norm.weight is not None:
            _level(layer, norm)


def _balance(first: Layer, norm: _BatchNorm | None, second: Layer, second_norm: _BatchNorm | None) -> Tensor:
    """Move scales from one layer to the next; the scales."""
    ranges = _output_ranges(first, norm)
    weight = second.weight.detach()
    if second_norm is not None:
        # what the second layer's own norm multiplies its outputs by belongs to the weight
        weight = weight * second.spread_outputs(_factor(second_norm)).to(weight.dtype)
    theirs = _ranges(second, len(ranges), outputs=False, weight=weight)
    both = (ranges > 0) & (theirs > 0)  # a pruned channel stays as it is
    scale = torch.where(both, (ranges / theirs.where(both, 1)).sqrt(), 1.0)
    if norm is None:
        _multiply(first, 1 / scale)
    else:
        norm.weight.div_(scale)
        if norm.bias is not None:
            norm.bias.div_(scale)
    second.weight.mul_(second.spread_inputs(scale).to(weight.dtype))
    return scale


def _output_ranges(layer: Layer, norm: _BatchNorm | None) -> Tensor:
    """The range of each output channel: that of its weights and bias, or that which a norm gives it."""
    if norm is not None:
        ranges = _DEVIATIONS * norm.weight.abs()
        return ranges if norm.bias is None else ranges + norm.bias.abs()
    ranges = _ranges(layer, layer.num_outputs, outputs=True)
    bias = layer.module._parameters.get("bias")
    return ranges if bias is None else torch.maximum(ranges, bias.abs())


def _level(layer: Layer, norm: _BatchNorm) -> None:
    """Give all output channels the range of the largest one; the batch norm takes the scales back."""
    ranges = _ranges(layer, layer.num_outputs, outputs=True)
    scale = torch.where(ranges > 0, ranges.max() / ranges, 1.0)
    before = _factor(norm)
    _multiply(layer, scale)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.mul_(scale)
    norm.running_var.mul_(scale.square())
    # not 1: eps does not scale with the variance
    norm.weight.mul_(torch.where(before == 0, 1.0, before / (scale * _factor(norm))))


def _multiply(layer: Layer, scale: Tensor) -> None:
    """Scale what a layer puts out."""
    layer.weight.mul_(layer.spread_outputs(scale).to(layer.weight.dtype))
    bias = layer.module._parameters.get("bias")
    if bias is not None:
        bias.mul_(scale)


def _factor(norm: _BatchNorm) -> Tensor:
    """What a batch norm multiplies a channel by."""
    assert norm.running_var is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight


def _ranges(layer: Layer, num: int, outputs: bool, weight: Tensor | None = None) -> Tensor:
    """The largest magnitude of each output or input channel's weights.

    Args:
        layer: The layer.
        num: How many channels it has on that side; behind a flatten, a linear layer has several inputs per channel.
        outputs: Whether output channels are asked for.
        weight: In the place of the layer's own.
    """
    magnitude = (layer.weight.detach() if weight is None else weight).abs()
    numbers = torch.arange(num, device=magnitude.device)
    channels = layer.spread_outputs(numbers) if outputs else layer.spread_inputs(numbers)
    ranges = torch.zeros(num, dtype=magnitude.dtype, device=magnitude.device)
    return ranges.scatter_reduce_(0, channels.expand_as(magnitude).flatten(), magnitude.flatten(), "amax")
