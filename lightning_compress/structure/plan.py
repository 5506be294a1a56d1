"""Which channels of a model to remove: planned and proven on copies, written down as a record."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.structure.channels import located, plain_name
from lightning_compress.structure.groups import Coupling, Forward, Group, tracing
from lightning_compress.structure.heads import Attention
from lightning_compress.structure.record import Record, apply_record, tensors_by_name

__all__ = ["Drops", "Limits", "choose", "num_channels", "num_parameters", "prove", "prove_groups", "record_of"]
__all__ += ["plan", "score_groups", "search"]

Drops = dict[str, Tensor]
"""For every group, by name, which of its atoms go."""


def score_groups(groups: Sequence[Group], model: nn.Module, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One score an atom: the mean of the squared scores of its weights, relative to the layer's mean.

    Args:
        groups: The groups.
        model: The model they are of.
        scores: A criterion's scores by the name of the weight's tensor, in the weight's shape; higher = keep.
    """
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for group in groups:
        num = int(group.atoms.max()) + 1
        total, weight = torch.zeros(num), torch.zeros(num)
        for place in group.places:
            for name, axis, positions, roots in located(place, modules):
                if name not in scores:
                    continue
                values = scores[name].detach().cpu().float()
                values = (values * values.abs()).transpose(0, axis).flatten(1).mean(1)
                values = values / values.abs().mean().clamp(min=1e-30)
                atoms = group.atoms[roots].expand_as(positions).flatten()
                sums = torch.zeros(num).index_add_(0, atoms, values[positions.flatten()])
                counts = torch.bincount(atoms, minlength=num)
                total += sums / counts.clamp(min=1)
                weight += (counts > 0).float()
        found[group.name] = total / weight.clamp(min=1)
    return found


@dataclass(frozen=True)
class Limits:
    """How far a group may shrink.

    Args:
        floor: Share of the channels that a group keeps at least.
        round_to: The number of channels kept is a multiple of this.
        widths: Channels that the groups had when they were dense, by name.
        scope: ``"global"`` ranks all groups together, ``"local"`` each for itself.
        shares: Share of its channels that each group loses, by name; then nothing is searched for.
    """

    floor: float = 0.1
    round_to: int = 1
    widths: Mapping[str, int] | None = None
    scope: Literal["global", "local"] = "global"
    shares: Mapping[str, float] | None = None


def choose(groups: Sequence[Group], scores: Mapping[str, Tensor], ratio: float, limits: Limits) -> Drops:
    """Drop the atoms with the lowest scores, about a ratio of all channels, and empty no group."""
    sizes = {group.name: group.sizes for group in groups}
    kept = {group.name: torch.ones(len(sizes[group.name]), dtype=torch.bool) for group in groups}
    together = limits.scope == "global" and limits.shares is None
    scopes = [list(groups)] if together else [[group] for group in groups]
    for members in filter(None, scopes):
        atoms = [(group.name, i, size) for group in members for i, size in enumerate(sizes[group.name].tolist())]
        left = {group.name: int(sizes[group.name].sum()) for group in members}
        widths = {**left, **(limits.widths or {})}
        least = {name: max(1, math.ceil(limits.floor * widths[name] - 1e-6)) for name in left}
        share = 1.0 if limits.shares is None else limits.shares.get(members[0].name, 0.0)
        budget = ratio * share * sum(left.values()) + 1e-6
        for index in torch.cat([scores[group.name] for group in members]).argsort(stable=True).tolist():
            name, i, size = atoms[index]
            if size <= budget and left[name] - size >= least[name]:
                kept[name][i] = False
                left[name] -= size
                budget -= size
            if budget < 1:
                break
    for group in groups:
        _round(kept[group.name], sizes[group.name], scores[group.name], limits.round_to)
    return {name: ~keep for name, keep in kept.items()}


