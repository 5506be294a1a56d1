"""Load a compressed LightningModule from its checkpoint, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from lightning_compress.checks import check_instance, check_path, first_line, refusal
from lightning_compress.layers import know
from lightning_compress.objects import objects_in
from lightning_compress.quantization.model import restore_quantization
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.structure.record import restore_structure, structure_of

__all__ = [
    "add_records",
    "callback_state",
    "check_structure",
    "few",
    "follow_structure",
    "load_from_checkpoint",
    "read_checkpoint",
    "saved_structure",
    "unreadable",
]

T = TypeVar("T")

# what a callback tells of the model, and a loader cannot do without
_PARTS = ("structure", "quantization")
_LOST = (
    ": it holds weights alone (save_weights_only=True) and no word of the shape that channels or blocks left behind. "
    "Save it anew with a callback of this package beside ModelCheckpoint"
)


def load_from_checkpoint(
    module_class: type[T], path: str | Path, *, scheme: Scheme | None = None, **kwargs: object
) -> T:
    """The model of a checkpoint as it was trained: pruned weights zero, quantized layers quantizing.

    Args:
        module_class: The LightningModule's class.
        path: The checkpoint, written by a Trainer with any callbacks of this package or none.
        scheme: The quantization scheme, when it uses quantizers of your own.
        kwargs: Passed to ``module_class.load_from_checkpoint``: hyper-parameters, ``map_location``, ``strict``,
            ``hparams_file``, and ``weights_only=False`` for a file that you trust and that holds objects.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is cut or no checkpoint, or does not fit the model.

    Example:
        A training must have written the checkpoint; the README's example is one, and is run by the tests.

        >>> model = load_from_checkpoint(MyModule, "last.ckpt")  # doctest: +SKIP
    """
    name = "load_from_checkpoint"
    loads = isinstance(module_class, type) and hasattr(module_class, name)
    if not loads:
        fix = "Give the class itself, not an object of it or its name."
        raise refusal(f"{name}.module_class", module_class, "the class of a LightningModule", fix, TypeError)
    check_path(f"{name}.path", path, "the path of a .ckpt file")
    if scheme is not None:
        check_instance(f"{name}.scheme", scheme, Scheme, "a Scheme, for instance int8(), or None")
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such checkpoint. Give the path of a .ckpt file.")
    plain: Any = kwargs.get("weights_only")
    checkpoint = read_checkpoint("path", path, weights_only=plain)
    with _following(module_class, path):
        try:
            model = _loaded(module_class, path, kwargs)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            lost = "" if "callbacks" in checkpoint else _LOST
            raise ValueError(
                f"path={str(path)!r} does not fit {module_class.__name__}{lost}. Build it with the arguments that it "
                f"was trained with, or give another checkpoint. {error}"
            ) from error
    with _damaged(path):
        know(model, _found(checkpoint, "layers") or {})
    state: Any = _found(checkpoint, "quantization")
    if state is not None:
        with _damaged(path):
            how = scheme or Scheme.from_state(state["scheme"])
            restore_quantization(model, how, state)
    return model


def _loaded(module_class: Any, path: str | Path, options: Mapping[str, object]) -> Any:
    try:
        return module_class.load_from_checkpoint(path, **options)
    except TypeError as error:
        # a class that loads in a way of its own may say by itself whether objects are read
        if "weights_only" not in options or "weights_only" not in str(error):
            raise
    return module_class.load_from_checkpoint(path, **{k: v for k, v in options.items() if k != "weights_only"})


def read_checkpoint(
    name: str,
    path: str | Path,
    load: Callable[[], Any] | None = None,
    holds: Collection[str] = ("state_dict",),
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """A checkpoint on the CPU, from a file that may be anything.

    Args:
        name: The argument as a user writes it, such as ``"ckpt_path"``.
        path: What was given.
        load: Reads the file in another way.
        holds: Keys that it must have.
        weights_only: As that of ``torch.load``; False makes the objects of a file that is trusted.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or is not a checkpoint of Lightning.
    """
    try:
        found = load() if load is not None else torch.load(path, map_location="cpu", weights_only=weights_only)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever torch, zip or pickle say of a file that is cut or foreign
        raise unreadable(name, path, first_line(error)) from error
    if isinstance(found, torch.nn.Module):  # saved whole, and loaded by weights_only=False
        found = {"state_dict": found.state_dict()}
    if not isinstance(found, dict):
        raise unreadable(name, path, f"it holds {type(found).__name__}")
    missing = [key for key in holds if key not in found]
    if missing:
        raise unreadable(name, path, f"it has no {missing[0]!r}")
    return found


def unreadable(name: str, path: str | Path, reason: str) -> ValueError:
    """The error of a file that is no checkpoint, or one with objects in it that were not asked for."""
    objects = objects_in(path)
    if objects:
        more = f" (and {len(objects) - 3} more)" if len(objects) > 3 else ""
        return ValueError(
            f"{name}={str(path)!r} holds more than plain values: {'; '.join(objects[:3])}{more}. Accepted are plain "
            "values, and objects with weights_only=False, if you trust the file; or leave them out of "
            "save_hyperparameters (ignore=[...])."
        )
    return ValueError(
        f"{name}={str(path)!r} cannot be read as a checkpoint: {reason}. Accepted is a whole .ckpt file that Lightning "
        "wrote, with plain values (or weights_only=False, if you trust it). Give another one: this may have been cut "
        "while it was written or copied."
    )


def callback_state(checkpoint: dict[str, Any], part: str) -> dict[str, Any] | None:
    """The state of the callback that wrote a part of this name, whatever its class and its key; None where none did."""
    callbacks = checkpoint.get("callbacks")
    states = [state for state in callbacks.values() if isinstance(state, dict)] if isinstance(callbacks, dict) else []
    return next((state for state in states if isinstance(state.get(part), dict) and state[part]), None)


def saved_structure(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """How the model of a checkpoint differs from its dense self; empty where it does not."""
    return _found(checkpoint, "structure") or {}


def add_records(checkpoint: dict[str, Any], states: Mapping[str, Any]) -> None:
    """Let a checkpoint of weights alone tell the shape and the quantization of its model.

    Lightning leaves the state of callbacks out of it (``ModelCheckpoint(save_weights_only=True)``), and nothing could
    load a model that lost channels.

    Args:
        checkpoint: What Lightning is about to write.
        states: Of all callbacks, by their keys; those that tell it are added.
    """
    told = {
        key: state for key, state in states.items() if any(isinstance(state, dict) and state.get(p) for p in _PARTS)
    }
    if told:
        checkpoint["callbacks"] = told


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
    structure = saved_structure(checkpoint)
    if structure or structure_of(model)["shapes"] or structure_of(model)["removed"]:
        restore_structure(model, structure, checkpoint["state_dict"])


def check_structure(
    model: torch.nn.Module, state_dict: dict[str, Any], strict: bool = True, of: str = "The checkpoint"
) -> None:
    """Raise if a checkpoint's weights do not fit the model, naming what differs.

    Args:
        model: The model that is to load them.
        state_dict: The checkpoint's weights.
        strict: Whether names must agree both ways.
        of: What is to be loaded, in words.

    Raises:
        ValueError: If a shape, or (strict) a name, differs.
    """
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}
    theirs = {name: tuple(value.shape) for name, value in state_dict.items() if hasattr(value, "shape")}
    wrong = [f"{k} is {theirs[k]} there and {ours[k]} here" for k in ours if k in theirs and ours[k] != theirs[k]]
    differences = {"of another shape": wrong}
    if strict:
        differences["missing there"] = [name for name in ours if name not in theirs]
        differences["unknown here"] = [name for name in theirs if name not in ours]
    said = [f"{len(names)} {kind} ({few(names)})" for kind, names in differences.items() if names]
    if said:
        raise ValueError(
            f"{of} is of another structure: {'; '.join(said)}. "
            "Build the model with the arguments it was trained with, or give another checkpoint."
        )


def few(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _damaged(path: str | Path) -> Iterator[None]:
    """An error with the file's name for a record that no callback has written."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"path={str(path)!r}: the record of its callbacks cannot be used ({first_line(error)}). Give a checkpoint "
            "that a Trainer wrote, of this model."
        ) from error


@contextmanager
def _following(module_class: Any, path: str | Path) -> Iterator[None]:
    """Let modules of a class take a checkpoint's structure before its weights: their own hook is the only place."""
    own = module_class.on_load_checkpoint

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        own(self, checkpoint)
        with _damaged(path):
            follow_structure(self, checkpoint)

    with patch.object(module_class, "on_load_checkpoint", on_load_checkpoint):
        yield
