"""Which raw parameters of a model are layers: found by watching a step of a copy, before any layer is looked for."""

from __future__ import annotations

from collections.abc import Iterator as Once
from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_compress.checks import first_line
from lightning_compress.layers import Layer, know, known, raw_parameters, weights_in_own_forwards
from lightning_compress.multiplied import find_axes
from lightning_compress.share import share_taken
from lightning_compress.trace import Trace
from lightning_compress.watch import Watch

from .evaluate import copied, run_training_step, training_data
from .live_shape import is_model_parallel
from .rehearsal import rehearse
from .run import on_rank_zero

__all__ = ["know_layers", "tell_share"]


def know_layers(
    callback: pl.Callback, trainer: pl.Trainer, model: pl.LightningModule, told: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Let a model know by which raw parameters it multiplies; nothing runs where it has none, or knows it already.

    Args:
        callback: Who asks, for the messages.
        trainer: The Trainer of the run, for its data.
        model: The model.
        told: What a checkpoint says; empty of one that does not know of raw parameters, which has no such layers.

    Returns:
        What each axis of each raw parameter is, by name, for a checkpoint.
    """
    if told is not None:
        know(model, told)
    elif not (raw_parameters(model).keys() | weights_in_own_forwards(model).keys()) <= known(model).keys():
        if is_model_parallel(trainer):
            rank_zero_info(f"{type(callback).__name__} finds no layers among raw parameters that are sharded.")
        else:
            know(model, on_rank_zero(trainer, lambda: _find(callback, trainer, model)))
    return known(model)


def _find(callback: pl.Callback, trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, str]:
    try:
        return find_axes(model, _traces(trainer, model))
    except Exception as error:  # whatever a step or its data raise
        rank_zero_warn(
            f"{type(callback).__name__} takes no raw parameters for layers: none of the model's steps runs on a copy "
            f"({first_line(error)})."
        )
        return {}


def _traces(trainer: pl.Trainer, model: pl.LightningModule) -> Sequence[Trace]:
    """What happens in a training step, or in any step where that cannot run alone."""
    if trainer.state.fn == TrainerFn.FITTING and not _is_read_once(trainer):
        watched = copied(model)
        try:
            with Watch(watched) as watch:
                run_training_step(trainer, watched)
        except Exception:  # a step that cannot run alone
            return _rehearsed(trainer, model)
        return [watch.trace]
    return _rehearsed(trainer, model)


def _rehearsed(trainer: pl.Trainer, model: pl.LightningModule) -> Sequence[Trace]:
    found = rehearse(trainer, model)
    if not found.traces:
        raise RuntimeError("; ".join(found.failed.values()) or "there is none")
    return found.traces


def _is_read_once(trainer: pl.Trainer) -> bool:
    """Whether a batch that is looked at would be lost to the run."""
    loaders = tree_leaves(training_data(trainer).instance)
    return any(isinstance(x, Once) or isinstance(getattr(x, "dataset", None), Once) for x in loaders)


def tell_share(
    callback: pl.Callback, model: nn.Module, layers: Sequence[Layer], skipped: Mapping[str, str], does: str
) -> None:
    """Print how much of a model a callback takes; warn if that is less than half of the weights that multiply.

    Args:
        callback: The callback.
        model: The model.
        layers: The layers that it takes.
        skipped: What it leaves alone, with the reason.
        does: What it does to them, such as ``"prunes"``.
    """
    share = share_taken(model, layers, skipped)
    words = f"{type(callback).__name__} {does} {share.words}"
    if share.is_small:
        rank_zero_warn(f"{words} The largest that it leaves alone: {share.largest}.")
    else:
        rank_zero_info(words)
