"""Where sparsity goes: how much of it each layer takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_compress.layers import Layer
from lightning_compress.pruning.threshold import Processes, keep_highest

__all__ = ["Ranking", "Scope", "choose_with_floor", "erdos_renyi_kernel", "keep_groups", "num_needed"]
__all__ += ["split_by_scope"]

Scope = Literal["global", "layer", "erk"]
"""What is ranked together: all layers, each layer by itself, or each up to an Erdos-Renyi-kernel sparsity."""

_ALONE = Processes()

C = TypeVar("C")


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
        # What would be denser than dense is dense, and the others share what that takes.
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
    parts = [([layer], targets[layer.name]) for layer in layers if layer.name in targets]
    rest = [layer for layer in layers if layer.name not in targets]
    if scope == "global":
        return [*parts, (rest, sparsity)] if rest else parts
    if scope == "erk":
        shares = erdos_renyi_kernel(rest, sparsity)
        return [*parts, *(([layer], shares[layer.name]) for layer in rest)]
    return [*parts, *(([layer], sparsity) for layer in rest)]


def num_needed(floor: float, sparsity: float, num_groups: int) -> int:
    """How many of its groups a layer keeps at least.

    Args:
        floor: Share of what all layers keep on average.
        sparsity: Share that all layers drop.
        num_groups: Number of the layer's groups.
    """
    # Rounded first: in floating point 0.1 * (1 - 0.9) * 100 is a little more than 1.
    return math.ceil(round(floor * (1 - sparsity) * num_groups, 6)) if sparsity < 1 else 0


class Ranking(Protocol[C]):
    """Scores of layers, which can be ranked together; a layer is known by its number."""

    def drop_lowest(self, members: Sequence[int], num_weights: float) -> C:
        """The choice that drops the lowest scores of all given layers, until they hold a number of weights."""
        ...

    def short(self, choice: C, members: Sequence[int]) -> list[int]:
        """The layers of which a choice keeps less than they need."""
        ...

    def keep_needed(self, member: int) -> tuple[C, float]:
        """The choice that keeps just what a layer needs, and how many weights that drops."""
        ...


def choose_with_floor(ranking: Ranking[C], num_layers: int, num_weights: float) -> list[tuple[C, list[int]]]:
    """Drop the lowest scores of all layers together; a layer that would keep too little keeps what it needs.

    What such a layer does not drop the others drop in its place, among which new ones may then be short.

    Args:
        ranking: The layers' scores.
        num_layers: Number of layers.
        num_weights: Number of weights to drop.

    Returns:
        Choices, each with the numbers of the layers that it is made for; all others drop nothing.
    """
    choices: list[tuple[C, list[int]]] = []
    members = list(range(num_layers))
    while members and num_weights > 0:
        choice = ranking.drop_lowest(members, num_weights)
        short = ranking.short(choice, members)
        if not short:
            return [*choices, (choice, members)]
        for member in short:
            own, num_dropped = ranking.keep_needed(member)
            choices.append((own, [member]))
            num_weights -= num_dropped
        members = [member for member in members if member not in short]
    return choices


def keep_groups(
    groups: Sequence[Tensor],
    sizes: Sequence[int],
    sparsity: float,
    floor: float = 0.0,
    processes: Processes = _ALONE,
) -> list[Tensor]:
    """Bool tensors in the shapes of ``groups``, False for the lowest groups up to a share of all weights.

    Args:
        groups: One tensor per layer, with one score per group; groups that score +inf stay.
        sizes: Weights per group, one number per layer.
        sparsity: Share of the weights to drop.
        floor: Smallest share of what all layers keep on average that a layer keeps.
        processes: Processes that each hold a part of every layer's groups.
    """
    nums = processes.sum(*(group.numel() for group in groups))
    needed = [num_needed(floor, sparsity, num) for num in nums]
    num_weights = sparsity * sum(num * size for num, size in zip(nums, sizes, strict=True))
    keeps = [torch.ones_like(group, dtype=torch.bool) for group in groups]
    for choice, members in choose_with_floor(_Held(groups, sizes, nums, needed, processes), len(groups), num_weights):
        for member, keep in zip(members, choice, strict=True):
            keeps[member] = keep
    return keeps


class _Held:
    """Scores that are held; a choice is one bool tensor per layer that it is made for."""

    def __init__(
        self,
        groups: Sequence[Tensor],
        sizes: Sequence[int],
        nums: Sequence[int],
        needed: Sequence[int],
        processes: Processes,
    ) -> None:
        self.groups = groups
        self.sizes = sizes
        self.nums = nums
        self.needed = needed
        self.processes = processes

    def drop_lowest(self, members: Sequence[int], num_weights: float) -> list[Tensor]:
        """Drop the lowest groups until they hold a number of weights."""
        groups = [self.groups[i] for i in members]
        sizes = [self.sizes[i] for i in members]
        if len(set(sizes)) == 1:
            (num_groups,) = self.processes.sum(sum(group.numel() for group in groups))
            share = num_weights / sizes[0] / max(1, num_groups)
            keeps = keep_highest(groups, min(1.0, max(0.0, share)), self.processes)
        else:
            keeps = self._drop_of_unequal(groups, sizes, num_weights)
        return [keep | (group == torch.inf) for keep, group in zip(keeps, groups, strict=True)]

    def _drop_of_unequal(self, groups: Sequence[Tensor], sizes: Sequence[int], num_weights: float) -> list[Tensor]:
        """The same where groups differ in size: those of all layers are sorted."""
        processes = self.processes
        wholes = [processes.join(group.detach().float().cpu().flatten(), torch.Size([-1])) for group in groups]
        flat = torch.cat(wholes)
        if flat.isnan().any():
            raise ValueError("A pruning score is NaN: the weights have diverged. Lower the learning rate.")
        weights = torch.cat([torch.full_like(w, s, dtype=torch.int64) for w, s in zip(wholes, sizes, strict=True)])
        order = flat.argsort(stable=True)
        before = weights[order].cumsum(0) - weights[order]
        keep = torch.empty_like(flat, dtype=torch.bool)
        keep[order] = before >= round(num_weights, 6)
        parts = map(processes.part, keep.split([len(w) for w in wholes]))
        return [part.view(group.shape).to(group.device) for part, group in zip(parts, groups, strict=True)]

    def short(self, choice: Sequence[Tensor], members: Sequence[int]) -> list[int]:
        """The layers of which less groups are kept than they need."""
        num_kept = self.processes.sum(*(int(keep.sum()) for keep in choice))
        return [member for member, num in zip(members, num_kept, strict=True) if num < self.needed[member]]

    def keep_needed(self, member: int) -> tuple[list[Tensor], float]:
        """Keep the highest groups, as many as are needed."""
        share = 1 - self.needed[member] / self.nums[member]
        (keep,) = keep_highest([self.groups[member]], share, self.processes)
        (num_dropped,) = self.processes.sum(int((~keep).sum()))
        return [keep], num_dropped * self.sizes[member]
