"""Which channels go: the groups' atoms with the lowest scores, within limits; and what that keeps of every tensor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_compress.structure.channels import located
from lightning_compress.structure.groups import Group
from lightning_compress.structure.heads import Attention
from lightning_compress.structure.record import Record, Value, tensors_by_name

__all__ = ["Drops", "Limits", "drop_fewest", "drop_lowest", "num_channels", "num_parameters", "record_of"]
__all__ += ["score_groups"]

Drops = dict[str, Tensor]
"""By the name of each group, which of its atoms go: one bool per atom."""


def score_groups(groups: Sequence[Group], model: nn.Module, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One score per atom: the mean of the squared scores of its weights, relative to the layer's mean.

    Args:
        groups: The groups.
        model: The model they are of.
        scores: A criterion's scores by the name of the weight's tensor, in the weight's shape; higher = keep.
    """
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for group in groups:
        num = int(group.atoms.max()) + 1
        total = torch.zeros(num)
        num_tensors = torch.zeros(num)
        for place in group.places:
            for name, axis, positions, roots in located(place, modules):
                if name not in scores:
                    continue
                values = scores[name].detach().cpu().float()
                # Squared with their signs: a criterion may give negative scores.
                values = (values * values.abs()).transpose(0, axis).flatten(1).mean(1)
                values = values / values.abs().mean().clamp(min=1e-30)
                atoms = group.atoms[roots].expand_as(positions).flatten()
                sums = torch.zeros(num).index_add_(0, atoms, values[positions.flatten()])
                counts = torch.bincount(atoms, minlength=num)
                total += sums / counts.clamp(min=1)
                num_tensors += (counts > 0).float()
        found[group.name] = total / num_tensors.clamp(min=1)
    return found


@dataclass(frozen=True)
class Limits:
    """How far the groups may shrink.

    Args:
        floor: Smallest share of its dense channels that a group keeps.
        round_to: Each group keeps a multiple of this number of channels.
        widths: Channels of the dense groups, by name; without them, those that they have now.
        scope: ``"global"`` ranks all groups together, ``"local"`` each by itself.
        shares: Share of its channels that each group loses, by name; they take the place of a search for a target.
    """

    floor: float = 0.1
    round_to: int = 1
    widths: Mapping[str, int] | None = None
    scope: Literal["global", "local"] = "global"
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
    if limits.scope == "global" and limits.shares is None:
        _drop_from(list(groups), kept, scores, ratio, limits)
    else:
        for group in groups:
            share = 1.0 if limits.shares is None else limits.shares.get(group.name, 0.0)
            _drop_from([group], kept, scores, ratio * share, limits)
    for group in groups:
        _round(kept[group.name], group.sizes, scores[group.name], limits.round_to)
    return {name: ~keep for name, keep in kept.items()}


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


def record_of(model: nn.Module, groups: Sequence[Group], drops: Drops) -> Record:
    """What is kept of every tensor, and the attributes that change with it."""
    modules = dict(model.named_modules())
    gone: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    lost: dict[tuple[str, str], set[int]] = defaultdict(set)
    attributes: dict[str, dict[str, Value]] = defaultdict(dict)
    for group in groups:
        drop = drops.get(group.name)
        if drop is None or not drop.any():
            continue
        for place in group.places:
            chosen = drop[group.atoms[place.roots]]
            if place.side != "raw":
                lost[place.module, place.side].update(place.channels[chosen].tolist())
            for name, axis, positions, _ in located(place, modules):
                gone[name][axis].append(positions[:, chosen].flatten())
        for attention in group.attentions:
            attributes[attention.name] |= _attributes_of_attention(attention, group, drop)
    for (name, side), channels in lost.items():
        for part, changed in _attributes_of_module(modules[name], side, len(channels)).items():
            attributes[f"{name}.{part}".strip(".")] |= changed
    kept = _kept(tensors_by_name(model), gone)
    return Record(kept, {name: values for name, values in attributes.items() if values})


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


def _attributes_of_attention(attention: Attention, group: Group, drop: Tensor) -> dict[str, int]:
    """Changed attributes of a user's attention when a group loses atoms."""
    first = next(place for place in group.places if place.side == "out" and place.module in attention.layers)
    num_channels = len(first.channels[drop[group.atoms[first.roots]]].unique())
    num_lost = num_channels // (attention.head_dim * attention.layers[first.module])
    left = attention.num_heads - num_lost
    return dict.fromkeys(attention.attributes, left) | dict.fromkeys(attention.sizes, left * attention.head_dim)


def _attributes_of_module(module: nn.Module, side: str, lost: int) -> dict[str, Mapping[str, Value]]:
    """Changed attributes of a module and of its parts when one side loses channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == module.in_channels == module.out_channels and module.groups > 1:
            return {"": dict.fromkeys(("in_channels", "out_channels", "groups"), module.groups - lost)}
        return _less(module, f"{side}_channels", lost)
    if isinstance(module, nn.Linear):
        return _less(module, f"{side}_features", lost)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"": {"normalized_shape": (*module.normalized_shape[:-1], module.normalized_shape[-1] - lost)}}
    if isinstance(module, nn.MultiheadAttention):
        dim = module.embed_dim - lost
        own: dict[str, Value] = {"embed_dim": dim, "kdim": dim, "vdim": dim, "num_heads": dim // module.head_dim}
        return {"": own, "out_proj": {"in_features": dim, "out_features": dim}}
    for key in ("num_features", "num_channels", "embedding_dim", "num_parameters"):
        if key in vars(module):
            return _less(module, key, lost)
    return {}


def _less(module: nn.Module, key: str, lost: int) -> dict[str, Mapping[str, Value]]:
    return {"": {key: vars(module)[key] - lost}}