def _round(keep: Tensor, sizes: Tensor, scores: Tensor, round_to: int) -> None:
    """Take the best dropped atoms back until the channels kept are a multiple."""
    if round_to > 1:
        for _, i in sorted((-float(scores[i]), i) for i in (~keep).nonzero().flatten().tolist()):
            if int(sizes[keep].sum()) % round_to == 0:
                break
            keep[i] = True


def search(
    groups: Sequence[Group], scores: Mapping[str, Tensor], limits: Limits, reached: Callable[[Drops], bool]
) -> tuple[Drops, bool]:
    """The fewest channels with which a target is reached, by bisection; the most that may go where it is not.

    Args:
        groups: The groups.
        scores: A score for every atom of each.
        limits: How far they may shrink.
        reached: Whether enough would be removed.

    Returns:
        What is dropped, and whether that reaches the target.
    """
    drops = choose(groups, scores, 1.0, limits)
    if limits.shares is not None or not reached(drops):
        return drops, limits.shares is not None
    low, high = 0.0, 1.0
    total = sum(int(group.sizes.sum()) for group in groups)
    while (high - low) * total > 0.5:
        middle = (low + high) / 2
        tried = choose(groups, scores, middle, limits)
        if reached(tried):
            high, drops = middle, tried
        else:
            low = middle
    return drops, True


def plan(
    model: nn.Module,
    forward: Forward,
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    limits: Limits,
    reached: Callable[[Drops, Record], bool],
) -> tuple[Record, Drops, bool]:
    """The record that reaches a target, proven; groups that fail are left alone and named in ``coupling.skipped``.

    Args:
        model: The model, in float32.
        forward: Calls a model and gives its outputs.
        coupling: Its groups.
        scores: A criterion's scores by the name of the weight's tensor.
        limits: How far the groups may shrink.
        reached: Whether enough would be removed.

    Returns:
        The record, what it drops, and whether that reaches the target.
    """
    groups = coupling.groups
    values = score_groups(groups, model, scores)
    while True:
        drops, enough = search(groups, values, limits, partial(_reached, model, groups, reached))
        record = record_of(model, groups, drops)
        if not record["kept"] or prove(model, forward, record) is None:
            return record, drops, enough
        alone = {group.name: prove(model, forward, record_of(model, [group], drops)) for group in groups}
        if not any(alone.values()):
            alone[groups[-1].name] = "it cannot shrink together with the others"
        for group in groups:
            if (why := alone[group.name]) is not None:
                coupling.skipped.update(dict.fromkeys(map(plain_name, group.layers), why))
        coupling.groups[:] = groups = [group for group in groups if alone[group.name] is None]


def _reached(model: nn.Module, groups: Sequence[Group], reached: Callable[[Drops, Record], bool], drops: Drops) -> bool:
    return reached(drops, record_of(model, groups, drops))


def num_channels(groups: Sequence[Group], drops: Drops) -> int:
    """Channels of the groups that are left."""
    return sum(int(group.sizes[~drops[group.name]].sum()) for group in groups)


def num_parameters(model: nn.Module, record: Record) -> int:
    """Parameters that a record leaves of a model."""
    total, seen = 0, set()
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) not in seen:
            seen.add(id(p))
            axes = record["kept"].get(name, {})
            total += math.prod(len(axes[axis]) if axis in axes else size for axis, size in enumerate(p.shape))
    return total


