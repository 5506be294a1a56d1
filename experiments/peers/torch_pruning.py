"""Torch-Pruning (Fang 2023, arXiv:2301.12900): channels of groups of layers, before the training."""

from __future__ import annotations

import torch_pruning as tp
from torch import nn

from experiments.training import Budget, num_macs, train


def _group_magnitude(model: nn.Module, budget: Budget, fewer: float, together: bool) -> nn.Module:
    example = budget.data.x_train[:1]
    macs = num_macs(model, example)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        model, example, importance, together, 0.95, max_pruning_ratio=0.95, iterative_steps=95, ignored_layers=[last]
    )
    for _ in range(95):
        pruner.step()
        if num_macs(model, example) * fewer <= macs:
            break
    return train(model, budget)


def group_magnitude(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """torch-pruning's GroupMagnitude, the same share of every layer, at once; then training."""
    return _group_magnitude(model, budget, fewer, together=False)


def global_group_magnitude(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """The same with all layers ranked together."""
    return _group_magnitude(model, budget, fewer, together=True)
