"""What an optimizer holds: others that it wraps, and values of a parameter's shape at any depth of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "change_state",
    "forget_states",
    "innermost",
    "may_swap",
    "scale_state",
    "states_of",
    "unfit",
    "with_wrapped",
]

_STATE = ("state", "param_groups", "defaults")


def with_wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it wraps, the outermost first."""
    found = {id(optimizer): optimizer}
    queue = [optimizer]
    while queue:
        attributes = [value for key, value in vars(queue.pop()).items() if key not in _STATE]
        for value in tree_leaves(attributes):
            if isinstance(value, Optimizer) and id(value) not in found:
                found[id(value)] = value
                queue.append(value)
    return list(found.values())


def may_swap(optimizer: Optimizer) -> bool:
    """Whether it may put other values into the weights outside of its step.

    Such are the optimizers with ``train()`` and ``eval()``, and those that wrap another one.
    """
    modes = (getattr(optimizer, name, None) for name in ("train", "eval"))
    return all(callable(mode) for mode in modes) or len(with_wrapped(optimizer)) > 1


def states_of(optimizer: Optimizer) -> Iterator[tuple[Optimizer, Tensor, Any]]:
    """Each parameter with its state; of wrapped optimizers too, and each state once."""
    seen: set[int] = set()
    for each in with_wrapped(optimizer):
        if id(each.state) in seen:
            continue
        seen.add(id(each.state))
        for p, state in list(each.state.items()):
            if isinstance(p, Tensor):
                yield each, p, state


def unfit(state: object, p: Tensor) -> list[str]:
    """What of a parameter's state is neither of its shape nor a plain value, by its keys."""
    items = state.items() if isinstance(state, Mapping) else [(type(state).__name__, state)]
    return [str(key) for key, value in items if any(not _is_fit(leaf, p) for leaf in tree_leaves(value))]


def _is_fit(value: object, p: Tensor) -> bool:
    if isinstance(value, Tensor):
        return value.numel() <= 1 or value.shape == p.shape
    return value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device)


def change_state(state: Any, p: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Put something else in the place of every value of a parameter's shape, at any depth of its state."""

    def changed(value: object) -> object:
        return change(value) if isinstance(value, Tensor) and value.dim() and value.shape == p.shape else value

    for key, value in state.items():
        state[key] = tree_map(changed, value)


def scale_state(state: object, p: Tensor, factors: Tensor) -> None:
    """Multiply every floating-point value of a parameter's shape in its state, in place.

    Whole numbers are left alone: they are codes of values, or counts.
    """
    for value in tree_leaves(state):
        if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point():
            value.mul_(factors.to(value.device))


def innermost(optimizer: Optimizer) -> Optimizer:
    """The one that takes the steps, where one wraps another."""
    return with_wrapped(optimizer)[-1]


def forget_states(optimizer: Optimizer) -> None:
    """Let it begin anew with every parameter."""
    for each, p, _ in states_of(optimizer):
        del each.state[p]
