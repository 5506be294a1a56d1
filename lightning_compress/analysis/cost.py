"""What a model costs by arithmetic, before any file is written: good enough to rank what to give up next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from lightning_compress.analysis.allocation import Allocation
from lightning_compress.layers import QUANTIZABLE, find_layers

__all__ = ["file_bytes"]


def file_bytes(
    model: nn.Module, plan: Allocation, bits: int, stored: Sequence[int] = (), compressed: bool = False
) -> float:
    """Bytes of a model's file, without its graph.

    Args:
        model: In the shape that the plan gives it.
        plan: Bits and sparsities of its layers.
        bits: Bits of the weights of the other layers.
        stored: Bits that the format can store a weight in; a weight takes the fewest that hold it.
        compressed: Count what an entropy coder leaves of the weights: a zero costs next to nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(100, 10, bias=False))
        >>> file_bytes(net, Allocation(bits={"0": 3}), 8, stored=(8, 4))
        500.0
        >>> round(file_bytes(net, Allocation(sparsities={"0": 0.9}), 8, compressed=True))
        159
    """
    layers, _ = find_layers(model, QUANTIZABLE, skip_tied=True)
    total = 4.0 * sum(p.numel() for p in model.parameters())
    for layer in layers:
        num = layer.weight.numel()
        width = plan.bits.get(layer.name, bits)
        held = min((b for b in stored if b >= width), default=width)
        each = _entropy(plan.sparsities.get(layer.name, 0.0), width) if compressed else held
        total += num * each / 8 - 4.0 * num
    return total


def _entropy(sparsity: float, bits: int) -> float:
    """Bits of a weight that is zero with a probability, and else any of its codes."""
    parts = [p for p in (sparsity, 1 - sparsity) if p > 0]
    return (1 - sparsity) * bits - sum(p * math.log2(p) for p in parts)
