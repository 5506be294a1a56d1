"""Proof that a model without some channels computes what it computes with these channels at zero; choices so proven."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_compress.checks import first_line
from lightning_compress.copies import copy_module
from lightning_compress.layers import plain_name
from lightning_compress.structure.choose import Drops, Limits, drop_fewest, drop_lowest, record_of, score_groups
from lightning_compress.structure.groups import Coupling, Forward, Group, tracing
from lightning_compress.structure.record import Record, apply_record, tensors_by_name

Rehearse = Callable[[nn.Module], str | None]
"""Runs a model that was changed, and says why it does not run; None where it does."""

__all__ = ["Rehearse", "choose_channels", "prove", "prove_groups"]


def prove(model: nn.Module, forward: Forward, record: Record) -> str | None:
    """Why a record must not be applied; None where the smaller model gives what the masked dense one gives.

    The dense copy has zeros wherever something is removed, and its norms over channels see only those that are kept.

    Args:
        model: The model, in float32; it is copied.
        forward: Calls a model and returns its outputs.
        record: What is to be removed.
    """
    outputs = []
    with tracing(), torch.no_grad():
        dense = copy_module(model).eval()
        _move(dense)
        small = copy_module(dense)
        try:
            apply_record(small, record)
            _mask(dense, small, record)
            for each in (dense, small):
                torch.manual_seed(0)
                outputs.append(torch.utils._pytree.tree_leaves(forward(each)))
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
            p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.1 * (spread or 0.1))


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
    groups: list[Group] = []
    for group in coupling.groups:
        # Which attributes of a user's attention follow its heads is found by trying.
        chosen, why = _settle(model, forward, group, limits) if group.attentions else (group, None)
        if why is None:
            groups.append(chosen)
        else:
            skipped |= _left_alone(group, why)
    groups = _surviving(groups, lambda some: prove(model, forward, _half(model, some, limits)), skipped)
    if rehearse is not None:
        groups = _surviving(groups, lambda some: _rehearse(model, _half(model, some, limits), rehearse), skipped)
    for group in groups:
        for place in group.places:
            if place.side == "raw":
                skipped.pop(plain_name(place.module), None)
    return Coupling(groups, skipped)


def _left_alone(group: Group, why: str) -> dict[str, str]:
    return dict.fromkeys(map(plain_name, group.layers), why)


def _surviving(
    groups: Sequence[Group], try_: Callable[[Sequence[Group]], str | None], skipped: dict[str, str]
) -> list[Group]:
    """The groups that pass a trial together; the others are added to what is skipped.

    The trials go from one for all groups to halves of them and on to single ones: nearly always the first is enough.
    """
    why = try_(groups) if groups else None
    if why is None:
        return list(groups)
    if len(groups) == 1:
        skipped |= _left_alone(groups[0], why)
        return []
    middle = len(groups) // 2
    halves = [_surviving(half, try_, skipped) for half in (groups[:middle], groups[middle:])]
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


def _settle(model: nn.Module, forward: Forward, group: Group, limits: Limits) -> tuple[Group, str | None]:
    """The group with those attributes of its attentions that follow the heads; or why none do."""
    reasons: list[str] = []
    for drop_sizes in (False, True):
        attentions = [copy.copy(attention) for attention in group.attentions]
        for attention in attentions:
            attention.sizes = () if drop_sizes else attention.sizes
        tried = Group(group.name, group.layers, group.places, group.atoms, attentions)
        why = prove(model, forward, _half(model, [tried], limits))
        if why is None:
            return tried, None
        reasons.append(why)
    return group, reasons[0]


def _half(model: nn.Module, groups: Sequence[Group], limits: Limits) -> Record:
    """The record that takes half of the channels of groups."""
    in_order = {group.name: torch.arange(len(group.sizes)).float() for group in groups}
    drops = drop_lowest(groups, in_order, 0.5, Limits(limits.floor, limits.round_to, None, "local"))
    for group in groups:
        # Of few large atoms none may fit into the half: one goes all the same.
        if not drops[group.name].any():
            drops[group.name][0] = True
    return record_of(model, groups, drops)


def choose_channels(
    model: nn.Module,
    forward: Forward,
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    limits: Limits,
    reached: Callable[[Drops, Record], bool],
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
        reached: Says whether a choice reaches the target.
        rehearse: Runs a smaller model in all that it is used for.

    Returns:
        The record, what it drops, and whether that reaches the target.
    """
    groups = coupling.groups
    values = score_groups(groups, model, scores)

    def why_not(some: Sequence[Group], drops: Drops) -> str | None:
        record = record_of(model, some, drops)
        why = prove(model, forward, record) if record.kept else None
        return _rehearse(model, record, rehearse) if why is None and rehearse is not None and record.kept else why

    while True:
        drops, enough = drop_fewest(groups, values, limits, partial(_reached, model, groups, reached))
        left = _surviving(groups, lambda some, drops=drops: why_not(some, drops), coupling.skipped)  # type: ignore[misc]
        if len(left) == len(groups):
            return record_of(model, groups, drops), drops, enough
        # Without those that failed the others have more to give: the loop ends at the latest without groups.
        groups = left
        coupling.groups[:] = groups


def _reached(model: nn.Module, groups: Sequence[Group], reached: Callable[[Drops, Record], bool], drops: Drops) -> bool:
    return reached(drops, record_of(model, groups, drops))


def _mask(dense: nn.Module, small: nn.Module, record: Record) -> None:
    """Zeros in the dense model wherever the small one has nothing; norms over channels as in the small one."""
    tensors = tensors_by_name(dense)
    modules = dict(dense.named_modules())
    smaller = dict(small.named_modules())
    for name, axes in record.kept.items():
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
        self.norm = norm
        self.keep = keep
        self.axis = axis

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize the kept channels of x, and put them back where they were."""
        y = self.norm(x.index_select(self.axis, self.keep))
        return torch.zeros_like(x).index_copy(self.axis, self.keep, y)
