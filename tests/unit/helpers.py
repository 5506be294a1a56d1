"""What several unit tests need: seeded tensors, a traced model, a quantized model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.model import ModelQuantization, quantize_layers
from lightning_compress.quantization.placement import Placement, find_placement
from lightning_compress.quantization.schemes import Scheme, int8
from lightning_compress.watch import Watch


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with seeded weights, and batch norms that are far from an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() > 1 else 0.2))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.weight is not None:
                    module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                if module.running_mean is not None:
                    module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
                    module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def quantized_names(quantization: ModelQuantization) -> set[str]:
    return {layer.module_name for layer in quantization.layers}


def trace(model: nn.Module, *inputs: Any, scheme: Scheme | None = None) -> Placement:
    """Where activations of the model are quantized."""
    names = quantized_names(quantize_layers(model, scheme or int8()))
    with torch.no_grad(), Watch(model) as watch:
        model(*inputs)
    return find_placement(watch.trace, model, names)


def quantize(model: nn.Module, *inputs: Any, scheme: Scheme | None = None) -> ModelQuantization:
    """Quantize a model in eval mode, in place, with the ranges of one batch."""
    model.eval()
    quantization = quantize_layers(model, scheme or int8())
    quantization.place(model, trace(model, *inputs))
    quantization.observe(True)
    run(model, *inputs)
    quantization.observe(False)
    quantization.enable(True)
    return quantization


def run(model: nn.Module, *inputs: Any) -> Any:
    with torch.no_grad():
        return model(*inputs)


def largest_difference(a: Any, b: Any) -> float:
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)