# channels, heads and attributes of one record
def record_of(model: nn.Module, groups: Sequence[Group], drops: Drops) -> Record:  # noqa: C901
    """What is kept of every tensor, and the attributes that change with it."""
    modules = dict(model.named_modules())
    gone: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    attributes: dict[str, dict[str, Any]] = defaultdict(dict)
    sides: dict[tuple[str, str], set[int]] = defaultdict(set)
    heads: dict[str, int] = {}
    for group in groups:
        drop = drops.get(group.name)
        if drop is None or not drop.any():
            continue
        for place in group.places:
            chosen = drop[group.atoms[place.roots]]
            if place.side != "raw":
                sides[place.module, place.side].update(place.channels[chosen].tolist())
            for name, axis, positions, _ in located(place, modules):
                gone[name][axis].append(positions[:, chosen].flatten())
        for attention in group.attentions:
            first = next(place for place in group.places if place.side == "out" and place.module in attention.layers)
            lost = len(first.channels[drop[group.atoms[first.roots]]].unique())
            heads[attention.name] = lost // (attention.head_dim * attention.layers[first.module])
            attributes[attention.name] |= _attention_attributes(attention, heads[attention.name])
    for (name, side), channels in sides.items():
        for owner, changed in _attributes(modules[name], side, len(channels)).items():
            attributes[".".join(part for part in (name, owner) if part)] |= changed
    tensors = tensors_by_name(model)
    kept: dict[str, dict[int, Tensor]] = {}
    for name, axes in gone.items():
        kept[name] = {}
        for axis, parts in axes.items():
            keep = torch.ones(tensors[name].shape[axis], dtype=torch.bool)
            keep[torch.cat(parts)] = False
            kept[name][axis] = keep.nonzero().flatten()
    return {"kept": kept, "attributes": {name: values for name, values in attributes.items() if values}, "removed": []}


def _attention_attributes(attention: Attention, lost: int) -> dict[str, int]:
    left = attention.num_heads - lost
    return dict.fromkeys(attention.attributes, left) | dict.fromkeys(attention.sizes, left * attention.head_dim)


