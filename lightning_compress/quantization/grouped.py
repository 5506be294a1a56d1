"""Weights with a scale for each group of inputs, as codes that a file holds."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from lightning_compress.checks import refusal
from lightning_compress.layers import EMBEDDING, Layer
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize
from lightning_compress.quantization.per_token import PerToken

__all__ = ["GroupCodes", "TokenCodes", "finds_ranges", "group_codes", "is_grouped"]


class GroupCodes:
    """A weight as integer codes with a scale a group; stands where the weight's fake quantization stood.

    Args:
        codes: int8, of shape (out, in).
        scale: float32, of shape (out, in / group).
    """

    enabled = True

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes = codes
        self.scale = scale
        self.group = codes.shape[1] // scale.shape[1]
        self.zero_point = torch.zeros(scale.shape, dtype=torch.int32)
        self.limits = (-8, 7) if int(codes.abs().amax()) < 8 else (-128, 127)

    def __call__(self, weight: Tensor) -> Tensor:
        """The values, by an operation that the converters know."""
        return torch.ops.quantized_decomposed.dequantize_per_channel_group(
            self.codes, self.scale, self.zero_point, *self.limits, torch.int8, self.group, torch.float32
        )


class TokenCodes:
    """The operations that find each token's range; stands where an activation's fake quantization stood."""

    def __call__(self, x: object) -> object:
        """The value quantized and dequantized; what is not a float tensor passes."""
        if not isinstance(x, Tensor) or not torch.is_floating_point(x):
            return x
        ops = torch.ops.quantized_decomposed
        scale, zero_point = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        rest = (scale, zero_point, -128, 127, torch.int8)
        return ops.dequantize_per_token(ops.quantize_per_token(x, *rest), *rest, torch.float32)


def is_grouped(layer: Layer) -> bool:
    """Whether a layer's scheme asks for a scale a group."""
    return weights(layer.module)[layer.parameter].group is not None


@torch.no_grad()
def group_codes(layer: Layer) -> GroupCodes:
    """A weight's codes and scales.

    Raises:
        ValueError: If the layer is not linear, its inputs do not divide into groups, or its codes are no equal steps
            around 0.
    """
    fake_quantize = weights(layer.module)[layer.parameter]
    group = fake_quantize.group
    fix = f"Leave it out by exclude=[{layer.name!r}], or give it another scheme by overrides."
    is_linear = layer.weight.dim() == 2 and layer.axes in ("", "oi")
    if not is_linear or isinstance(layer.module, (*EMBEDDING, nn.RNNBase, nn.RNNCellBase)):
        kind = type(layer.module).__mro__[1].__name__
        raise refusal("weight_granularity", group, f"'channel' or 'tensor' for {layer.name}, a {kind}", fix)
    num_inputs = layer.weight.shape[1]
    if num_inputs % group:
        raise refusal("weight_granularity", group, f"a divisor of the {num_inputs} inputs of {layer.name}", fix)
    codes, qparams = fake_quantize.codes(layer.multiplied)
    rows = codes.reshape(-1, group).float()
    values = fake_quantize.quantizer.dequantize(rows, qparams)
    scale = qparams.scale.detach()
    if qparams.zero_point.any() or not torch.allclose(values, rows * scale[:, None], rtol=1e-4, atol=0):
        raise refusal(
            "Scheme.weight",
            fake_quantize.quantizer,
            f"a quantizer of equal steps around 0 in groups, such as ShortScale(4), at {layer.name}",
            "Its present form is simulated only; its bytes are those of save_packed.",
        )
    return GroupCodes(codes, scale.reshape(len(codes), -1))


def finds_ranges(activation: ActivationFakeQuantize) -> bool:
    """Whether an activation's range is found as the file runs."""
    return isinstance(activation.quantizer, PerToken)
