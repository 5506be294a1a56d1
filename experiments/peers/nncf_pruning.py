"""NNCF's magnitude pruning: all layers ranked together, along its exponential schedule, then masks are folded in."""

from __future__ import annotations

import nncf
import torch
from nncf.torch.function_hook.pruning.magnitude.schedulers import ExponentialMagnitudePruningScheduler
from torch import nn

from experiments.peers.around import Around
from experiments.training import Budget, train

RAMP, EVERY = 0.5, 5  # the mask grows over this share of the steps, every so many
MODE = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL


def magnitude(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Its schedule counts epochs; here it is asked every few steps, since a budget may be one epoch.

    Weights that lie channels last it (3.4) does not take.
    """
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # what it adds to a Sequential would be called as one more layer
    pruned = nncf.prune(Around(model), mode=MODE, ratio=0.0, examples_inputs=budget.data.x_train[:1])
    last = max(1, int(RAMP * budget.num_steps) // EVERY)
    schedule = ExponentialMagnitudePruningScheduler(
        pruned, mode=MODE, initial_ratio=0.0, target_ratio=sparsity, target_epoch=last
    )

    def before(step: int, num_steps: int) -> None:
        if step % EVERY == 0 and step // EVERY <= last:
            schedule.step(step // EVERY)

    train(pruned, budget, before=before)
    folded: nn.Module = nncf.strip(pruned, do_copy=False, strip_format=nncf.StripFormat.IN_PLACE)
    return folded
