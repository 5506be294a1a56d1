"""Runs in processes that the Trainer launches itself, by ``ddp_spawn``, ``ddp_fork`` or ``ddp_notebook``.

The Trainer that a user holds takes no step then. Lightning copies it into processes of its own, and brings back no more
than the weights and what was logged. It calls no hook where the user is, so its launcher is extended: once, when the
callbacks are imported, and of no effect for Trainers without one of them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypedDict

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_compress.quantization.model import quantization_of, restore_quantization
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.structure.record import Structure, restore_structure, structure_of

from .post_training import PostTrainingQuantization
from .protocol import Exporting, Following, Phased, Settling, State, Targeted, all_callbacks
from .verdict import Verdict, end_with_verdict

__all__ = ["bring_back"]

# Lightning's own; it has no public names for them
_collect = _MultiProcessingLauncher.get_extra_results
_recover = _MultiProcessingLauncher._recover_results_in_main_process  # noqa: SLF001
_FILE = "lightning_compress"  # its path, among the results that Lightning passes on

_Key = tuple[str, str, int]


class _Left(TypedDict):
    """What a run leaves of a callback: its state, and other attributes by name."""

    state: State
    attributes: dict[str, Any]


class _Run(TypedDict):
    """What a run leaves behind, beside the weights that Lightning passes on.

    Args:
        weights: The weights, where Lightning passes on none.
        shapes: Shapes of the weights.
        structure: How the model differs from its dense self.
        scheme: By what it is quantized; None where it is not.
        quantization: How.
        callbacks: What is left of each callback.
    """

    weights: dict[str, Any] | None
    shapes: dict[str, torch.Size]
    structure: Structure
    scheme: Scheme | None
    quantization: Any
    callbacks: dict[_Key, _Left]


def bring_back() -> None:
    """Let Lightning's launcher bring back what a compressed run leaves behind."""
    launcher: Any = _MultiProcessingLauncher
    launcher.get_extra_results = _send
    launcher._recover_results_in_main_process = _receive  # noqa: SLF001


def _send(launcher: _MultiProcessingLauncher, trainer: pl.Trainer) -> dict[str, Any]:
    """In the first of the launched processes, when its run is over."""
    extra = _collect(launcher, trainer)
    if _changes_model(trainer):
        path = Path(mkdtemp()) / "run.pt"
        # A file and not a value, for a pipe takes 64 KiB: it is read only when this process is over.
        torch.save(_leave(trainer), path)
        extra[_FILE] = str(path)
    return extra


def _receive(launcher: _MultiProcessingLauncher, output: Any, trainer: pl.Trainer) -> None:
    """In the process that launched them, when all are over."""
    path = output.extra.pop(_FILE, None)
    if path is None:
        _recover(launcher, output, trainer)
        return
    run: _Run = torch.load(path, map_location="cpu", weights_only=False)  # it may hold quantizers of a user's own
    shutil.rmtree(Path(path).parent)
    fits = _take_shape(trainer, trainer.lightning_module, run)
    _recover(launcher, output, trainer)
    if fits:
        _take(trainer, trainer.lightning_module, run)


def _changes_model(trainer: pl.Trainer) -> bool:
    """Whether the run was one that changes a model, with callbacks that take part in that."""
    if trainer.state.fn == TrainerFn.VALIDATING:
        return any(isinstance(callback, PostTrainingQuantization) for callback in all_callbacks(trainer))
    return trainer.state.fn == TrainerFn.FITTING and any(True for _ in _ours(trainer))


def _ours(trainer: pl.Trainer) -> Iterator[tuple[_Key, pl.Callback]]:
    """The callbacks of the protocol, each with a key that is the same in all processes."""
    counts: Counter[tuple[str, str]] = Counter()
    # A list that grows is gone through to its end.
    for callback in all_callbacks(trainer):
        if isinstance(callback, Phased | Following | Targeted | Exporting | Settling) or hasattr(callback, "leaves"):
            kind = type(callback).__qualname__, callback.state_key
            counts[kind] += 1
            yield (*kind, counts[kind]), callback


def _leave(trainer: pl.Trainer) -> _Run:
    """In a launched process: what it leaves behind."""
    model = trainer.lightning_module
    weights = model.state_dict()
    quantization = quantization_of(model)
    return {
        "weights": None if trainer.state.fn == TrainerFn.FITTING else weights,
        "shapes": {name: value.shape for name, value in weights.items() if isinstance(value, Tensor)},
        "structure": structure_of(model),
        "scheme": None if quantization is None else quantization.scheme,
        "quantization": None if quantization is None else quantization.state_dict(),
        "callbacks": {
            key: {
                "state": callback.state_dict(),
                "attributes": {name: getattr(callback, name) for name in getattr(callback, "leaves", ())},
            }
            for key, callback in _ours(trainer)
        },
    }


def _take_shape(trainer: pl.Trainer, model: pl.LightningModule, run: _Run) -> bool:
    """Where the user is: give the model the shape of the one that was trained; False where that cannot be."""
    quantization = quantization_of(model)
    if quantization is not None:
        quantization.remove(model)
    if run["shapes"].keys() - model.state_dict().keys():
        model.trainer = trainer  # which it may ask
        model.configure_model()
    expected = {name: torch.empty(shape, device="meta") for name, shape in run["shapes"].items()}
    restore_structure(model, run["structure"], expected)
    missing = sorted(run["shapes"].keys() - model.state_dict().keys())
    if missing:
        rank_zero_warn(
            f"The trained model has {', '.join(missing[:5])}, made in the processes that the Trainer launched. The one "
            "in this process has not, so it is not the trained one. Load a checkpoint, make these parts in __init__ or "
            "in configure_model, or train with Trainer(strategy='ddp')."
        )
    return not missing


def _take(trainer: pl.Trainer, model: pl.LightningModule, run: _Run) -> None:
    """Where the user is: let model and callbacks be what a run in this very process would have made of them.

    Raises:
        TargetMissed: If a strict callback has missed its target.
    """
    if run["weights"] is not None:
        model.load_state_dict(run["weights"])
    if run["scheme"] is not None:
        restore_quantization(model, run["scheme"], run["quantization"])
    if trainer.state.fn == TrainerFn.FITTING:
        end_with_verdict(trainer)
    for key, callback in _ours(trainer):
        left = run["callbacks"].get(key)
        if left is None:
            continue
        if left["state"]:
            callback.load_state_dict(left["state"])
        vars(callback).update(left["attributes"])
        if isinstance(callback, Settling):
            callback.settle(trainer, model)
    for callback in all_callbacks(trainer):
        if isinstance(callback, Verdict):
            callback.raise_missed()
