"""The state of a run, kept and returned to while it trains."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl

from .protocol import averages, compressing

__all__ = ["go_back", "keep"]


def keep(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Copies of weights and buffers, of what the optimizers know, of averages, and of what the callbacks keep."""
    return {
        "weights": _copy(pl_module.state_dict()),
        "optimizers": [_copy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers],
        "averages": [_copy(average.state_dict()) for average in averages(trainer)],
        "callbacks": [_copy(callback.keep()) for callback in compressing(trainer)],
    }


def go_back(trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any]) -> None:
    """Return to what was kept, bit for bit; learning rates and the Trainer's clock go on."""
    pl_module.load_state_dict(state["weights"])
    for optimizer, known in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": _copy(known)})
    for average, weights in zip(averages(trainer), state["averages"], strict=True):
        average.load_state_dict(weights)
    for callback, known in zip(compressing(trainer), state["callbacks"], strict=True):
        callback.go_back(pl_module, _copy(known))


def _copy(values: Any) -> Any:
    return copy.deepcopy(_detached(values))


def _detached(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _detached(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_detached(value) for value in values]
    return values.detach() if hasattr(values, "detach") else values
