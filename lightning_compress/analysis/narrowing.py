"""A way from the dense model to a narrow one, channel group by channel group, cheapest accuracy first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers import PRUNABLE, find_layers
from lightning_compress.pruning.coupling import Group, couple
from lightning_compress.pruning.plan import Limits, choose, prove_groups, record_of, score_groups
from lightning_compress.pruning.surgery import apply_record

__all__ = ["Point", "narrowing"]

_FREE = 1e-3  # a drop below this is as good as none: what one image in a thousand makes


@dataclass(frozen=True)
class Point:
    """A model between dense and narrow.

    Args:
        shares: Share of the channels that each group loses, by the name of its first layer.
        cost: What is left of the cost.
        drop: Sum of what the groups lose of the metric, each alone and without retraining.
    """

    shares: Mapping[str, float]
    cost: float
    drop: float


@torch.no_grad()
def narrowing(
    model: nn.Module,
    forward: Callable[[nn.Module], Any],
    evaluate: Callable[[nn.Module], float],
    cost: Callable[[nn.Module], float],
    *,
    levels: Sequence[float] = (0.25, 0.5, 0.625, 0.75, 0.8125, 0.875),
    more_is_better: bool = True,
) -> list[Point]:
    """Which groups of channels to narrow in turn: each step is the one that saves most for what it costs.

    First every group alone is narrowed to every level and the metric measured, without retraining. Then greedily the
    step with the highest saving of cost a lost metric is taken, until all groups are as narrow as they can be.

    Args:
        model: In eval mode on the CPU, in float32; it is not touched.
        forward: Calls a model on an example.
        evaluate: The metric of a model.
        cost: What a model costs: parameters, multiply-accumulates.
        levels: Shares of a group's channels that may go, rising.
        more_is_better: Whether a lower metric is worse.

    Returns:
        The points of the way, the dense model first.

    Raises:
        ValueError: If no channels can be removed.
    """
    coupling = prove_groups(model, forward, couple(copy.deepcopy(model), forward, (), (), {}, {}), Limits())
    if not coupling.groups:
        raise ValueError(f"The model has no channels that can be removed: {coupling.skipped}.")
    groups = {group.name: group for group in coupling.groups}
    scores = score_groups(coupling.groups, model, _magnitudes(model))

    def narrow(shares: Mapping[str, float]) -> nn.Module:
        smaller = copy.deepcopy(model)
        drops = choose(coupling.groups, scores, 1.0, Limits(floor=0.0, shares=shares))
        apply_record(smaller, record_of(model, coupling.groups, drops))
        return smaller

    dense, sign = evaluate(model), 1 if more_is_better else -1
    lost = {
        (name, level): max(0.0, sign * (dense - evaluate(narrow({name: level}))))
        for name, group in groups.items()
        for level in _within(group, levels)
    }
    points = [Point({}, cost(model), 0.0)]
    while True:
        now, best = points[-1], None
        for name, group in groups.items():
            level = next((x for x in _within(group, levels) if x > now.shares.get(name, 0.0)), None)
            if level is None:
                continue
            shares = {**now.shares, name: level}
            left = cost(narrow(shares))
            more = lost[name, level] - lost.get((name, now.shares.get(name, 0.0)), 0.0)
            worth = (now.cost - left) / max(more, _FREE)
            if best is None or worth > best[0]:
                best = worth, Point(shares, left, now.drop + max(more, 0.0))
        if best is None:
            return points
        points.append(best[1])


def _within(group: Group, levels: Sequence[float]) -> list[float]:
    """The levels that leave a channel, and differ in what they leave."""
    found: dict[int, float] = {}
    for level in levels:
        num = int(level * int(group.sizes.sum()) + 1e-6)
        if 0 < num < int(group.sizes.sum()):
            found.setdefault(num, level)
    return list(found.values())


def _magnitudes(model: nn.Module) -> dict[str, Tensor]:
    layers, _ = find_layers(model, PRUNABLE, skip_tied=True)
    ours = {id(layer.weight) for layer in layers}
    return {name: p.abs() for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ours}
