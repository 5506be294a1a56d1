"""Torch-Pruning (Fang 2023, arXiv:2301.12900): channels of groups of layers, before the training."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch_pruning as tp
from torch import nn

from experiments.tasks import Batches
from experiments.training import Budget, num_macs, train

STEPS, MOST = 95, 0.95  # a per cent of the channels a step; of a layer at most this share goes
ROUND_TO = 4  # as ours: with other numbers of channels depthwise convolutions are slower than before
GRADIENT_BATCHES, GRADIENT_EVERY = 10, 19  # batches whose gradients Taylor scores take, and after how many steps anew

Importance = Callable[..., torch.Tensor | None]


def _no_gradients(step: int) -> None:
    pass


def _narrow(
    model: nn.Module,
    budget: Budget,
    fewer: float,
    importance: Importance,
    together: bool,
    before: Callable[[int], None] = _no_gradients,
) -> None:
    """Takes channels until there are so many times fewer multiplications, and stops within a step."""
    example = budget.data.x_train[:1]
    allowed = num_macs(model, example) / fewer
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    options = {"max_pruning_ratio": MOST, "iterative_steps": STEPS, "ignored_layers": [last], "round_to": ROUND_TO}
    pruner = tp.pruner.BasePruner(model, example, importance, together, MOST, **options)
    for step in range(STEPS):
        before(step)
        for group in pruner.step(interactive=True):
            group.prune()
            if num_macs(model, example) <= allowed:
                return
    raise ValueError(f"{fewer:g}x fewer multiplications are out of reach")


def _gradients(model: nn.Module, budget: Budget) -> Callable[[int], None]:
    """Gradients of the loss over some training batches, now and then; in between they are cut with the weights."""
    task, data = budget.task, budget.data

    def before(step: int) -> None:
        if step % GRADIENT_EVERY:
            return
        model.zero_grad()
        batches = Batches(data.x_train, data.y_train, task.batch_size, budget.seed, task.augment, GRADIENT_BATCHES)
        for x, y in batches:
            task.loss(model.eval()(x), y).backward()

    return before


def group_norm(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """Norms of groups, the same share of every layer, which is the tool's default, at once; then training.

    Its GroupNormPruner, which trains sparsely first, was neither better nor worse on one seed of two tasks.
    """
    _narrow(model, budget, fewer, tp.importance.GroupMagnitudeImportance(p=2), together=False)
    return train(model, budget)


def global_group_norm(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """The same with all layers ranked together."""
    _narrow(model, budget, fewer, tp.importance.GroupMagnitudeImportance(p=2), together=True)
    return train(model, budget)


def group_taylor(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """First-order change of the loss (Molchanov 2019, arXiv:1906.10771), the same share of every layer."""
    _narrow(model, budget, fewer, tp.importance.GroupTaylorImportance(), False, _gradients(model, budget))
    return train(model, budget)


def random_channels(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """Channels drawn at random, the same share of every layer: the floor."""
    torch.manual_seed(budget.seed)
    _narrow(model, budget, fewer, tp.importance.RandomImportance(), together=False)
    return train(model, budget)
