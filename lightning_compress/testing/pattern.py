"""Whether a pattern keeps its contract."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.pruning.patterns import Pattern
from lightning_compress.testing.attempt import attempt, noise, refuses, require

__all__ = ["check_pattern"]

_SHAPES = ((16, 32), (16, 16, 3, 3), (48, 24), (24, 48, 8))


def check_pattern(pattern: Pattern) -> None:
    """Check that a pattern keeps the contract of :class:`lightning_compress.pruning.Pattern`.

    For weights of two, three and four axes that it does not refuse, ``expand`` gives a bool a weight in the weight's
    shape; its groups are of one size and share no weight; and ``reduce`` gives the group that ``expand`` keeps the
    highest score, and a group of dropped weights, whose scores are -inf, the lowest. ``protects`` gives a bool a group,
    and leaves enough of them to reach ``max_sparsity``; where that is below 1, it protects some.

    Args:
        pattern: The pattern to check.

    Raises:
        AssertionError: If the pattern breaks the contract; the message says what is broken.

    Example:
        >>> from lightning_compress.pruning import Element
        >>> check_pattern(Element())
    """
    name = type(pattern).__name__
    require(isinstance(pattern, Pattern), f"{name} is no subclass of lightning_compress.pruning.Pattern")
    with attempt(f"{name}.max_sparsity"):
        most = float(pattern.max_sparsity)
    require(0 < most <= 1, f"{name}.max_sparsity is {most:g}; accepted is a share above 0 and up to 1")
    num_accepted = 0
    for size in _SHAPES:
        shape = torch.Size(size)
        where = f"for a weight of shape {size}"
        if refuses(f"{name}.refuses {where}", pattern.refuses, shape):
            continue
        num_accepted += 1

        def reduce(scores: Tensor, where: str = where) -> Tensor:
            before = scores.clone()
            with attempt(f"{name}.reduce {where}"):
                groups = pattern.reduce(scores)
            require(torch.equal(scores, before), f"{name}.reduce changed the scores {where}")
            return groups

        def expand(keep: Tensor, shape: torch.Size = shape, where: str = where) -> Tensor:
            with attempt(f"{name}.expand {where}"):
                mask = pattern.expand(keep, shape)
            require(mask.dtype == torch.bool, f"{name}.expand gives {mask.dtype}, not torch.bool, {where}")
            require(
                mask.shape == shape, f"{name}.expand gives the shape {tuple(mask.shape)}, not the weight's, {where}"
            )
            return mask

        scores = noise(shape, seed=1, uniform=True)
        groups = reduce(scores)
        num_groups = groups.numel()
        num_weights = scores.numel()
        require(bool(torch.isfinite(groups).all()), f"{name}.reduce is not finite {where}")
        require(
            0 < num_groups <= num_weights and num_weights % num_groups == 0,
            f"{name}.reduce gives {num_groups} groups, which cannot be of one size, {where}",
        )
        everything = torch.ones(groups.shape, dtype=torch.bool)
        require(bool(expand(everything).all()), f"{name}.expand drops weights when all groups are kept {where}")
        require(not expand(~everything).any(), f"{name}.expand keeps weights when all groups are dropped {where}")
        for seed in range(3):
            keep = noise(groups.shape, seed=seed, uniform=True) < 0.5
            mask = expand(keep)
            require(torch.equal(mask, ~expand(~keep)), f"{name}.expand's groups share weights {where}")
            require(
                int(mask.sum()) == int(keep.sum()) * (num_weights // num_groups),
                f"{name}.expand's groups are not of one size {where}: {int(keep.sum())} of {num_groups} groups keep "
                f"{int(mask.sum())} of {num_weights} weights",
            )
        for index in {0, num_groups // 3, num_groups - 1}:
            keep = torch.zeros(num_groups, dtype=torch.bool)
            keep[index] = True
            mask = expand(keep.view(groups.shape))
            require(
                int(reduce(mask.float()).flatten().argmax()) == index,
                f"{name}.reduce and {name}.expand disagree on which weights are group {index} {where}",
            )
            dead = reduce(scores.masked_fill(mask, -torch.inf)).flatten()
            require(
                not dead.isnan().any() and int(dead.argmin()) == index,
                f"{name}.reduce does not rank a group of dropped weights, whose scores are -inf, lowest {where}",
            )
        _check_protects(pattern, groups, most, where)
    require(num_accepted, f"{name}.refuses refuses all of the shapes {', '.join(map(str, _SHAPES))}")


def _check_protects(pattern: Pattern, groups: Tensor, most: float, where: str) -> None:
    name = type(pattern).__name__
    before = groups.clone()
    with attempt(f"{name}.protects {where}"):
        protected = pattern.protects(groups)
    require(torch.equal(groups, before), f"{name}.protects changed the scores {where}")
    some = protected is not None and bool(protected.any())
    require(some or most == 1, f"{name}.protects protects no group, though max_sparsity is {most:g} and not 1, {where}")
    if protected is None:
        return
    require(protected.dtype == torch.bool, f"{name}.protects gives {protected.dtype}, not torch.bool, {where}")
    require(
        protected.shape == groups.shape,
        f"{name}.protects gives the shape {tuple(protected.shape)}, not that of reduce's groups, {where}",
    )
    free = 1 - float(protected.float().mean())
    require(
        free > most - 1e-6,
        f"{name}.protects leaves a share of {free:g} to drop, less than max_sparsity={most:g}, {where}",
    )
