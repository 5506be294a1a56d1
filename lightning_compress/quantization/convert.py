"""Fake quantization to explicit quantize and dequantize operations (QDQ), with the trained ranges."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from lightning_compress.layers import Layer, modules_by_name
from lightning_compress.quantization.fake_quant import ActivationFakeQuantize, weights
from lightning_compress.quantization.placement import Placement
from lightning_compress.quantization.prepare import prepared
from lightning_compress.quantization.quantizers import Affine
from lightning_compress.quantization.schemes import Scheme

__all__ = ["convert", "to_float"]

Module = TypeVar("Module", bound=nn.Module)


class _Codes:
    """A weight as stored integer codes; stands where the weight's fake quantization stood."""

    enabled = True

    def __init__(self, codes: Tensor, scale: Tensor, axis: int) -> None:
        self.codes, self.scale, self.axis = codes, scale, axis
        self.zero_point = torch.zeros(scale.shape, dtype=torch.int64)

    def __call__(self, weight: Tensor) -> Tensor:
        return torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scale, self.zero_point, self.axis, -128, 127, torch.int8
        )


class _QuantizeDequantize:
    """The operations that stand where an activation's fake quantization stood."""

    def __init__(self, activation: ActivationFakeQuantize) -> None:
        scale, zero_point, _ = activation.qparams()
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.bits = activation.quantizer.bits

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not torch.is_floating_point(x):
            return x
        if self.bits < 8:  # the operation saturates at 8 bits only
            lowest = -self.zero_point * self.scale
            x = x.clamp(lowest, lowest + (2**self.bits - 1) * self.scale)
        ops = torch.ops.quantized_decomposed
        q = ops.quantize_per_tensor(x, self.scale, self.zero_point, 0, 255, torch.uint8)
        return ops.dequantize_per_tensor(q, self.scale, self.zero_point, 0, 255, torch.uint8)


def convert(model: Module) -> Module:
    """A copy for export: integer weights, explicit QDQ operations, batch norm folded, in eval mode on the CPU.

    A folded batch norm scales its layer's codes' scales, not the codes: what ships are the trained integers. Only a
    channel so faint that its bias does not fit 32 bits in its steps is rounded to a larger scale.

    Raises:
        ValueError: If the model is not quantized, or its scheme has no form in integer kernels.
    """
    quantization = prepared(model)
    if quantization is None or not quantization.enabled:
        raise ValueError(
            "The model is not quantized: no QuantizationAwareTraining phase has begun. Train through its phase, or "
            "export the float model."
        )
    _check_affine(quantization.scheme)
    model = copy.deepcopy(model).cpu().eval()
    quantization = prepared(model)
    assert quantization is not None
    quantization.observe(False)
    placement = quantization.placement or Placement()
    folds = placement.folds
    modules = modules_by_name(model)
    for layer in quantization.layers:
        feed = quantization.activations.get(placement.feeds.get(layer.name, ""))
        step = float(feed.qparams().scale) if feed is not None and feed.enabled else None
        _store_codes(layer, modules[folds[layer.name]] if layer.name in folds else None, step)
    for norm in folds.values():
        _replace(model, norm, _identity_like(modules[norm]))
    for activation in quantization.activations.values():
        if activation.enabled:
            activation.quantize = _QuantizeDequantize(activation)  # type: ignore[method-assign]
    return model


def _check_affine(scheme: Scheme) -> None:
    for name, quantizer, symmetric in (("weight", scheme.weight, True), ("inputs", scheme.inputs, False)):
        fits = isinstance(quantizer, Affine) and quantizer.symmetric == symmetric
        if not (fits or quantizer is None):
            kind = f"Affine(symmetric={symmetric})"
            raise ValueError(
                f"Scheme.{name}={quantizer!r} has no form in integer kernels, so it is simulated only. For export take "
                f"{name}={kind}."
            )


def to_float(model: Module) -> Module:
    """A copy that computes in float: the float twin that a quantized file is compared with."""
    model = copy.deepcopy(model).cpu().eval()
    quantization = prepared(model)
    if quantization is not None:
        quantization.observe(False)
        quantization.enable(False)
    return model


@torch.no_grad()
def _store_codes(layer: Layer, norm: Any, step: float | None) -> None:
    """Replace a weight's fake quantization by its codes, with the norm folded in; step is the scale of the input."""
    fake_quantize = weights(layer.module)[layer.parameter]
    codes, (scale, _, axis) = fake_quantize.codes(layer.weight)
    if axis is None:
        axis, scale = layer.out_axis, scale.expand(layer.weight.shape[layer.out_axis]).clone()
    if norm is not None:
        factor = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = torch.zeros_like(factor) if norm.bias is None else norm.bias
        bias = layer.module.bias
        moved = (-norm.running_mean if bias is None else bias - norm.running_mean) * factor
        layer.module.bias = nn.Parameter(shift + moved)
        shape = [-1 if i == axis else 1 for i in range(codes.dim())]
        codes = codes * torch.where(factor < 0, -1, 1).to(codes.dtype).view(shape)
        scale = scale * factor.abs()
    shape = [-1 if i == axis else 1 for i in range(codes.dim())]
    dead = (codes == 0).transpose(0, axis).flatten(1).all(1)
    floor = torch.where(dead, scale.max(), scale)
    own_bias = getattr(layer.module, "bias", None)
    if isinstance(own_bias, Tensor) and step is not None:
        # integer kernels hold a bias as 32 bits in steps of both scales: a pruned or faint channel would overflow them
        lowest = own_bias.detach().abs().view(-1, floor.numel()).amax(0) * 2**-30 / step
        floor = torch.maximum(floor, lowest)
    codes = (codes * (scale / floor).view(shape)).round().to(torch.int8)
    weights(layer.module)[layer.parameter] = _Codes(codes, floor, axis)


def _identity_like(norm: nn.Module) -> nn.Module:
    """An identity that keeps the norm's hooks."""
    identity = nn.Identity().eval()
    identity._forward_hooks = norm._forward_hooks
    identity._forward_pre_hooks = norm._forward_pre_hooks
    return identity


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    old = modules_by_name(model)[name]
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if child is old:
                parent._modules[key] = new
