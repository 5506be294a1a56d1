"""The state of a run, kept and returned to while it trains."""

from __future__ import annotations

import copy
from typing import Any, TypedDict

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_map

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
        "optimizers": [_copy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers],
        "averages": [_copy(dict(average.state_dict())) for average in averages(trainer)],
        "callbacks": [_copy(callback.keep()) for callback in compressing(trainer)],
    }


def go_back(trainer: pl.Trainer, pl_module: pl.LightningModule, state: RunState) -> None:
    """Return to what was kept, bit for bit; learning rates and the Trainer's clock go on."""
    # Weights come first: callbacks look at them as they go back.
    pl_module.load_state_dict(state["weights"])
    for optimizer, known in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": _copy(known)})
    for average, weights in zip(averages(trainer), state["averages"], strict=True):
        average.load_state_dict(weights)
    for callback, known in zip(compressing(trainer), state["callbacks"], strict=True):
        callback.go_back(pl_module, _copy(known))


def _copy(values: object) -> Any:
    """The same structure with tensors of its own."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x), values)
