"""Which channels go: the groups' atoms with the lowest scores, within limits; and what that keeps of every tensor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_compress.structure.axes import Axis, leaves_of, place_of
from lightning_compress.structure.dependencies import Followed, Group
from lightning_compress.structure.literals import follow_sizes
from lightning_compress.structure.record import Record, Value, tensors_by_name
from lightning_compress.structure.sizes import sizes_of_module

__all__ = ["Drops", "Limits", "Scope", "drop_fewest", "drop_lowest", "num_channels", "num_parameters", "record_of"]
__all__ += ["dropped_by_leaf", "kept_along", "score_groups"]

Scope = Literal["balanced", "global", "local"]
"""Which channels compete with each other."""

Drops = dict[str, Tensor]
"""By the name of each group, which of its atoms go: one bool per atom."""


def score_groups(groups: Sequence[Group], model: nn.Module, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One score per atom: the mean of the squared scores of its weights, relative to the layer's mean.

    Args:
        groups: The groups.
        model: The model they are of.
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
        round_to: Each group keeps a multiple of this number of channels.
        widths: Channels of the dense groups, by name; without them, those that they have now.
        scope: ``"global"`` ranks all groups together, ``"local"`` each by itself, ``"balanced"`` in between.
        shares: Share of its channels that each group loses, by name; they take the place of a search for a target.
    """

    floor: float = 0.1
    round_to: int = 1
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
        _round(kept[group.name], group.sizes, scores[group.name], limits.round_to)
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
    shared = {group.name for group in groups if len(group.layers) >= _MANY}
    return {name: 0.5 + ranks / 2 if name in shared else ranks for name, ranks in found.items()}


_MANY = 3  # layers that give the same channels: more than a block and its shortcut


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
    for index in torch.cat([scores[group.name] for group in groups]).argsort(stable=True).tolist():
        name, i, size = atoms[index]
        if size <= budget and left[name] - size >= least[name]:
            kept[name][i] = False
            left[name] -= size
            budget -= size
        if budget < 1:
            break


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
    total = sum(int(group.sizes.sum()) for group in groups)
    while (high - low) * total > 0.5:
        middle = (low + high) / 2
        tried = drop_lowest(groups, scores, middle, limits)
        if reached(tried):
            high = middle
            drops = tried
        else:
            low = middle
    return drops, True


def num_channels(groups: Sequence[Group], drops: Drops) -> int:
    """How many channels the groups keep."""
    return sum(int(group.sizes[~drops[group.name]].sum()) for group in groups)


def num_parameters(model: nn.Module, record: Record) -> int:
    """How many parameters of a model a record keeps."""
    total = 0
    seen: set[int] = set()
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) not in seen:
            seen.add(id(p))
            axes = record.kept.get(name, {})
            total += math.prod(len(axes[axis]) if axis in axes else size for axis, size in enumerate(p.shape))
    return total


def kept_along(axis: Axis, dropped: Mapping[Axis, Tensor]) -> Tensor | None:
    """Which positions of an axis are kept when channels go: one bool each; None where that is all of them.

    Args:
        axis: The axis.
        dropped: Which channels go, by their leaf.
    """
    keep: Tensor | None = None
    for leaf in {id(leaf): leaf for leaf in leaves_of(axis)}.values():
        drop = dropped.get(leaf)
        if drop is None or not drop.any():
            continue
        for atoms in place_of(axis, leaf):
            gone = drop[atoms.clamp(min=0)] & (atoms >= 0)
            keep = ~gone if keep is None else keep & ~gone
    return keep


def dropped_by_leaf(groups: Sequence[Group], drops: Drops) -> dict[Axis, Tensor]:
    """Which channels go, by their leaf."""
    return {group.leaf: drops[group.name] for group in groups if group.name in drops and drops[group.name].any()}


def record_of(model: nn.Module, groups: Sequence[Group], drops: Drops) -> Record:
    """What is kept of every tensor, and the attributes that change with it."""
    dropped = dropped_by_leaf(groups, drops)
    if not dropped:
        return Record()
    followed = next(group.followed for group in groups)
    gone: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        drop = dropped.get(group.leaf)
        for place in group.places if drop is not None else ():
            gone[place.name][place.axis].append(place.positions[drop[place.atoms]])  # type: ignore[index]
    kept = _kept(tensors_by_name(model), gone)
    return Record(kept, _attributes(model, followed, kept, dropped))


def _attributes(
    model: nn.Module,
    followed: Followed,
    kept: Mapping[str, Mapping[int, Tensor]],
    dropped: Mapping[Axis, Tensor],
) -> dict[str, dict[str, Value]]:
    """The attributes that say how large axes are, after some have lost channels."""

    def size_after(axis: Axis) -> int:
        keep = kept_along(axis, dropped)
        return axis.size if keep is None else int(keep.sum())

    attributes: dict[str, dict[str, Value]] = defaultdict(dict)
    tensors = tensors_by_name(model)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = {key: f"{prefix}{key}" for key in _own_tensors(module)}
        inputs = followed.inputs.get(name)
        if inputs is None and not any(full in kept for full in own.values()):
            continue
        after = {key: _shape_after(tensors[full], kept.get(full, {})) for key, full in own.items() if full in tensors}
        read = None if inputs is None else tuple(map(size_after, inputs))
        attributes[name] |= sizes_of_module(module, after, read)
    for name, values in follow_sizes(model, followed.uses, size_after).items():
        attributes[name] |= values
    return {name: values for name, values in attributes.items() if values}


def _own_tensors(module: nn.Module) -> list[str]:
    """Names of a module's tensors; of the parts of an attention, and of a parametrization, too."""
    if isinstance(module, nn.MultiheadAttention):
        return [key for key, _ in module.named_parameters()]
    keys = [key for key, x in (*module._parameters.items(), *module._buffers.items()) if x is not None]
    return keys + [key for key, _ in module.named_parameters() if key.startswith("parametrizations.")]


def _shape_after(tensor: Tensor, axes: Mapping[int, Tensor]) -> torch.Size:
    return torch.Size(len(axes[axis]) if axis in axes else size for axis, size in enumerate(tensor.shape))


def _kept(
    tensors: Mapping[str, Tensor], gone: Mapping[str, Mapping[int, Iterable[Tensor]]]
) -> dict[str, dict[int, Tensor]]:
    """The indices that are kept, by tensor and axis."""
    kept: dict[str, dict[int, Tensor]] = {}
    for name, axes in gone.items():
        kept[name] = {}
        for axis, parts in axes.items():
            keep = torch.ones(tensors[name].shape[axis], dtype=torch.bool)
            keep[torch.cat(list(parts))] = False
            kept[name][axis] = keep.nonzero().flatten()
    return kept
