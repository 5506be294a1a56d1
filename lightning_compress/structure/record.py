"""A change of shape is a record: applied to a model and all that holds on to it, and replayed before weights load."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers import plain_name
from lightning_compress.structure.mirrors import mirrored
from lightning_compress.structure.optimizers import cut, cut_state_of, forget
from lightning_compress.structure.saved import Structure, Value, check_saved
from lightning_compress.structure.whole import all_or_nothing

__all__ = [
    "Record",
    "Skip",
    "Structure",
    "Value",
    "apply_record",
    "cut_state",
    "is_removed",
    "kept_by_id",
    "restore_structure",
    "structure_of",
    "tensors_by_name",
]

_ATTRIBUTE = "_compress_structure"


@dataclass
class Record:
    """A change of a model's shape.

    Args:
        kept: The indices that are kept, by the tensor's name and by axis.
        attributes: New values of attributes, by the module's name.
        removed: Names of blocks that go; an identity takes their place.
    """

    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Value]] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


class Skip(nn.Identity):
    """Stands where a block stood, and takes whatever arguments it took."""

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The first argument."""
        return input


@dataclass
class _Changes:
    """What differs between a model and its dense self; it hangs on the model.

    Args:
        dense: Dense values of the attributes that differ, by the module's name.
        attributes: Their values now.
        shapes: Dense shapes, by the tensor's name.
        blocks: The removed blocks themselves, by name, so that a dense checkpoint can bring them back.
    """

    dense: dict[str, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Value]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    blocks: dict[str, nn.Module] = field(default_factory=dict)


