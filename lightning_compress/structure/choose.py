"""Which channels go: the groups' atoms with the lowest scores, within limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.structure.dependencies import Group

__all__ = ["Drops", "Limits", "Scope", "drop_fewest", "drop_lowest", "num_channels", "score_groups"]

Scope = Literal["balanced", "global", "local"]
"""Which channels compete with each other."""

Drops = dict[str, Tensor]
"""By the name of each group, which of its atoms go: one bool per atom."""


def score_groups(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One score per atom: the mean of the squared scores of its weights, relative to the layer's mean.

    Args:
        groups: The groups.
        scores: A criterion's scores by the name of the weight's tensor, in the weight's shape; higher = keep.
    """
    found: dict[str, Tensor] = {}
    relative = {name: _relative(values) for name, values in scores.items()}
    for group in groups:
        num = len(group.sizes)
        total = torch.zeros(num)
        num_tensors = torch.zeros(num)
        for place in group.places:
            if place.name not in relative:
                continue
            values = relative[place.name].transpose(0, place.axis).flatten(1).mean(1)
            values = values / values.abs().mean().clamp(min=1e-30)
            sums = torch.zeros(num).index_add_(0, place.atoms, values[place.positions])
            counts = torch.bincount(place.atoms, minlength=num)
            total += sums / counts.clamp(min=1)
            num_tensors += (counts > 0).float()
        found[group.name] = total / num_tensors.clamp(min=1)
    return found


def _relative(values: Tensor) -> Tensor:
    """Scores squared with their signs: a criterion may give negative ones."""
    values = values.detach().cpu().float()
    return values * values.abs()


@dataclass(frozen=True)
class Limits:
    """How far the groups may shrink.

    Args:
        floor: Smallest share of its dense channels that a group keeps.
        round_to: Each group keeps a multiple of this number of channels; None for that of its block, unless it has a
            share of its own to lose.
        widths: Channels of the dense groups, by name; without them, those that they have now.
        scope: ``"global"`` ranks all groups together, ``"local"`` each by itself, ``"balanced"`` in between.
        shares: Share of its channels that each group loses, by name; they take the place of a search for a target.
    """

    floor: float = 0.1
    round_to: int | None = 1
    widths: Mapping[str, int] | None = None
    scope: Scope = "global"
    shares: Mapping[str, float] | None = None


def drop_lowest(groups: Sequence[Group], scores: Mapping[str, Tensor], ratio: float, limits: Limits) -> Drops:
    """Drop the atoms with the lowest scores, up to a ratio of all channels; no group is emptied.

    Args:
        groups: The groups.
        scores: One score per atom, by the name of the group.
        ratio: Share of the channels to drop, 0..1.
        limits: How far the groups may shrink.
    """
    kept = {group.name: torch.ones(len(group.sizes), dtype=torch.bool) for group in groups}
    if limits.scope == "balanced":
        scores = _balanced(groups, scores)
    if limits.scope != "local" and limits.shares is None:
        _drop_from(list(groups), kept, scores, ratio, limits)
    else:
        for group in groups:
            share = 1.0 if limits.shares is None else limits.shares.get(group.name, 0.0)
            _drop_from([group], kept, scores, ratio * share, limits)
    for group in groups:
        step = group.leaf.step * int(group.sizes[0])
        block = 1 if limits.shares is not None else group.block
        round_to = block if limits.round_to is None else limits.round_to
        _round(kept[group.name], group.sizes, scores[group.name], math.lcm(round_to, step))
    return {name: ~keep for name, keep in kept.items()}


