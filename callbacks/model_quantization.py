"""What the two callbacks that quantize share: how they take hold of the one quantization of a model."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.checkpoint import callback_state
from lightning_compress.checks import check_instance
from lightning_compress.quantization.model import ModelQuantization, quantization_of, quantize_layers
from lightning_compress.quantization.processes import Processes
from lightning_compress.quantization.schemes import Scheme, int8
from lightning_compress.quantization.schemes import scheme as scheme_of
from lightning_compress.quantization.state import QuantizationState

__all__ = ["as_scheme", "attach", "foreign_state", "is_wrapped", "processes_of"]


def as_scheme(name: str, given: Scheme | str | None) -> Scheme:
    """The scheme of an argument: int8 without one, that of a word.

    Raises:
        TypeError: If it is neither a Scheme nor a word.
        ValueError: If there is no such word.
    """
    if given is None:
        return int8()
    if isinstance(given, str):
        return scheme_of(given)
    check_instance(name, given, Scheme, "a Scheme, for instance int8(), or its word such as 'w4a8'")
    return given


def attach(
    callback: pl.Callback,
    model: pl.LightningModule,
    scheme: Scheme,
    state: QuantizationState | None,
    anew: bool = False,
) -> ModelQuantization:
    """Upgrade the layers, still in float, and restore the state of a checkpoint.

    A model that another run has quantized by another scheme begins anew where it is to be quantized. Where it is only
    looked at, that is refused: as it was trained it can be looked at without this callback.

    Args:
        callback: Who asks.
        model: The model.
        scheme: The callback's scheme.
        state: What the callback found in a checkpoint.
        anew: Whether the model is to be quantized, rather than looked at.

    Raises:
        ValueError: If the model is quantized by another scheme, and only looked at; or if the state does not fit.
    """
    name = type(callback).__name__
    found = quantization_of(model)
    if found is not None and not found.is_by(scheme):
        if found.enabled and state is None and not anew:
            raise ValueError(
                f"{name}.scheme={scheme}: the model is quantized by another one, {found.scheme}. Accepted is the "
                "scheme that it was trained with. Give that one, leave this callback out, or give ckpt_path= a "
                "checkpoint of this scheme."
            )
        found.remove(model)
        found = None
    quantization = quantize_layers(model, scheme)
    if found is None and quantization.skipped:
        left = "; ".join(f"{layer}: {reason}" for layer, reason in quantization.skipped.items())
        rank_zero_info(f"{name} leaves alone {left}")
    if state is not None:
        quantization.load_state_dict(model, state)
    return quantization


def foreign_state(callback: pl.Callback, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a quantization that a checkpoint holds under another callback's name.

    Up to version 0.1 ``QuantizationAwareTraining(phase=None)`` wrote what ``PostTrainingQuantization`` reads.
    """
    if callback.state_key in checkpoint.get("callbacks", {}):
        return None
    return callback_state(checkpoint, "quantization")


def is_wrapped(trainer: pl.Trainer) -> bool:
    """Whether the strategy calls the model by a module of its own, as DDP does."""
    return trainer.strategy.model is not trainer.lightning_module


def processes_of(trainer: pl.Trainer) -> Processes:
    """The processes of a run."""
    return Processes(trainer.world_size, trainer.strategy.root_device)
