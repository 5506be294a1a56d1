"""Where sparsity goes: how much of it each layer takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.layers import Layer
from lightning_compress.pruning.threshold import Ranks, keep_highest

__all__ = ["erdos_renyi_kernel", "keep_groups", "num_needed", "split_by_scope"]

Scope = Literal["global", "layer", "erk"]
_ALONE = Ranks()


def erdos_renyi_kernel(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    """Sparsity of each layer, larger layers sparser, at one sparsity of all together (Evci 2020, arXiv:1911.11134).

    A layer's density is proportional to (sum of the sizes of its axes) / (product of them), and 1 at most.

    Args:
        layers: The layers; a linear one has two axes, a convolution also those of its kernel.
        sparsity: Share of all weights to drop, 0..1.

    Example:
        >>> layers = [Layer("a", torch.nn.Linear(100, 100)), Layer("b", torch.nn.Linear(100, 10))]
        >>> {name: round(share, 3) for name, share in erdos_renyi_kernel(layers, 0.9).items()}
        {'a': 0.929, 'b': 0.61}
    """
    sizes = {layer.name: layer.weight.numel() for layer in layers}
    raw = {layer.name: sum(layer.weight.shape) / layer.weight.numel() for layer in layers}
    dense: set[str] = set()
    while True:
        left = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        whole = sum(raw[name] * sizes[name] for name in sizes if name not in dense)
        scale = left / whole if whole else 0.0
        full = {name for name in sizes if name not in dense and scale * raw[name] > 1}
        if not full:
            return {name: 0.0 if name in dense else 1 - max(0.0, scale * raw[name]) for name in sizes}
        dense |= full


def split_by_scope(
    layers: Sequence[Layer], sparsity: float, scope: Scope, targets: Mapping[str, float]
) -> list[tuple[list[Layer], float]]:
    """The layers that are ranked together, and the sparsity of each such part.

    Args:
        layers: All layers.
        sparsity: Share of the weights to drop in all layers without a target of their own.
        scope: What is ranked together.
        targets: Sparsities of single layers by their names.
    """
    own = [([layer], targets[layer.name]) for layer in layers if layer.name in targets]
    rest = [layer for layer in layers if layer.name not in targets]
    if scope == "global":
        return [*own, *([(rest, sparsity)] if rest else [])]
    shares = erdos_renyi_kernel(rest, sparsity) if scope == "erk" else dict.fromkeys((x.name for x in rest), sparsity)
    return [*own, *(([layer], shares[layer.name]) for layer in rest)]


def num_needed(floor: float, sparsity: float, num_groups: int) -> int:
    """How many of its groups a layer keeps at least."""
    return math.ceil(round(floor * (1 - sparsity) * num_groups, 6)) if sparsity < 1 else 0


def keep_groups(
    groups: Sequence[Tensor], sizes: Sequence[int], sparsity: float, floor: float = 0.0, ranks: Ranks = _ALONE
) -> list[Tensor]:
    """Bool tensors in the shapes of ``groups``, False for the lowest groups up to a share of all weights.

    Args:
        groups: One score a group, a tensor a layer; +inf stays.
        sizes: Weights in each group, a number a layer.
        sparsity: Share of the weights to drop.
        floor: No layer keeps less than this share of what all keep on average.
        ranks: Processes that each hold a part of every layer's groups.
    """
    keeps: list[Tensor] = [torch.ones_like(group, dtype=torch.bool) for group in groups]
    nums = ranks.sum(*(group.numel() for group in groups))
    needed = [num_needed(floor, sparsity, num) for num in nums]
    open_, to_drop = list(range(len(groups))), sparsity * sum(n * size for n, size in zip(nums, sizes, strict=True))
    while open_:
        found = _keep_lowest_out([groups[i] for i in open_], [sizes[i] for i in open_], to_drop, ranks)
        for i, keep in zip(open_, found, strict=True):
            keeps[i] = keep | (groups[i] == torch.inf)
        num_kept = dict(zip(open_, ranks.sum(*(int(keeps[i].sum()) for i in open_)), strict=True))
        short = [i for i in open_ if num_kept[i] < needed[i]]
        for i in short:
            keeps[i] = keep_highest([groups[i]], 1 - needed[i] / nums[i], ranks)[0]
            to_drop -= ranks.sum(int((~keeps[i]).sum()))[0] * sizes[i]
        open_ = [i for i in open_ if i not in short] if short else []
    return keeps


def _keep_lowest_out(groups: Sequence[Tensor], sizes: Sequence[int], num_weights: float, ranks: Ranks) -> list[Tensor]:
    """Drop the lowest groups until they hold a number of weights."""
    if len(set(sizes)) == 1:
        (num_groups,) = ranks.sum(sum(group.numel() for group in groups))
        return keep_highest(groups, min(1.0, max(0.0, num_weights / sizes[0] / max(1, num_groups))), ranks)
    wholes = [ranks.join(group.detach().float().cpu().flatten(), torch.Size([-1])) for group in groups]
    flat = torch.cat(wholes)
    if flat.isnan().any():
        raise ValueError("A pruning score is NaN: the weights have diverged. Lower the learning rate.")
    weights = torch.cat([torch.full_like(w, s, dtype=torch.int64) for w, s in zip(wholes, sizes, strict=True)])
    order = flat.argsort(stable=True)
    before = weights[order].cumsum(0) - weights[order]
    keep = torch.empty_like(flat, dtype=torch.bool)
    keep[order] = before >= round(num_weights, 6)
    parts = map(ranks.part, keep.split([len(w) for w in wholes]))
    return [part.view(group.shape).to(group.device) for part, group in zip(parts, groups, strict=True)]
