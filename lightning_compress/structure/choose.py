"""Which channels go: scored by their weights, as few as reach a target, and proven before they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_compress.layers import plain_name
from lightning_compress.structure.channels import located
from lightning_compress.structure.drops import Drops, Limits, drop_lowest, record_of
from lightning_compress.structure.groups import Coupling, Forward, Group
from lightning_compress.structure.proof import prove
from lightning_compress.structure.record import Record

__all__ = ["choose_channels", "drop_fewest", "score_groups"]


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


def choose_channels(
    model: nn.Module,
    forward: Forward,
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    limits: Limits,
    reached: Callable[[Drops, Record], bool],
) -> tuple[Record, Drops, bool]:
    """Choose the channels that reach a target, and prove that the model computes the same without them.

    Groups that fail the proof are left alone and named in ``coupling.skipped``.

    Args:
        model: The model, in float32; it is copied.
        forward: Calls a model and returns its outputs.
        coupling: The model's groups.
        scores: A criterion's scores by the name of the weight's tensor.
        limits: How far the groups may shrink.
        reached: Says whether a choice reaches the target.

    Returns:
        The record, what it drops, and whether that reaches the target.
    """
    groups = coupling.groups
    values = score_groups(groups, model, scores)
    while True:
        drops, enough = drop_fewest(groups, values, limits, partial(_reached, model, groups, reached))
        record = record_of(model, groups, drops)
        if not record.kept or prove(model, forward, record) is None:
            return record, drops, enough
        alone = {group.name: prove(model, forward, record_of(model, [group], drops)) for group in groups}
        if not any(alone.values()):
            # Each is proven by itself, so one less is tried: the loop ends at the latest without groups.
            alone[groups[-1].name] = "it cannot shrink together with the others"
        for group in groups:
            why = alone[group.name]
            if why is not None:
                coupling.skipped.update(dict.fromkeys(map(plain_name, group.layers), why))
        groups = [group for group in groups if alone[group.name] is None]
        coupling.groups[:] = groups


def _reached(model: nn.Module, groups: Sequence[Group], reached: Callable[[Drops, Record], bool], drops: Drops) -> bool:
    return reached(drops, record_of(model, groups, drops))