@torch.no_grad()
def apply_record(
    model: nn.Module,
    record: Record,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> None:
    """Shrink a model and what trains it: all of it, or nothing where that fails.

    Parameters keep their identity, names and order.

    Args:
        model: The live model.
        record: What is kept, by name.
        optimizers: Optimizers of its parameters; their state shrinks with it.
        copies: Other models with the same names, such as an average of its weights.
    """
    optimizers = list(optimizers)
    record = mirrored(model, record)
    kept = kept_by_id(model, record)
    before = {id(p) for p in model.parameters()}
    models = [model, *copies]
    with all_or_nothing(models, optimizers):
        # Before the parameters: state is known by having their shape.
        for optimizer in optimizers:
            cut_state_of(optimizer, kept)
        for each in models:
            _shrink(each, record)
        gone = before - {id(p) for p in model.parameters()}
        for optimizer in optimizers:
            forget(optimizer, gone)


def kept_by_id(model: nn.Module, record: Record) -> dict[int, dict[int, Tensor]]:
    """The indices that a record keeps of a model's parameters, by axis, by the parameter's id."""
    named = model.named_parameters(remove_duplicate=False)
    return {id(p): record.kept[name] for name, p in named if name in record.kept}


def is_removed(name: str, record: Record) -> bool:
    """Whether a record removes what has this name, be it named with the prefixes of ``torch.compile`` or without."""
    plain = plain_name(name) + "."
    return any(plain.startswith(plain_name(block) + ".") for block in record.removed)


def cut_state(state_dict: Mapping[str, Tensor], record: Record) -> dict[str, Tensor]:
    """What a record leaves of weights that were remembered before it was applied."""
    left = {name: value for name, value in state_dict.items() if not is_removed(name, record)}
    return {name: cut(value, record.kept.get(name, {})) for name, value in left.items()}


def structure_of(model: nn.Module) -> Structure:
    """How a model differs from its dense self: plain values, saved in a checkpoint beside the weights."""
    changes = _changes(model)
    return {
        "attributes": {name: dict(values) for name, values in changes.attributes.items()},
        "shapes": {name: list(shape) for name, shape in changes.shapes.items()},
        "removed": list(changes.blocks),
    }


@torch.no_grad()
def restore_structure(model: nn.Module, structure: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> None:
    """Bring a model to a saved structure, smaller or larger than it is, so that the weights can be loaded.

    What the structure does not name stays as it is: a checkpoint of another model is still refused when it loads.

    Args:
        model: Any instance of the model.
        structure: What :func:`structure_of` gave; empty for the dense model.
        state_dict: The weights that are to be loaded; they give the shapes.

    Raises:
        ValueError: If the structure is none of :func:`structure_of`; the model is then as it was.
    """
    check_saved(model, structure)
    # In this order: attributes are those of the blocks that are there, and shapes those of their tensors.
    _restore_blocks(model, structure.get("removed", []))
    _restore_attributes(model, structure.get("attributes", {}))
    _restore_shapes(model, structure.get("shapes", {}), state_dict)


def _restore_blocks(model: nn.Module, removed: Iterable[str]) -> None:
    changes = _changes(model)
    removed = list(removed)
    for name in list(changes.blocks):
        if name not in removed:
            _put(model, name, _like(changes.blocks.pop(name), model))
    for name in removed:
        if name not in changes.blocks and _has(model, name):
            changes.blocks[name] = _put(model, name, Skip())


def _restore_attributes(model: nn.Module, wanted: Mapping[str, Mapping[str, Value]]) -> None:
    changes = _changes(model)
    modules = dict(model.named_modules())
    for name in {*changes.dense, *wanted} & modules.keys():
        module = modules[name]
        dense = changes.dense.setdefault(name, {})
        for key in wanted.get(name, {}):
            dense.setdefault(key, getattr(module, key, None))
        for key, value in dense.items():
            setattr(module, key, _plain(wanted.get(name, {}).get(key, value)))
    changes.attributes = {name: dict(values) for name, values in wanted.items() if name in modules}


def _restore_shapes(model: nn.Module, shapes: Mapping[str, list[int]], state_dict: Mapping[str, Tensor]) -> None:
    changes = _changes(model)
    tensors = tensors_by_name(model)
    names = sorted({*changes.shapes, *shapes} & tensors.keys())
    # Of all of them first: a shared tensor stands under several names, and is of another shape once it is resized.
    dense_shapes = {name: changes.shapes.get(name, list(tensors[name].shape)) for name in names}
    changes.shapes = {}
    for name, dense_shape in dense_shapes.items():
        # A tensor with another dense shape is of another model: it is left for loading to refuse.
        if name in state_dict and dense_shape == list(shapes.get(name, dense_shape)):
            _resize(tensors[name], state_dict[name].shape)
        if name in shapes:
            changes.shapes[name] = dense_shape


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Stored parameters and buffers, shared ones under each of their names."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


def _changes(model: nn.Module) -> _Changes:
    return model.__dict__.setdefault(_ATTRIBUTE, _Changes())


def _shrink(model: nn.Module, record: Record) -> None:
    changes = _changes(model)
    modules = dict(model.named_modules())
    tensors = tensors_by_name(model)
    for name in record.kept:
        changes.shapes.setdefault(name, list(tensors[name].shape))
    done: set[int] = set()  # a shared tensor stands under several names, and is cut once
    for name, axes in record.kept.items():
        tensor = tensors[name]
        if id(tensor) not in done:
            done.add(id(tensor))
            _cut_in_place(tensor, axes)
    for name, values in record.attributes.items():
        dense = changes.dense.setdefault(name, {})
        for key, value in values.items():
            dense.setdefault(key, getattr(modules[name], key))
            changes.attributes.setdefault(name, {})[key] = value
            setattr(modules[name], key, value)
    for name in record.removed:
        changes.blocks[name] = _put(model, name, Skip())


def _cut_in_place(tensor: Tensor, axes: Mapping[int, Tensor]) -> None:
    """Cut a stored tensor, and its gradient: it stays the same object."""
    grad = tensor.grad if tensor.is_leaf else None
    if grad is not None:
        tensor.grad = None  # first: torch refuses a gradient of another shape
    tensor.data = cut(tensor.data, axes)
    if grad is not None:
        tensor.grad = cut(grad, axes)


def _resize(tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        if tensor.is_leaf:
            tensor.grad = None
        tensor.data = tensor.data.new_zeros(shape)


def _has(model: nn.Module, name: str) -> bool:
    parent, _, key = name.rpartition(".")
    modules = dict(model.named_modules())
    return parent in modules and key in modules[parent]._modules


def _put(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put a module in another's place; gives the other."""
    parent, _, key = name.rpartition(".")
    owner = model.get_submodule(parent)
    old = owner._modules[key]
    assert old is not None
    new.train(old.training)
    owner._modules[key] = new
    return old


def _like(block: nn.Module, model: nn.Module) -> nn.Module:
    """The block on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return block.to(device)


def _plain(value: object) -> object:
    # A checkpoint may hold a tuple as a list.
    return tuple(value) if isinstance(value, list) else copy.copy(value)
