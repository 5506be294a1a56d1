"""What a model holds, layer by layer: weights, zeros, bits, multiplications, bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.analysis.report import LayerRow
from lightning_compress.forward import Inputs, fitting_batch, run_model
from lightning_compress.layers import EMBEDDING, QUANTIZABLE, Layer, find_layers
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.model import quantization_of

__all__ = [
    "count_macs",
    "describe",
    "estimate_bytes",
    "layer_table",
    "mean_bits",
    "sparsity",
    "weight_bits",
    "weight_layers",
]


def weight_layers(model: nn.Module) -> list[Layer]:
    """The weights that count in a sparsity: of every known kind of layer but embeddings, each once."""
    layers, _ = find_layers(model, QUANTIZABLE, skip_tied=True)
    return [layer for layer in layers if not isinstance(layer.module, EMBEDDING)]


def sparsity(layers: Iterable[Layer]) -> float:
    """Share of the layers' weights that is zero."""
    total = zeros = 0
    for layer in layers:
        total += layer.weight.numel()
        zeros += layer.weight.numel() - int(torch.count_nonzero(layer.weight.detach()))
    return zeros / max(1, total)


def weight_bits(layer: Layer) -> int:
    """Bits of the values that a layer computes with."""
    quantizer = weights(layer.module).get(layer.parameter)
    return quantizer.quantizer.bits if quantizer is not None and quantizer.enabled else layer.weight.element_size() * 8


def mean_bits(layers: Iterable[Layer]) -> float:
    """Bits of a weight, over all weights of the layers."""
    sizes = [(layer.weight.numel(), weight_bits(layer)) for layer in layers]
    return sum(num * bits for num, bits in sizes) / max(1, sum(num for num, _ in sizes))


@contextmanager
def _untrained(model: nn.Module) -> Iterator[None]:
    """Without gradients for its parameters: torch's counter expects a history of those that are passed to modules."""
    trained = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def count_macs(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Multiply-accumulates of one sample by module name, "" for the whole model; zeros count like other weights.

    Counted by torch's FlopCounterMode (a fused multiply-add is two operations there); recurrent layers, which it does
    not know, are counted from their weights and the sequence length.
    """
    one = fitting_batch(model, inputs, 1)
    recurrent: dict[str, int] = {}
    handles = [
        module.register_forward_hook(_recurrent_counter(name, recurrent), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase)
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad(), _untrained(model), sdpa_kernel(SDPBackend.MATH):  # whose products are known
            run_model(model, one)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
    root = type(model).__name__
    macs = {
        name.removeprefix(root).removeprefix("."): int(sum(ops.values())) // 2
        for name, ops in counter.get_flop_counts().items()
        if name == root or name.startswith(root + ".")
    }
    macs[""] = int(counter.get_total_flops()) // 2
    for name, count in recurrent.items():
        if not macs.get(name):
            macs[name] = count
            macs[""] += count
    return macs


def _recurrent_counter(name: str, found: dict[str, int]) -> Any:
    def hook(module: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        x = args[0] if args else kwargs["input"]
        length = x.shape[1 if module.batch_first else 0] if isinstance(x, torch.Tensor) else len(x.batch_sizes)
        num_weights = sum(p.numel() for key, p in module._parameters.items() if p is not None and "weight" in key)
        found[name] = found.get(name, 0) + length * num_weights

    return hook


def layer_table(model: nn.Module, macs: dict[str, int] | None = None) -> list[LayerRow]:
    """One row per weight."""
    quantization = quantization_of(model)
    on = quantization is not None and quantization.enabled
    inputs = next((a.quantizer.bits for a in quantization.activations.values()), 32) if on and quantization else 32
    rows: list[LayerRow] = []
    for layer in find_layers(model, QUANTIZABLE, skip_tied=True)[0]:
        weight = layer.weight.detach()
        bits = weight_bits(layer)
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        rows.append(
            {
                "name": layer.name,
                "type": getattr(type(layer.module), "_base", type(layer.module)).__name__,
                "num_params": weight.numel(),
                "sparsity": zeros / max(1, weight.numel()),
                "weight_bits": bits,
                "input_bits": inputs if bits < 32 and not isinstance(layer.module, EMBEDDING) else 32,
                "macs": (macs or {}).get(layer.module_name),
                "bytes": _bytes(weight.numel(), zeros, bits),
            }
        )
    return rows


def estimate_bytes(model: nn.Module) -> int:
    """Bytes of the model if each weight took its bits and zeros took a bit each: what packing can reach."""
    rows = layer_table(model)
    weights_in_layers = sum(row["num_params"] for row in rows)
    others = sum(p.numel() for p in model.parameters()) - weights_in_layers
    return sum(row["bytes"] for row in rows) + 4 * max(0, others)


def _bytes(num: int, zeros: int, bits: int) -> int:
    dense = num * bits
    packed = num + (num - zeros) * bits
    return math.ceil(min(dense, packed) / 8)


def describe(model: nn.Module, macs: dict[str, int] | None = None) -> dict[str, Any]:
    """Totals of a model: num_params, num_nonzero, sparsity, macs."""
    parameters = [p.detach() for p in model.parameters()]
    return {
        "num_params": sum(p.numel() for p in parameters),
        "num_nonzero": sum(int(torch.count_nonzero(p)) for p in parameters),
        "sparsity": sparsity(weight_layers(model)),
        "macs": (macs or {}).get(""),
    }
