"""Weights from a file, whatever wrote it: a checkpoint, a bare state dict, safetensors or a packed file."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_compress.checkpoint import few, read_checkpoint, saved_structure, unreadable
from lightning_compress.checks import first_line
from lightning_compress.deploy.packed import is_packed, read_packed
from lightning_compress.layers import plain_name
from lightning_compress.structure.record import restore_structure, structure_of

__all__ = ["read_weights", "that_fit"]

# keys under which others keep the weights
_NESTED = ("state_dict", "model", "model_state_dict")
_DEEPEST = 2  # parts of a name that are taken for a prefix


def read_weights(
    name: str, path: str | Path, model: nn.Module, weights_only: bool | None = None
) -> tuple[dict[str, Any], str]:
    """The weights of a file by the names of a model, which takes the file's structure.

    Args:
        name: The argument as a user writes it, such as ``"init_from"``.
        path: A checkpoint of Lightning, a state dict saved by torch, also below a key such as ``"state_dict"``, a
            ``.safetensors`` file or the ``.index.json`` of several, or a file of ``save_packed``.
        model: The model that is to take them. Prefixes of wrappers (``module.``, ``_orig_mod.``), and one that most
            names there or here begin with, such as ``model.``, may differ.
        weights_only: As that of ``torch.load``; False makes the objects of a file that is trusted.

    Returns:
        The weights, and in words what was done to their names; empty for nothing.

    Raises:
        ValueError: If the file cannot be read, holds no weights or several, or its structure is another model's.
    """
    state, structure = _read(name, Path(path), weights_only)
    if any(structure.values()) or any(structure_of(model).values()):
        try:
            restore_structure(model, structure, state)
        except Exception as error:
            raise ValueError(
                f"{name}={str(path)!r} is of another structure: {first_line(error)}. Accepted is a file of this model."
            ) from error
    return _named_as_here(state, model.state_dict().keys())


def that_fit(of: str, model: nn.Module, weights: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The weights that have the name and the shape of one of the model's, and in words what is left out.

    Args:
        of: What holds them, in words.
        model: The model.
        weights: By the model's names.

    Raises:
        ValueError: If none has.
    """
    ours = model.state_dict()
    fit = {name: value for name, value in weights.items() if name in ours and ours[name].shape == value.shape}
    if not fit:
        raise ValueError(
            f"{of}: none of its {len(weights)} tensors ({few(list(weights))}) has the name and shape of one of the "
            f"{len(ours)} here ({few(list(ours))}). Accepted is a file that shares some. Give another one."
        )
    left = [name for name in weights if name not in fit]
    new = [name for name in ours if name not in fit]
    said = [f"left out {len(left)} of its tensors ({few(left)})"] if left else []
    said += [f"{len(new)} here begin anew ({few(new)})"] if new else []
    return fit, "; ".join(said)


def _read(name: str, path: Path, weights_only: bool | None) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The weights by the file's own names, and the structure that goes with them."""
    if path.suffix == ".json":
        return _read_shards(name, path, weights_only), {}
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"
        if is_safetensors and is_packed(path):
            return read_packed(path)
        if is_safetensors:
            return load_file(path), {}
    except OSError:
        raise
    except Exception as error:
        raise unreadable(name, path, first_line(error)) from error
    found = read_checkpoint(name, path, weights_only=weights_only, holds=())
    return _weights_in(name, path, found), saved_structure(found)


def _read_shards(name: str, path: Path, weights_only: bool | None) -> dict[str, Any]:
    """The weights of several files beside an index, as transformers writes them."""
    try:
        files = set(json.loads(path.read_text())["weight_map"].values())
        strange = [file for file in files if Path(file).name != file]
    except Exception as error:
        raise unreadable(name, path, first_line(error)) from error
    if strange:
        raise unreadable(name, path, f"it names {strange[0]!r}, which is not beside it")
    shards = [_read(name, path.with_name(file), weights_only)[0] for file in sorted(files)]
    return {key: value for shard in shards for key, value in shard.items()}


def _weights_in(name: str, path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that a file holds, as it is or below a key."""
    nested = {key: value for key, value in found.items() if _is_state(value)}
    key = next((key for key in _NESTED if key in nested), None)
    if key is None and len(nested) == 1:
        (key,) = nested
    if key is not None:
        return dict(nested[key])
    if not nested and _is_state(found):
        return dict(found)
    keys = ", ".join(map(repr, [*(nested or found)][:8]))
    reason = f"it holds several: {keys}" if nested else f"it holds none: {keys or 'nothing'}"
    raise unreadable(name, path, f"of weights {reason}")


def _is_state(value: object) -> bool:
    names = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return names and any(isinstance(entry, Tensor) for entry in value.values())  # type: ignore[attr-defined]


def _named_as_here(state: Mapping[str, Any], ours: Any) -> tuple[dict[str, Any], str]:
    """The weights by our names, where these differ in a prefix; and what differs."""
    here = {plain_name(name): name for name in ours}
    there = {plain_name(name): value for name, value in state.items()}
    theirs, mine = _prefixes(list(there), list(here))
    renamed = {
        mine + name.removeprefix(theirs) if name.startswith(theirs) else name: value for name, value in there.items()
    }
    said = f"{theirs!r} of its names is {mine!r} here" if theirs != mine else ""
    return {here.get(name, name): value for name, value in renamed.items()}, said


def _prefixes(there: list[str], here: list[str]) -> tuple[str, str]:
    """The prefix of names there and that of names here with which most agree; none, unless most do."""
    ends = defaultdict(list)
    for name in here:
        for prefix, rest in _splits(name):
            ends[rest].append(prefix)
    votes = Counter({("", ""): 0})
    for name in there:
        for prefix, rest in _splits(name):
            votes.update((prefix, ours) for ours in ends.get(rest, ()))
    best = max(votes, key=lambda pair: (votes[pair], -len(pair[0]) - len(pair[1])))
    return best if 2 * votes[best] > min(len(there), len(here)) else ("", "")


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A name as prefix and rest."""
    parts = name.split(".")
    for i in range(min(_DEEPEST, len(parts) - 1) + 1):
        yield "".join(f"{part}." for part in parts[:i]), ".".join(parts[i:])
