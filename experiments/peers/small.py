"""Small dense models: narrower ones, trained from scratch for as long as dense and compressed training together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from experiments.training import Budget, num_macs, train, weights_of

__all__ = ["as_many_bytes", "as_many_macs", "as_many_weights"]


def _small(budget: Budget, share: float, size: Callable[[nn.Module], int]) -> nn.Module:
    """The widest model of at most that share of the whole one's size."""
    task = budget.task
    if task.weights is not None:
        raise ValueError("its dense model was trained for longer than this budget: a small one would only be untrained")
    torch.manual_seed(budget.seed)
    allowed = share * size(task.build())
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if size(task.build(middle)) <= allowed else (low, middle)
    epochs = task.epochs + task.compress_epochs
    # the middle one of the factors that a kind of point is tuned with is half of the dense training's rate
    rate = task.learning_rate * budget.rate / task.compress_rate
    return train(task.build(low), replace(budget, epochs=epochs, rate=rate))


def as_many_weights(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """No more weights than pruning leaves."""
    small = replace(budget, rate=budget.rate / 4)
    return _small(small, 1 - sparsity, lambda net: sum(w.numel() for w in weights_of(net)))


def as_many_macs(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """No more multiplications."""
    example = budget.data.x_train[:1]
    return _small(replace(budget, rate=budget.rate / 4), 1 / fewer, lambda net: num_macs(net, example))


def as_many_bytes(model: nn.Module, budget: Budget, bits: float) -> nn.Module:
    """As many bytes in float as weights of so many bits take."""
    small = replace(budget, rate=budget.rate / 2)
    return _small(small, bits / 32, lambda net: sum(w.numel() for w in weights_of(net)))