def _attributes(module: Any, side: str, lost: int) -> dict[str, dict[str, Any]]:
    """Changed attributes of a module and of its parts when one side loses channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == module.in_channels == module.out_channels and module.groups > 1:
            return {"": dict.fromkeys(("in_channels", "out_channels", "groups"), module.groups - lost)}
        key = f"{side}_channels"
    elif isinstance(module, nn.Linear):
        key = f"{side}_features"
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"": {"normalized_shape": (*module.normalized_shape[:-1], module.normalized_shape[-1] - lost)}}
    elif isinstance(module, nn.MultiheadAttention):
        dim = module.embed_dim - lost
        own = {"embed_dim": dim, "kdim": dim, "vdim": dim, "num_heads": dim // module.head_dim}
        return {"": own, "out_proj": {"in_features": dim, "out_features": dim}}
    else:
        key = next(
            (k for k in ("num_features", "num_channels", "embedding_dim", "num_parameters") if k in vars(module)), ""
        )
        if not key:
            return {}
    return {"": {key: getattr(module, key) - lost}}


def prove(model: nn.Module, forward: Forward, record: Record) -> str | None:
    """Why a record must not be applied; None where the smaller model gives what the masked dense one gives.

    The dense copy has zeros wherever something is removed, and its norms over channels see only those that are kept.
    Weights are moved a little at first, so that zeros of an initialization hide nothing.

    Args:
        model: The model, in float32; it is copied.
        forward: Calls a model and gives its outputs.
        record: What is to be removed.
    """
    with tracing(), torch.no_grad():
        dense = copy.deepcopy(model).eval()
        for p in dense.parameters():
            if p.is_floating_point():
                spread = float(p.std()) if p.numel() > 1 else 0.0
                p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.1 * (spread or 0.1))
        small = copy.deepcopy(dense)
        try:
            apply_record(small, record)
            _mask(dense, small, record)
            outputs = []
            for each in (dense, small):
                torch.manual_seed(0)
                outputs.append(torch.utils._pytree.tree_leaves(forward(each)))
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no message"]
            return f"its forward fails without some of its channels: {type(error).__name__}: {lines[0]}"
    for a, b in zip(*outputs, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return f"the model's output would change its shape from {tuple(a.shape)} to {tuple(b.shape)}"
        limit = 1e-3 * float(a.abs().max()) + 1e-6 if a.numel() else 0.0
        if a.is_floating_point() and not bool(((a - b).abs() <= limit).all()):
            return "the model would compute something else than with these channels at zero"
    return None


def prove_groups(model: nn.Module, forward: Forward, coupling: Coupling, limits: Limits) -> Coupling:
    """Prove that every group can lose channels; leave those alone that cannot, each with its reason."""
    ranks = {group.name: torch.arange(len(group.sizes)).float() for group in coupling.groups}
    groups, skipped = [], dict(coupling.skipped)
    for group in coupling.groups:  # user attentions: which attributes follow is found by trying
        chosen, why = _settle(model, forward, group, ranks, limits) if group.attentions else (group, None)
        if why is None:
            groups.append(chosen)
        else:
            skipped |= dict.fromkeys(map(plain_name, group.layers), why)
    if groups and _why(model, forward, groups, ranks, limits) is not None:
        alone = {group.name: _why(model, forward, [group], ranks, limits) for group in groups}
        for group in list(groups):
            if alone[group.name] is not None:
                groups.remove(group)
                skipped |= dict.fromkeys(map(plain_name, group.layers), str(alone[group.name]))
        if groups and _why(model, forward, groups, ranks, limits) is not None:
            safe: list[Group] = []
            for group in groups:
                why = _why(model, forward, [*safe, group], ranks, limits)
                if why is None:
                    safe.append(group)
                else:
                    skipped |= dict.fromkeys(map(plain_name, group.layers), why)
            groups = safe
    for place in (place for group in groups for place in group.places if place.side == "raw"):
        skipped.pop(plain_name(place.module), None)
    return Coupling(groups, skipped)


def _settle(
    model: nn.Module, forward: Forward, group: Group, ranks: Mapping[str, Tensor], limits: Limits
) -> tuple[Group, str | None]:
    """The group with those attributes of its attentions that follow the heads."""
    why = None
    for drop_sizes in (False, True):
        attentions = [copy.copy(attention) for attention in group.attentions]
        for attention in attentions:
            attention.sizes = () if drop_sizes else attention.sizes
        tried = Group(group.name, group.layers, group.places, group.atoms, attentions)
        found = _why(model, forward, [tried], ranks, limits)
        if found is None:
            return tried, None
        why = why or found
    return group, why


def _why(
    model: nn.Module, forward: Forward, groups: Sequence[Group], ranks: Mapping[str, Tensor], limits: Limits
) -> str | None:
    drops = choose(groups, ranks, 0.5, Limits(limits.floor, limits.round_to, None, "local"))
    for group in groups:  # of few large atoms at least one
        if not drops[group.name].any():
            drops[group.name][0] = True
    return prove(model, forward, record_of(model, groups, drops))


def _mask(dense: nn.Module, small: nn.Module, record: Record) -> None:
    """Zeros in the dense model wherever the small one has nothing; norms over channels as in the small one."""
    tensors, modules, smaller = tensors_by_name(dense), dict(dense.named_modules()), dict(small.named_modules())
    for name, axes in record["kept"].items():
        tensor = tensors[name].data
        for axis, keep in axes.items():
            gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
            gone[keep] = False
            tensor.index_fill_(axis, gone.nonzero().flatten(), 0.0)
        owner = name.rpartition(".")[0]
        if isinstance(modules[owner], nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            axis = 1 if isinstance(modules[owner], nn.GroupNorm) else -1
            (keep,) = axes.values()
            modules[owner].__dict__["forward"] = _Gathered(smaller[owner], keep, axis)


class _Gathered:
    """A norm of some channels, with zeros for the others."""

    def __init__(self, norm: nn.Module, keep: Tensor, axis: int) -> None:
        self.norm, self.keep, self.axis = norm, keep, axis

    def __call__(self, x: Tensor) -> Tensor:
        y = self.norm(x.index_select(self.axis, self.keep))
        return torch.zeros_like(x).index_copy(self.axis, self.keep, y)
