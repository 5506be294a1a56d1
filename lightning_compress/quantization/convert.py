"""Fake quantization to explicit quantize and dequantize operations (QDQ), with the trained ranges."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from lightning_compress.checks import check_flag, check_instance, check_one_of
from lightning_compress.copies import copy_module
from lightning_compress.layers import Layer, modules_by_name
from lightning_compress.quantization.activation_codes import INTEGERS, Activations, QuantizeDequantize, ends, is_wide
from lightning_compress.quantization.call_sites import with_own_call_sites
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize
from lightning_compress.quantization.grouped import TokenCodes, finds_ranges, group_codes, is_grouped
from lightning_compress.quantization.model import check_whole, quantization_of, store_weights
from lightning_compress.quantization.overflow import fits_pairs
from lightning_compress.quantization.placement import Placement
from lightning_compress.quantization.quantizer import QParams, Quantizer, along

__all__ = ["Activations", "check_convertible", "convert", "float_twin", "overflowing", "to_float"]

Module = TypeVar("Module", bound=nn.Module)


class _Codes:
    """A weight as stored integer codes; stands where the weight's fake quantization stood."""

    enabled = True

    def __init__(self, codes: Tensor, scale: Tensor, axis: int) -> None:
        self.codes = codes
        self.scale = scale
        self.axis = axis
        self.zero_point = torch.zeros(scale.shape, dtype=torch.int64)

    def __call__(self, weight: Tensor) -> Tensor:
        return torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scale, self.zero_point, self.axis, -128, 127, torch.int8
        )


