"""torch.nn.utils.prune: masks as hooks, at once."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

from experiments.training import WEIGHTED, Budget, train


def one_shot(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """torch.nn.utils.prune at once, then training."""
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # it takes no other
    layers = [(module, "weight") for module in model.modules() if isinstance(module, WEIGHTED)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    train(model, budget)
    for module, name in layers:
        prune.remove(module, name)
    return model
