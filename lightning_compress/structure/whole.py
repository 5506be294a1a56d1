"""A change of shape is whole, or it has not happened."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.structure.held import with_wrapped

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(models: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Undo what has been changed so far where an error ends it: tensors, gradients, attributes, parts, states.

    Only what is put in the place of something else is undone; nothing is copied but dicts and lists.

    Args:
        models: Models that change.
        optimizers: Optimizers that change with them.
    """
    modules = [module for model in models for module in model.modules()]
    attributes = [(module, dict(module.__dict__), _changes_of(module)) for module in modules]
    parts: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in modules:
        parts += [(held, dict(held)) for held in (module._parameters, module._buffers, module._modules)]
    tensors = [(x, x.data, x.grad if x.is_leaf else None) for module in modules for x in _tensors(module)]
    every = [each for optimizer in optimizers for each in with_wrapped(optimizer)]
    states = [(optimizer, _of_optimizer(optimizer)) for optimizer in every]
    try:
        yield
    except BaseException:
        for module, own, changes in attributes:
            module.__dict__.clear()
            module.__dict__.update({**own, **changes})
        for held, before in parts:
            held.clear()
            held.update(before)
        for x, data, gradient in tensors:
            if x.is_leaf:
                x.grad = None
            x.data = data
            if gradient is not None:
                x.grad = gradient
        for optimizer, (state, groups) in states:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = params
        raise


def _changes_of(module: nn.Module) -> dict[str, Any]:
    """What hangs on a module and says how it differs from its dense self, as it is now."""
    found: dict[str, Any] = {}
    for key, value in module.__dict__.items():
        if key == "_compress_structure":
            own = {field.name: _of_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
            found[key] = dataclasses.replace(value, **own)
    return found


def _of_dict(value: Any) -> Any:
    """A dict, and the dicts in it, copied."""
    return {key: _of_dict(own) for key, own in value.items()} if type(value) is dict else value


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for owned in (module._parameters, module._buffers):
        yield from (x for x in owned.values() if x is not None)


def _of_optimizer(optimizer: Optimizer) -> tuple[dict[Any, Any], list[list[Any]]]:
    state = {p: dict(own) if isinstance(own, dict) else own for p, own in optimizer.state.items()}
    return state, [list(group["params"]) for group in optimizer.param_groups]