class _Rounded(_Codes):
    """The same weight as floats on the codes' grid, with the operation that gives the codes back."""

    def __init__(self, codes: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__(codes, scale, axis)
        self.values = codes.float() * along(scale, axis, codes)

    def __call__(self, weight: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        rest = (self.scale, self.zero_point, self.axis, -128, 127, torch.int8)
        return ops.dequantize_per_channel(ops.quantize_per_channel(self.values, *rest), *rest)


class _Flat:
    """A weight of more than two axes in the codes of a matrix, put into its shape behind them.

    The operations that write codes know one axis with scales. For a matrix runtimes have kernels by it; onnxruntime
    fails on a stack of matrices.
    """

    enabled = True

    def __init__(self, written: type[_Codes], codes: Tensor, scale: Tensor, axis: int) -> None:
        self._axis = axis
        self._shape = codes.movedim(axis, -1).shape
        self._matrix = written(codes.movedim(axis, -1).reshape(-1, codes.shape[axis]), scale, 1)

    def __call__(self, weight: Tensor) -> Tensor:
        return self._matrix(weight).view(self._shape).movedim(-1, self._axis)


def convert(model: Module, activations: Activations = "uint8", rounded_weights: bool = False) -> Module:
    """A copy for export: integer weights, explicit QDQ operations, batch norm folded, in eval mode on the CPU.

    A folded batch norm scales its layer's codes' scales, not the codes: what ships are the trained integers. Only a
    channel so faint that its bias does not fit 32 bits in its steps is rounded to a larger scale.

    Args:
        model: The quantized model.
        activations: Integers that the activations' codes are written as, ``"uint8"`` or ``"int8"``; both compute the
            same. Codes of more than 8 bits are int16 beside either.
        rounded_weights: Write weights as floats on their grid with a quantize operation, for converters that fold it.

    Raises:
        ValueError: If the model is not quantized, or is a part of one that is; its scheme has no form in integer
            kernels; or the integers are no such type.

    Example:
        >>> from lightning_compress.quantization import int8
        >>> from lightning_compress.quantization.model import quantize_layers
        >>> model = nn.Linear(3, 2)
        >>> x = torch.ones(1, 3)
        >>> quantize_layers(model, int8()).enable(True)
        >>> torch.equal(convert(model, activations="int8")(x), model(x))
        True
    """
    check_instance("convert.model", model, nn.Module, "a quantized nn.Module")
    check_one_of("convert.activations", activations, INTEGERS, "Take what the runtime computes in.")
    check_flag("convert.rounded_weights", rounded_weights)
    check_whole(model)
    quantization = quantization_of(model)
    if quantization is None or not quantization.enabled:
        raise ValueError(
            "The model is not quantized: no QuantizationAwareTraining phase has begun. Train through its phase, or "
            "export the float model."
        )
    model = copy_module(model).cpu().eval()
    quantization = quantization_of(model)
    assert quantization is not None
    quantization.observe(False)
    store_weights(model)
    placement = quantization.placement or Placement()
    on = {x.name for x in quantization.layers if weights(x.module)[x.parameter].enabled}
    # a norm behind groups stays: their scales are short numbers, which would not hold its factors
    grouped = {x.name for x in quantization.layers if is_grouped(x)}
    folds = {layer: norm for layer, norm in placement.folds.items() if layer in on - grouped}
    modules = modules_by_name(model)
    for name, activation in quantization.activations.items():
        if activation.enabled:
            _check_inputs(name, activation.quantizer, activation.qparams())
    for layer in quantization.layers:
        if layer.name not in on:  # no data reached it
            continue
        if layer.name in grouped:
            weights(layer.module)[layer.parameter] = group_codes(layer)
            continue
        feed = quantization.activations.get(placement.feeds.get(layer.name, ""))
        step = float(feed.qparams().scale) if feed is not None and feed.enabled else None
        codes = _codes(layer, modules[folds[layer.name]] if layer.name in folds else None, step)
        written = _Rounded if rounded_weights else _Codes
        is_stack = bool(layer.axes) and "k" not in layer.axes and layer.weight.dim() > 2
        weights(layer.module)[layer.parameter] = _Flat(written, *codes) if is_stack else written(*codes)
    for norm in folds.values():
        _replace(model, norm, _identity_like(modules[norm]))
    _write_activations([a for a in quantization.activations.values() if a.enabled], activations)
    with_own_call_sites(model)
    return model


def _write_activations(quantizers: list[ActivationFakeQuantize], kind: Activations) -> None:
    for activation in quantizers:
        if not finds_ranges(activation):
            activation.quantize = QuantizeDequantize(activation, kind)  # type: ignore[method-assign]
        elif kind == "int8":  # runtimes of uint8 take its arithmetic as it is
            activation.quantize = TokenCodes()  # type: ignore[method-assign]


def overflowing(converted: nn.Module, integer_lstm: bool = False) -> list[str]:
    """Layers of a converted model whose products a CPU without VNNI does not add exactly in uint8 x int8 kernels.

    See :mod:`lightning_compress.quantization.overflow`; it is arithmetic on the weights that ship, on any CPU.

    Args:
        converted: The model.
        integer_lstm: Whether an LSTM meets its input and its hidden state as codes of 8 bits; in float otherwise.
    """
    quantization = quantization_of(converted)
    if quantization is None or quantization.placement is None:
        return []
    feeds = quantization.placement.feeds
    found = []
    for layer in quantization.layers:
        is_lstm = integer_lstm and isinstance(layer.module, nn.LSTM)
        feed = quantization.activations.get(feeds.get(layer.module_name if is_lstm else layer.name, ""))
        if feed is None or not feed.enabled or finds_ranges(feed):  # computes in float, or in XNNPACK
            continue
        if is_wide(feed.quantizer):  # no such kernel takes 16 bits
            continue
        written = weights(layer.module)[layer.parameter]
        if not written.enabled or isinstance(written, _Flat):  # which computes in float
            continue
        read = feed.quantize
        assert isinstance(read, QuantizeDequantize)
        if not fits_pairs(written.codes, written.axis, 255 if is_lstm else read.largest):
            found.append(layer.name)
    return found


def _check_inputs(name: str, quantizer: Quantizer, qparams: QParams) -> None:
    """Raise unless an activation's codes are equal steps that 16 bits hold."""
    first, last = ends(quantizer, qparams)
    codes = torch.arange(first, last + 1, dtype=torch.float32)
    if len(codes) > 2**16 or not _in_equal_steps(quantizer, codes, qparams):
        raise ValueError(_simulated_only("inputs", quantizer, name))


def check_convertible(model: nn.Module) -> None:
    """Raise if the scheme that a model was prepared with has no form in integer kernels; before its training, too.

    Raises:
        ValueError: Like :func:`convert`.
    """
    quantization = quantization_of(model)
    for layer in quantization.layers if quantization is not None else []:
        assert quantization is not None
        if is_grouped(layer):
            group_codes(layer)
        else:
            _codes(layer, None, None)
        inputs = quantization.scheme.for_layer(layer.name).inputs
        if inputs is not None:
            _check_inputs(layer.name, inputs, inputs.qparams(torch.tensor(-1.0), torch.tensor(1.0)))


def _in_equal_steps(quantizer: Quantizer, codes: Tensor, qparams: QParams) -> bool:
    scale, zero_point = (along(t, qparams.axis, codes) for t in qparams[:2])
    return torch.allclose(quantizer.dequantize(codes, qparams), (codes - zero_point) * scale, rtol=1e-4, atol=0)


def _simulated_only(field: str, quantizer: Quantizer, name: str) -> str:
    fix = "weight=Affine(8, symmetric=True)" if field == "weight" else "inputs=Affine(8)"
    return (
        f"Scheme.{field}={quantizer!r} has no form in integer kernels at {name}, so it is simulated only: its accuracy "
        f"is that of the PyTorch model, its bytes are those of save_packed. For export take equal steps: {fix}."
    )


def to_float(model: Module) -> Module:
    """A copy that computes in float."""
    model = copy_module(model).cpu().eval()
    quantization = quantization_of(model)
    if quantization is not None:
        quantization.observe(False)
        quantization.enable(False)
    return model


def float_twin(model: Module) -> Module:
    """A copy that ships in float, and that a quantized file is compared with."""
    model = to_float(model)
    store_weights(model)
    return model


@torch.no_grad()
def _codes(layer: Layer, norm: Any, step: float | None) -> tuple[Tensor, Tensor, int]:
    """A weight's codes, scales and their axis, with the norm folded in; step is the scale of the input."""
    fake_quantize = weights(layer.module)[layer.parameter]
    codes, qparams = fake_quantize.codes(layer.multiplied)
    if qparams.zero_point.any() or not _in_equal_steps(fake_quantize.quantizer, codes.float(), qparams):
        raise ValueError(_simulated_only("weight", fake_quantize.quantizer, layer.name))
    scale = qparams.scale.detach()
    axis = qparams.axis
    if axis is None:
        axis = layer.out_axis
        scale = scale.expand(layer.weight.shape[layer.out_axis]).clone()
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
    if layer.axes and isinstance(own_bias, Tensor) and own_bias.shape != floor.shape:  # of something else
        own_bias = None
    if isinstance(own_bias, Tensor) and step is not None:
        # integer kernels hold a bias as 32 bits in steps of both scales: a pruned or faint channel would overflow them
        lowest = own_bias.detach().abs().view(-1, floor.numel()).amax(0) * 2**-30 / step
        floor = torch.maximum(floor, lowest)
    return (codes * (scale / floor).view(shape)).round().to(torch.int8), floor, axis


def _identity_like(norm: nn.Module) -> nn.Module:
    """An identity that keeps the norm's hooks."""
    identity = nn.Identity().eval()
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        for suffix in ("", "_with_kwargs", *(["_always_called"] if hooks == "_forward_hooks" else [])):
            setattr(identity, hooks + suffix, getattr(norm, hooks + suffix))
    return identity


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    old = modules_by_name(model)[name]
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if child is old:
                parent._modules[key] = new
