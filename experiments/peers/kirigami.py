"""torch-kirigami: channels by the magnitudes of their groups, before the training."""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn
from torch_kirigami import DependencyGraph
from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner

from experiments.training import Budget, num_macs, train

PROBES, NEAR = 6, 0.05  # shares that are tried, each on a copy; how far below what is allowed is near enough

_found: dict[tuple[str, int, int, float], float] = {}  # shares by dense model, whose weights they depend on


def _narrowed(model: nn.Module, example: Tensor, share: float) -> nn.Module:
    model = copy.deepcopy(model).eval()
    pruner = Pruner(model, graph=DependencyGraph.build(model, args=(example,)))
    candidates = pruner.discover_candidates()
    narrowed, _ = pruner.prune(
        candidates, budget=ChannelRatio(share, scope="global"), strategy=Greedy(GroupMagnitude(p=2))
    )
    return narrowed


def _share(model: nn.Module, example: Tensor, fewer: float) -> float:
    """The least share that leaves so many times fewer multiplications, by halving what is left of the doubt."""
    allowed = num_macs(model, example) / fewer
    low, high, best = 0.0, 1.0, math.nan
    share = 1 - fewer**-0.5
    for _ in range(PROBES):
        macs = num_macs(_narrowed(model, example, share), example)
        if macs <= allowed:
            best, high = share, share
            if macs > (1 - NEAR) * allowed:
                break
        else:
            low = share
        # multiplications go with the square of the channels that are left; aimed at the middle of what is near enough
        guess = 1 - (1 - share) * ((1 - NEAR / 2) * allowed / macs) ** 0.5
        share = guess if low < guess < high else (low + high) / 2
    if math.isnan(best):
        raise ValueError(f"{fewer:g}x fewer multiplications are out of reach")
    return best


def group_magnitude(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """Its quick start's strategy over all layers together, at once; then training."""
    example = budget.data.x_train[:2]
    key = budget.task.name, budget.seed, len(budget.data.y_train), fewer
    if key not in _found:
        _found[key] = _share(model, example, fewer)
    return train(_narrowed(model, example, _found[key]), budget)
