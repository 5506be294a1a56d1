"""What the two callbacks that quantize share: how they take hold of the one quantization of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_compress.checkpoint import callback_state
from lightning_compress.checks import check_instance
from lightning_compress.layers import know
from lightning_compress.pruning.prunable import check_finite
from lightning_compress.quantization.fake_quant import hold_on
from lightning_compress.quantization.model import ModelQuantization, quantization_of, quantize_layers
from lightning_compress.quantization.placement import find_placement
from lightning_compress.quantization.processes import Processes
from lightning_compress.quantization.schemes import Scheme, int8
from lightning_compress.quantization.schemes import scheme as scheme_of
from lightning_compress.quantization.state import QuantizationState
from lightning_compress.watch import Watch

from .evaluate import copied, run_training_step
from .raw_layers import know_layers, tell_share

log = logging.getLogger(__name__)

__all__ = [
    "as_scheme",
    "attach",
    "foreign_state",
    "give_parameters",
    "give_values",
    "is_wrapped",
    "processes_of",
    "revert_norms",
    "shortfalls",
    "trace",
]


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
        ValueError: If the model is quantized by another scheme, and only looked at; if the state does not fit; or
            if weights are NaN or infinite.
    """
    name = type(callback).__name__
    if anew:
        check_finite(name, model)
    if anew or state is not None:
        if state is None:
            know_layers(callback, model.trainer, model)
        else:  # which may be where the model is attached to no Trainer any more
            know(model, state.get("layers", {}))
    found = quantization_of(model)
    if found is not None and anew and found.is_stale(model):
        found.remove(model)
        found = None
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
    if found is None and anew:
        tell_share(callback, model, quantization.layers, quantization.skipped, "quantizes")
    if found is None and quantization.skipped:
        left = "; ".join(f"{layer}: {reason}" for layer, reason in quantization.skipped.items())
        rank_zero_info(f"{name} leaves alone {left}")
    if state is not None:
        quantization.load_state_dict(model, state)
    hold_on(model, quantization.activations)
    return quantization


def give_parameters(model: nn.Module) -> None:
    """Let optimizers be made of ``layer.weight`` where another fit has quantized the layer; to call in ``setup``."""
    found = quantization_of(model)
    if found is not None:
        found.give_parameters()


def give_values(model: nn.Module) -> None:
    """Let the layers compute as before :func:`give_parameters`."""
    found = quantization_of(model)
    if found is not None:
        found.enable(found.enabled)


def revert_norms(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let a model have its plain batch norms back and keep their quantizers; to call in ``teardown``.

    ``sync_batchnorm=True`` puts other modules in their place, and Lightning reverts that when no hook follows.
    """
    sync = getattr(trainer.strategy, "_layer_sync", None)
    quantization = quantization_of(pl_module)
    if sync is not None and quantization is not None and trainer.state.fn == TrainerFn.FITTING:
        sync.revert(pl_module)
        hold_on(pl_module, quantization.activations)


def foreign_state(callback: pl.Callback, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a quantization that a checkpoint holds under another callback's name.

    Up to version 0.1 ``QuantizationAwareTraining(phase=None)`` wrote what ``PostTrainingQuantization`` reads.
    """
    if callback.state_key in checkpoint.get("callbacks", {}):
        return None
    return callback_state(checkpoint, "quantization")


def trace(trainer: pl.Trainer, pl_module: pl.LightningModule, quantization: ModelQuantization, only: bool) -> None:
    """Watch the training batch that begins, to find where activations are quantized.

    Args:
        trainer: The Trainer of the run.
        pl_module: The model.
        quantization: Its quantization, without a placement.
        only: Whether no other batch follows that could be observed: then a copy is watched in a step of its own, and
            this batch is observed.
    """
    if only:
        copy_ = copied(pl_module)
        try:
            with Watch(copy_) as watch:
                run_training_step(trainer, copy_)
        except Exception as error:  # a step that cannot run alone: the model itself is watched
            log.debug("A copy could not be watched: %s", error)
        else:
            names = {layer.module_name for layer in quantization.layers}
            placement = find_placement(watch.trace, copy_, names)
            quantization.place(pl_module, processes_of(trainer).share(placement))
            return
    quantization.start_tracing(pl_module, is_wrapped(trainer))


def shortfalls(asked: Mapping[str, float], quantization: ModelQuantization | None, reached: bool) -> dict[str, str]:
    """What is not reached of the bits that were asked for, with the reason where it is not that the run was short."""
    if quantization is not None and not quantization.layers:
        skipped = "; ".join(f"{name}: {reason}" for name, reason in quantization.skipped.items())
        return dict.fromkeys(asked, f"there is nothing to quantize{f' ({skipped})' if skipped else ''}")
    if not reached:
        return dict.fromkeys(asked, "")
    assert quantization is not None
    activations = quantization.activations.values()
    if activations and not any(activation.has_seen for activation in activations):
        return dict.fromkeys(asked, "no batch was observed: the weights are quantized, and no activation is")
    return {}


def is_wrapped(trainer: pl.Trainer) -> bool:
    """Whether the strategy calls the model by a module of its own, as DDP does."""
    return trainer.strategy.model is not trainer.lightning_module


def processes_of(trainer: pl.Trainer) -> Processes:
    """The processes of a run."""
    return Processes(trainer.world_size, trainer.strategy.root_device)
