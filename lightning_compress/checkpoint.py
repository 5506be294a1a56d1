"""Load a compressed LightningModule from its checkpoint, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from lightning_compress.quantization.model import quantize_layers
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.structure.record import restore_structure, structure_of

__all__ = ["callback_state", "check_structure", "follow_structure", "load_from_checkpoint"]

T = TypeVar("T")


def load_from_checkpoint(
    module_class: type[T], path: str | Path, *, scheme: Scheme | None = None, **kwargs: object
) -> T:
    """The model of a checkpoint as it was trained: pruned weights zero, quantized layers quantizing.

    Args:
        module_class: The LightningModule's class.
        path: The checkpoint, written by a Trainer with any callbacks of this package or none.
        scheme: The quantization scheme, when it uses quantizers of your own.
        kwargs: Passed to ``module_class.load_from_checkpoint`` (hyper-parameters, ``map_location``, ``strict``).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the checkpoint quantizes modules that the model has not.

    Example:
        A training must have written the checkpoint; the README's example is one, and is run by the tests.

        >>> model = load_from_checkpoint(MyModule, "last.ckpt")  # doctest: +SKIP
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such checkpoint. Give the path of a .ckpt file.")
    with _following(module_class):
        model = module_class.load_from_checkpoint(path, **kwargs)  # type: ignore[attr-defined]
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state: Any = _found(checkpoint, "quantization")
    if state is not None:
        quantization = quantize_layers(model, scheme or Scheme.from_state(state["scheme"]))
        quantization.load_state_dict(model, state)
    return model


def callback_state(checkpoint: dict[str, Any], part: str) -> dict[str, Any] | None:
    """The state of the callback that wrote a part of this name, whatever its class and its key; None where none did."""
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    return next((state for state in states if isinstance(state.get(part), dict) and state[part]), None)


def _found(checkpoint: dict[str, Any], part: str) -> dict[str, Any] | None:
    """A part that a callback wrote into its state; None where none did."""
    state = callback_state(checkpoint, part)
    return None if state is None else state[part]


def follow_structure(model: torch.nn.Module, checkpoint: dict[str, Any]) -> None:
    """Bring a model to the shapes of a checkpoint whose callbacks removed channels or blocks, or to the dense ones.

    Args:
        model: The model that is to load its weights.
        checkpoint: A whole checkpoint of a Trainer.
    """
    structure = _found(checkpoint, "structure") or {}
    if structure or structure_of(model)["shapes"] or structure_of(model)["removed"]:
        restore_structure(model, structure, checkpoint["state_dict"])


def check_structure(model: torch.nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
    """Raise if a checkpoint's weights do not fit the model, naming what differs.

    Args:
        model: The model that is to load them.
        state_dict: The checkpoint's weights.
        strict: Whether names must agree both ways.

    Raises:
        ValueError: If a shape, or (strict) a name, differs.
    """
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}
    theirs = {name: tuple(value.shape) for name, value in state_dict.items() if hasattr(value, "shape")}
    wrong = [f"{k} is {theirs[k]} there and {ours[k]} here" for k in ours if k in theirs and ours[k] != theirs[k]]
    if strict:
        wrong += [f"{k} is missing there" for k in ours if k not in theirs]
        wrong += [f"{k} is unknown here" for k in theirs if k not in ours]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(
            f"The checkpoint is of another structure: {'; '.join(wrong[:5])}{more}. "
            "Build the model with the arguments it was trained with, or give another checkpoint."
        )


@contextmanager
def _following(module_class: Any) -> Iterator[None]:
    """Let modules of a class take a checkpoint's structure before its weights: their own hook is the only place."""
    own = module_class.on_load_checkpoint

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        own(self, checkpoint)
        follow_structure(self, checkpoint)

    with patch.object(module_class, "on_load_checkpoint", on_load_checkpoint):
        yield
