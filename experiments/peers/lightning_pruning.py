"""Lightning's own ModelPruning."""

from __future__ import annotations

from dataclasses import replace

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from experiments.training import WEIGHTED, Budget, fit

RAMP = 0.5  # the mask grows over this share of the epochs
EPOCHS = 5  # of a budget of one epoch: the callback prunes at the end of each, and weights must recover


def model_pruning(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Lightning's ModelPruning with a callable amount: cubic over half of the epochs, at the end of each.

    One epoch of so many steps becomes five of a fifth: as many steps, of batches in another order.
    """
    if budget.epochs == 1 and budget.task.most_batches:
        task = replace(budget.task, most_batches=budget.task.most_batches // EPOCHS)
        budget = replace(budget, task=task, epochs=EPOCHS)
    num_prunes = max(1, round(RAMP * budget.epochs))
    shares = [sparsity * (1 - (1 - i / num_prunes) ** 3) for i in range(num_prunes + 1)]

    def amount(epoch: int) -> float:  # of what is left, as ModelPruning compounds
        return 1 - (1 - shares[epoch + 1]) / (1 - shares[epoch]) if epoch < num_prunes else 0.0

    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # it takes no other
    layers = [(module, "weight") for module in model.modules() if isinstance(module, WEIGHTED)]
    callback = ModelPruning(
        "l1_unstructured", layers, amount=amount, use_global_unstructured=True, use_lottery_ticket_hypothesis=False
    )
    return fit(model, budget, [callback])
