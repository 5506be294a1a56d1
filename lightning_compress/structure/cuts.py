"""What is left of every tensor, and of the attributes that say how large they are, when channels go."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.structure.axes import Axis, leaves_of, place_of
from lightning_compress.structure.choose import Drops
from lightning_compress.structure.dependencies import Followed, Group
from lightning_compress.structure.literals import follow_sizes
from lightning_compress.structure.record import Record, Value, tensors_by_name
from lightning_compress.structure.sizes import sizes_of_module

__all__ = ["dropped_by_leaf", "kept_along", "num_parameters", "record_of"]


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
