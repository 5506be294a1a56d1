"""uint8 x int8 kernels of a CPU without VNNI, by their arithmetic: two products are added in 16 bits and saturate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.quantization.convert import convert
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.model import quantization_of

__all__ = ["saturating"]

_CHUNK = 2**22  # pairs at a time


def saturating(model: nn.Module) -> nn.Module:
    """A converted copy of a quantized model whose convolutions and linear layers add as AVX2 kernels do.

    Kernels differ in which products they pair; here they are neighbours in the order height, width, channel, which is
    onnxruntime's. A depthwise convolution has no channels to pair and is exact, as it is there.
    """
    converted = convert(model)
    quantization = quantization_of(converted)
    assert quantization is not None
    assert quantization.placement is not None
    for layer in quantization.layers:
        feed = quantization.activations.get(quantization.placement.feeds.get(layer.name, ""))
        if feed is not None and feed.enabled and isinstance(layer.module, nn.Linear | nn.Conv1d | nn.Conv2d):
            written, read = weights(layer.module)[layer.parameter], feed.quantize
            layer.module.forward = partial(_forward, layer.module, written, read)  # type: ignore[method-assign]
    return converted


def _forward(module: Any, written: Any, read: Any, x: Tensor) -> Tensor:
    codes = (x / read.scale).round() + read.zero_point
    if isinstance(module, nn.Linear):
        sums = _products(codes.flatten(0, -2), written.codes).view(*x.shape[:-1], -1)
        scale, zeros = written.scale, written.codes.sum(1)
        return (sums - read.zero_point * zeros) * (read.scale * scale) + (0 if module.bias is None else module.bias)
    if module.groups > 1:
        return type(module).forward(module, x)
    flat = isinstance(module, nn.Conv1d)
    if flat:
        codes = codes.unsqueeze(2)
    kernel, stride, padding, dilation = (
        ((1 if key != "padding" else 0), value[0]) if flat else tuple(value)
        for key, value in ((k, getattr(module, k)) for k in ("kernel_size", "stride", "padding", "dilation"))
    )
    (top, left), zero = padding, float(read.zero_point)  # what is padded is the code of 0
    codes = F.pad(codes, (left, left, top, top), value=zero)
    size = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(codes.shape[2:], kernel, stride, dilation, strict=True)
    ]
    columns = F.unfold(codes, kernel, dilation, 0, stride)  # (N, C * kh * kw, L)
    columns = columns.view(len(x), module.in_channels, -1, columns.shape[-1]).permute(0, 3, 2, 1)
    written_rows = written.codes.flatten(2).transpose(1, 2).flatten(1)  # (O, kh * kw * C)
    sums = _products(columns.flatten(2).flatten(0, 1), written_rows)
    y = (sums - read.zero_point * written_rows.sum(1)) * (read.scale * written.scale)
    y = y if module.bias is None else y + module.bias
    y = y.view(len(x), *size, -1).permute(0, 3, 1, 2)
    return y.squeeze(2) if flat else y


def _products(x: Tensor, w: Tensor) -> Tensor:
    """The products of x (M, K) and w (O, K), summed in pairs that saturate."""
    odd = x.shape[1] % 2
    x, w = F.pad(x, (0, odd)).float(), F.pad(w.float(), (0, odd))
    rows = max(1, _CHUNK // (w.numel() // 2))
    found = []
    for part in x.split(rows):
        pairs = part[:, None, 0::2] * w[:, 0::2] + part[:, None, 1::2] * w[:, 1::2]
        found.append(pairs.clamp_(-(2**15), 2**15 - 1).sum(-1, dtype=torch.float64))
    return torch.cat(found).float()