def _balanced(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores by which groups lose about as much as each other, and the widest used of them last.

    The mean of an atom's rank in its group and of its rank among all, both 0..1: no group is hollowed out because
    another one's scores are a little higher. What many layers share, such as the width of a residual stream, costs
    all of them with each channel, and ranks behind the lower half of the others.
    """
    if not groups:
        return {}
    together = torch.cat([scores[group.name] for group in groups])
    of_all = dict(zip([group.name for group in groups], _ranks(together).split([*map(_num, groups)]), strict=True))
    found = {group.name: (_ranks(scores[group.name]) + of_all[group.name]) / 2 for group in groups}
    shared = {group.name for group in groups if _is_shared(group)}
    return {name: 0.5 + ranks / 2 if name in shared else ranks for name, ranks in found.items()}


_MANY = 3  # layers that give the same channels: more than a block and its shortcut


def _is_shared(group: Group) -> bool:
    """Whether many layers give its channels, and several read them: queries, keys and values are read by one."""
    axes = {(place.name, place.axis) for place in group.places if len(group.followed.named[place.name]) > 1}
    return len(group.layers) >= _MANY and len(axes) - len(group.layers) > 1


def _num(group: Group) -> int:
    return len(group.sizes)


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value, 0..1, of equal ones in their order."""
    order = values.argsort(stable=True)
    ranks = torch.empty(len(values))
    ranks[order] = (torch.arange(len(values)) + 0.5) / max(len(values), 1)
    return ranks


def _drop_from(
    groups: Sequence[Group], kept: Mapping[str, Tensor], scores: Mapping[str, Tensor], ratio: float, limits: Limits
) -> None:
    """Clear the atoms of groups that are ranked together in what is kept."""
    if not groups:
        return
    atoms = [(group.name, i, size) for group in groups for i, size in enumerate(group.sizes.tolist())]
    left = {group.name: int(group.sizes.sum()) for group in groups}
    widths = {**left, **(limits.widths or {})}
    # Less 1e-6 here, plus 1e-6 below: in floating point 0.07 * 100 is a little more than 7.
    least = {name: max(1, math.ceil(limits.floor * widths[name] - 1e-6)) for name in left}
    budget = ratio * sum(left.values()) + 1e-6
    gone: dict[str, list[int]] = {name: [] for name in left}
    for index in torch.cat([scores[group.name] for group in groups]).argsort(stable=True).tolist():
        name, i, size = atoms[index]
        if size <= budget and left[name] - size >= least[name]:
            gone[name].append(i)  # in a list: writing into a tensor is slow
            left[name] -= size
            budget -= size
        if budget < 1:
            break
    for name, some in gone.items():
        kept[name][some] = False


def _round(keep: Tensor, sizes: Tensor, scores: Tensor, round_to: int) -> None:
    """Take the best dropped atoms back until the channels kept are a multiple."""
    if round_to > 1:
        for _, i in sorted((-float(scores[i]), i) for i in (~keep).nonzero().flatten().tolist()):
            if int(sizes[keep].sum()) % round_to == 0:
                break
            keep[i] = True


def drop_fewest(
    groups: Sequence[Group], scores: Mapping[str, Tensor], limits: Limits, reached: Callable[[Drops], bool]
) -> tuple[Drops, bool]:
    """Drop the fewest channels that reach a target, by bisection; as many as the limits allow where none reach it.

    Args:
        groups: The groups.
        scores: One score per atom, by the name of the group.
        limits: How far the groups may shrink.
        reached: Says whether a choice reaches the target.

    Returns:
        What is dropped, and whether that reaches the target.
    """
    drops = drop_lowest(groups, scores, 1.0, limits)
    if limits.shares is not None:
        return drops, True
    if not reached(drops):
        return drops, False
    low = 0.0
    high = 1.0
    fewer = {name: torch.zeros_like(dropped) for name, dropped in drops.items()}
    total = sum(int(group.sizes.sum()) for group in groups)
    while (high - low) * total > 0.5:
        middle = (low + high) / 2
        tried = drop_lowest(groups, scores, middle, limits)
        if reached(tried):
            high = middle
            drops = tried
        else:
            low = middle
            fewer = tried
    return _give_back(drops, fewer, scores, reached), True


_TRIES = 16  # each may be a measurement


def _give_back(drops: Drops, fewer: Drops, scores: Mapping[str, Tensor], reached: Callable[[Drops], bool]) -> Drops:
    """What the last step took beyond the target, best channels first.

    One more step of the ratio takes a channel, or a block of them, of many groups at once: some of these can stay.

    Args:
        drops: A choice that reaches the target.
        fewer: The next one that does not.
        scores: One score per atom, by the name of the group.
        reached: Says whether a choice reaches the target.
    """
    best = {
        name: float(scores[name][taken].max())
        for name in drops
        if (taken := drops[name] & ~fewer[name]).any() and not (fewer[name] & ~drops[name]).any()
    }
    parts = [sorted(best, key=lambda name: -best[name])]
    for _ in range(_TRIES):
        if not parts:
            break
        names = parts.pop(0)
        tried = {**drops, **{name: fewer[name] for name in names}}
        if reached(tried):
            drops = tried
        elif len(names) > 1:
            middle = len(names) // 2
            parts[:0] = [names[:middle], names[middle:]]
    return drops


def num_channels(groups: Sequence[Group], drops: Drops) -> int:
    """How many channels the groups keep."""
    return sum(int(group.sizes[~drops[group.name]].sum()) for group in groups)
