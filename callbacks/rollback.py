"""The state of a run, kept and returned to while it trains."""

from __future__ import annotations

import copy
from typing import Any, TypedDict

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_compress.structure.held import with_wrapped

from .protocol import averages, compressing

__all__ = ["HeldState", "RunState", "go_back", "keep"]


class RunState(TypedDict):
    """Copies of all that training changes."""

    weights: dict[str, Any]
    optimizers: list[dict[str, Any]]
    averages: list[dict[str, Any]]
    callbacks: list[Any]


class HeldState(TypedDict):
    """A state that was judged and held: the metric, the level that was asked for, and the step."""

    value: float
    level: float
    step: int
    state: RunState


def keep(trainer: pl.Trainer, pl_module: pl.LightningModule) -> RunState:
    """Copy weights and buffers, the optimizers' state, averages, and what the compressing callbacks keep."""
    return {
        "weights": _copy(dict(pl_module.state_dict())),
        "optimizers": [_copy(known) for optimizer in trainer.optimizers for known in _known(optimizer)],
        "averages": [_copy(dict(average.state_dict())) for average in averages(trainer)],
        "callbacks": [_copy(callback.keep()) for callback in compressing(trainer)],
    }


def go_back(trainer: pl.Trainer, pl_module: pl.LightningModule, state: RunState) -> None:
    """Return to what was kept, bit for bit; learning rates and the Trainer's clock go on."""
    # Weights come first: callbacks look at them as they go back.
    pl_module.load_state_dict(state["weights"])
    plain = [each for optimizer in trainer.optimizers for each in with_wrapped(optimizer)]
    for optimizer, known in zip(plain, state["optimizers"], strict=True):
        _restore(optimizer, _copy(known))
    for average, weights in zip(averages(trainer), state["averages"], strict=True):
        average.load_state_dict(weights)
    for callback, known in zip(compressing(trainer), state["callbacks"], strict=True):
        callback.go_back(pl_module, _copy(known))


def _known(optimizer: Optimizer) -> list[dict[Any, Any]]:
    """What an optimizer, and each that it wraps, keeps; with a parameter's place in the stead of the parameter."""
    found = []
    for each in with_wrapped(optimizer):
        places = _places(each)
        found.append({places.get(id(key), key): known for key, known in each.state.items()})
    return found


def _restore(optimizer: Optimizer, known: dict[Any, Any]) -> None:
    """Put it back; what comes from a checkpoint goes to where its parameter is."""
    places = _places(optimizer)
    params = {places[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    before = dict(optimizer.state)
    optimizer.state.clear()
    for key, state in known.items():
        p = params.get(key)
        if p is None:
            optimizer.state[key] = state
        else:
            optimizer.state[p] = {name: _placed(value, before.get(p, {}).get(name), p) for name, value in state.items()}


def _placed(value: object, before: object, p: Tensor) -> object:
    if isinstance(before, Tensor) and isinstance(value, Tensor):
        return value.to(before.device)
    return tree_map(lambda x: x.to(p.device) if isinstance(x, Tensor) and x.dim() else x, value)


def _places(optimizer: Optimizer) -> dict[int, int]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {id(p): place for place, p in enumerate(params)}


def _copy(values: object) -> Any:
    """The same structure with tensors of its own."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x), values)
