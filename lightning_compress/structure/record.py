"""A change of shape is a record: applied to a model and all that holds on to it, and replayed before weights load."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.structure.channels import plain_name

__all__ = [
    "Record",
    "Skip",
    "apply_record",
    "check_optimizer",
    "cut_state",
    "is_removed",
    "kept_by_id",
    "restore_structure",
    "structure_of",
    "tensors_by_name",
]

Record = dict[str, Any]
"""``kept``: indices by tensor name and axis; ``attributes``: new values by module name; ``removed``: block names."""

_ATTRIBUTE = "_compress_structure"


class Skip(nn.Identity):
    """Stands where a block stood, and takes whatever arguments it took."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first argument."""
        return input


@dataclass
class _Changes:
    """What differs between a model and its dense self."""

    dense: dict[str, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    blocks: dict[str, nn.Module] = field(default_factory=dict)


@torch.no_grad()
def apply_record(
    model: nn.Module,
    record: Record,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> None:
    """Shrink a model and what trains it. Parameters keep their identity, names and order.

    Args:
        model: The live model.
        record: What is kept, by name.
        optimizers: Optimizers of its parameters; their state shrinks alike.
        copies: Other models with the same names, such as an average of its weights.
    """
    kept = kept_by_id(model, record)
    before = {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        for p in list(optimizer.state):
            if id(p) in kept:
                _select_state(optimizer, p, kept[id(p)])
    for each in (model, *copies):
        _shrink(each, record)
    gone = before - {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in gone:
                    optimizer.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) not in gone]


def kept_by_id(model: nn.Module, record: Record) -> dict[int, dict[int, Tensor]]:
    """The indices that a record keeps of a model's parameters, by axis, by the parameter's id."""
    named = model.named_parameters(remove_duplicate=False)
    return {id(p): record["kept"][name] for name, p in named if name in record["kept"]}


def is_removed(name: str, record: Record) -> bool:
    """Whether a record removes what has this name, be it named with the prefixes of ``torch.compile`` or without."""
    plain = plain_name(name) + "."
    return any(plain.startswith(plain_name(block) + ".") for block in record["removed"])


def cut_state(state_dict: Mapping[str, Tensor], record: Record) -> dict[str, Tensor]:
    """What a record leaves of weights that were remembered before it was applied."""
    left = {name: value for name, value in state_dict.items() if not is_removed(name, record)}
    return {name: _cut(value, record["kept"].get(name, {})) for name, value in left.items()}


def structure_of(model: nn.Module) -> dict[str, Any]:
    """How a model differs from its dense self: plain values, saved in a checkpoint beside the weights.

    Returns:
        ``attributes`` by module name, dense ``shapes`` by tensor name, and names of ``removed`` blocks.
    """
    changes = _changes(model)
    return {
        "attributes": {name: dict(values) for name, values in changes.attributes.items()},
        "shapes": {name: list(shape) for name, shape in changes.shapes.items()},
        "removed": list(changes.blocks),
    }


@torch.no_grad()
# blocks, then attributes, then shapes: each needs the one before
def restore_structure(model: nn.Module, structure: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:  # noqa: C901
    """Bring a model to a saved structure, smaller or larger than it is, so that the weights can be loaded.

    What the structure does not name stays as it is: a checkpoint of another model is still refused when it loads.

    Args:
        model: Any instance of the model.
        structure: What :func:`structure_of` gave; empty for the dense model.
        state_dict: The weights that are to be loaded; they give the shapes.
    """
    changes = _changes(model)
    removed = structure.get("removed", [])
    for name in list(changes.blocks):
        if name not in removed:
            _put(model, name, _like(changes.blocks.pop(name), model))
    for name in removed:
        if name not in changes.blocks and _has(model, name):
            changes.blocks[name] = _put(model, name, Skip())
    wanted, modules = structure.get("attributes", {}), dict(model.named_modules())
    for name in {*changes.dense, *wanted} & modules.keys():
        module, dense = modules[name], changes.dense.setdefault(name, {})
        for key in wanted.get(name, {}):
            dense.setdefault(key, getattr(module, key, None))
        for key, value in dense.items():
            setattr(module, key, _plain(wanted.get(name, {}).get(key, value)))
    changes.attributes = {name: dict(values) for name, values in wanted.items() if name in modules}
    tensors, shapes = tensors_by_name(model), structure.get("shapes", {})
    named = {**changes.shapes, **shapes}.keys() & tensors.keys()
    dense_shapes = {name: changes.shapes.get(name, list(tensors[name].shape)) for name in sorted(named)}
    changes.shapes = {}
    for name, dense_shape in dense_shapes.items():
        if name in state_dict and dense_shape == list(shapes.get(name, dense_shape)):
            _resize(tensors[name], state_dict[name].shape)
        if name in shapes:
            changes.shapes[name] = dense_shape


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise unless an optimizer's state can shrink with the parameters: it must have their shape.

    Raises:
        ValueError: If it keeps state of other shapes.
    """
    wrong = "its history of whole gradients" if isinstance(optimizer, torch.optim.LBFGS) else ""
    if not wrong and optimizer.param_groups:
        p = next((p for group in optimizer.param_groups for p in group["params"]), torch.zeros(1))
        probe = nn.Parameter(torch.zeros(4, 6, dtype=p.dtype, device=p.device))
        probe.grad = torch.ones_like(probe)
        try:
            options = {**optimizer.defaults, "lr": float(optimizer.defaults.get("lr", 1e-3))}
            trial: Any = type(optimizer)([probe], **options)
            trial.step()
            state = dict(trial.state[probe])
        except Exception:  # an optimizer that cannot be made of its defaults shows its state when it has some
            state = {}
        wrong = ", ".join(_unfit(state, probe)) or wrong
        for p, state in optimizer.state.items():
            wrong = wrong or ", ".join(_unfit(state, p))
    if wrong:
        raise ValueError(
            f"{type(optimizer).__name__} keeps state that cannot shrink with its parameters ({wrong}). Accepted are "
            "optimizers whose state has the parameters' shape: SGD, Adam, AdamW, RMSprop, NAdam, Adagrad, Lion."
        )


def _unfit(state: Mapping[str, Any], p: Tensor) -> list[str]:
    return [k for k, v in state.items() if isinstance(v, Tensor) and v.numel() > 1 and v.shape != p.shape]


def _changes(model: nn.Module) -> _Changes:
    return model.__dict__.setdefault(_ATTRIBUTE, _Changes())


def _shrink(model: nn.Module, record: Record) -> None:
    changes, modules, tensors = _changes(model), dict(model.named_modules()), tensors_by_name(model)
    done: set[int] = set()
    for name in record["kept"]:
        changes.shapes.setdefault(name, list(tensors[name].shape))
    for name, axes in record["kept"].items():
        tensor = tensors[name]
        if id(tensor) not in done:
            done.add(id(tensor))
            _select(tensor, axes)
    for name, values in record["attributes"].items():
        dense, new = changes.dense.setdefault(name, {}), changes.attributes.setdefault(name, {})
        for key, value in values.items():
            dense.setdefault(key, getattr(modules[name], key))
            new[key] = value
            setattr(modules[name], key, value)
    for name in record["removed"]:
        changes.blocks[name] = _put(model, name, Skip())


def _select(tensor: Tensor, axes: Mapping[int, Tensor]) -> None:
    """Cut a stored tensor, and its gradient, in place: it stays the same object."""
    grad, tensor.grad = (tensor.grad, None) if tensor.is_leaf else (None, None)
    tensor.data = _cut(tensor.data, axes)
    if grad is not None:
        tensor.grad = _cut(grad, axes)


def _cut(values: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    for axis, keep in axes.items():
        values = values.index_select(axis, keep.to(values.device))
    return values.contiguous()


def _select_state(optimizer: torch.optim.Optimizer, p: Tensor, axes: Mapping[int, Tensor]) -> None:
    state = optimizer.state[p]
    if unfit := _unfit(state, p):
        raise ValueError(
            f"{type(optimizer).__name__} keeps state that cannot shrink with its parameters ({', '.join(unfit)}). "
            "Take an optimizer whose state has the parameters' shape, such as SGD or AdamW."
        )
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == p.shape and value.dim():
            state[key] = _cut(value, axes)


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Stored parameters and buffers, shared ones under each of their names."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


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


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else copy.copy(value)
