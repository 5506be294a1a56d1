"""Proof that a model without some channels computes what it computes with these channels at zero; choices so proven."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_compress.checks import first_line
from lightning_compress.copies import copy_module
from lightning_compress.layers import plain_name
from lightning_compress.structure.choose import Drops, Limits, drop_fewest, drop_lowest, score_groups
from lightning_compress.structure.cuts import dropped_by_leaf, record_of
from lightning_compress.structure.groups import Coupling, Forward, Group, tracing
from lightning_compress.structure.record import Record, apply_record
from lightning_compress.structure.zeroed import Zeroed

Rehearse = Callable[[nn.Module], str | None]
"""Runs a model that was changed, and says why it does not run; None where it does."""

_SECONDS = 60  # of planning, of a thread: a model that takes longer has groups by the hundred that fail

__all__ = ["Rehearse", "choose_channels", "prove", "prove_groups"]


def prove(
    model: nn.Module, forward: Forward, groups: Sequence[Group], drops: Drops, record: Record | None = None
) -> str | None:
    """Why channels must not be removed; None where the smaller model gives what the larger one gives without them.

    In the larger one all values of these channels are zero wherever they appear, and what is taken over channels, such
    as a mean, is taken over those that are left.

    Args:
        model: The model, in float32; it is copied.
        forward: Calls a model and returns its outputs.
        groups: The groups.
        drops: What they lose.
        record: What is removed, if that is not the record of these drops.
    """
    record = record_of(model, groups, drops) if record is None else record
    if not record.kept:
        return None
    dropped = dropped_by_leaf(groups, drops)
    with tracing(), torch.no_grad():
        dense = copy_module(model).eval()
        _move(dense)
        small = copy_module(dense)
        outputs = []
        try:
            apply_record(small, record)
            torch.manual_seed(0)
            with Zeroed(dense, groups[0].followed, dropped):
                outputs.append(torch.utils._pytree.tree_leaves(forward(dense)))
            torch.manual_seed(0)
            outputs.append(torch.utils._pytree.tree_leaves(forward(small)))
        except Exception as error:
            return f"its forward fails without some of its channels: {first_line(error)}"
    for expected, found in zip(*outputs, strict=True):
        if isinstance(expected, Tensor):
            why = _difference(expected, found)
            if why is not None:
                return why
    return None


def _move(model: nn.Module) -> None:
    """Move the weights a little: zeros of an initialization would hide what the channels do."""
    for p in model.parameters():
        if p.is_floating_point():
            spread = float(p.std()) if p.numel() > 1 else 0.0
            p.add_(torch.empty_like(p).uniform_(-0.2, 0.2).mul_(spread or 0.1))


def _difference(expected: Tensor, found: Tensor) -> str | None:
    """How an output differs by more than the order of its sums; None where it does not."""
    if expected.shape != found.shape:
        return f"the model's output would change its shape from {tuple(expected.shape)} to {tuple(found.shape)}"
    if not expected.is_floating_point() or not expected.numel():
        return None
    limit = 1e-3 * float(expected.abs().max()) + 1e-6
    if not bool(((expected - found).abs() <= limit).all()):
        return "the model would compute something else than with these channels at zero"
    return None


def prove_groups(
    model: nn.Module, forward: Forward, coupling: Coupling, limits: Limits, rehearse: Rehearse | None = None
) -> Coupling:
    """Prove that every group can lose channels; leave those alone that cannot, each with its reason.

    Args:
        model: The model, in float32; it is copied.
        forward: Calls a model and returns its outputs.
        coupling: The model's groups.
        limits: How far the groups may shrink.
        rehearse: Runs a smaller model in all that it is used for.
    """
    skipped = dict(coupling.skipped)
    groups = _surviving(coupling.groups, lambda some: prove(model, forward, some, _half(some, limits)), skipped)
    if rehearse is not None:
        groups = _surviving(
            groups, lambda some: _rehearse(model, record_of(model, some, _half(some, limits)), rehearse), skipped
        )
    for group in groups:
        for place in group.places:  # a raw parameter, and a weight that is computed from another, are cut all the same
            name = plain_name(place.name)
            skipped = {key: why for key, why in skipped.items() if not _is_computed_from(key, name)}
    return Coupling(groups, skipped)


def _is_computed_from(name: str, tensor: str) -> bool:
    return tensor == name or tensor.startswith(f"{name}.parametrizations.")


def _left_alone(group: Group, why: str) -> dict[str, str]:
    return dict.fromkeys(group.layers, why)


def _surviving(
    groups: Sequence[Group],
    try_: Callable[[Sequence[Group]], str | None],
    skipped: dict[str, str],
    ends: float | None = None,
) -> list[Group]:
    """The groups that pass a trial together; the others are added to what is skipped.

    The trials go from one for all groups to halves of them and on to single ones: nearly always the first is enough.
    Groups for which there is no time left are skipped, too.

    Args:
        groups: The groups.
        try_: Says why some of them do not pass.
        skipped: Gets the reasons, by the names of the layers.
        ends: When the time is over, in seconds of this thread; in a minute without it.
    """
    if ends is None:
        ends = time.thread_time() + _SECONDS
    elif time.thread_time() > ends:
        for group in groups:
            skipped |= _left_alone(group, f"not settled within {_SECONDS} seconds of planning")
        return []
    why = try_(groups) if groups else None
    if why is None:
        return list(groups)
    if len(groups) == 1:
        skipped |= _left_alone(groups[0], why)
        return []
    middle = len(groups) // 2
    halves = [_surviving(half, try_, skipped, ends) for half in (groups[:middle], groups[middle:])]
    passed = halves[0]
    if all(halves) and try_([*passed, *halves[1]]) is not None:
        # Each half passes by itself, so one group more is tried at a time.
        for group in halves[1]:
            why = try_([*passed, group])
            if why is None:
                passed = [*passed, group]
            else:
                skipped |= _left_alone(group, why)
        return passed
    return [*passed, *halves[1]]


def _rehearse(model: nn.Module, record: Record, rehearse: Rehearse) -> str | None:
    """Why a model does not run without what a record removes, in all that it is used for; None where it does."""
    smaller = copy_module(model)
    apply_record(smaller, record)
    return rehearse(smaller)


def _half(groups: Sequence[Group], limits: Limits) -> Drops:
    """Half of the channels of groups."""
    in_order = {group.name: torch.arange(len(group.sizes)).float() for group in groups}
    drops = drop_lowest(groups, in_order, 0.5, Limits(limits.floor, limits.round_to, None, "local"))
    for group in groups:
        # Of few large atoms none may fit into the half: one goes all the same.
        if not drops[group.name].any():
            drops[group.name][0] = True
    return drops


def choose_channels(
    model: nn.Module,
    forward: Forward,
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    limits: Limits,
    reached: Callable[[Drops, Callable[[], Record]], bool],
    rehearse: Rehearse | None = None,
) -> tuple[Record, Drops, bool]:
    """Choose the channels that reach a target, and prove that the model computes the same without them.

    Groups that fail the proof are left alone and named in ``coupling.skipped``.

    Args:
        model: The model, in float32; it is copied.
        forward: Calls a model and returns its outputs.
        coupling: The model's groups.
        scores: A criterion's scores by the name of the weight's tensor.
        limits: How far the groups may shrink.
        reached: Says whether a choice reaches the target; it may ask for the record of it, which takes time.
        rehearse: Runs a smaller model in all that it is used for.

    Returns:
        The record, what it drops, and whether that reaches the target.
    """
    groups = coupling.groups
    values = score_groups(groups, scores)

    def why_not(some: Sequence[Group], drops: Drops) -> str | None:
        record = record_of(model, some, drops)
        why = prove(model, forward, some, drops, record)
        return _rehearse(model, record, rehearse) if why is None and rehearse is not None and record.kept else why

    while True:
        drops, enough = drop_fewest(groups, values, limits, partial(_reached, model, groups, reached))
        left = _surviving(groups, lambda some, drops=drops: why_not(some, drops), coupling.skipped)  # type: ignore[misc]
        if len(left) == len(groups):
            return record_of(model, groups, drops), drops, enough
        # Without those that failed the others have more to give: the loop ends at the latest without groups.
        groups = left
        coupling.groups[:] = groups


def _reached(
    model: nn.Module,
    groups: Sequence[Group],
    reached: Callable[[Drops, Callable[[], Record]], bool],
    drops: Drops,
) -> bool:
    return reached(drops, partial(record_of, model, groups, drops))
