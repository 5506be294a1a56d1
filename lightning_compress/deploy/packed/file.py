"""The smallest checkpoint that loads back bit for bit: one safetensors file, read without pickle.

It holds two arrays of bytes: ``data``, the bytes of one tensor behind those of the other, and ``index``, the compressed
JSON that says what they are (:mod:`~lightning_compress.deploy.packed.codec`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_compress.checks import check_instance, check_path, first_line
from lightning_compress.deploy.packed.claims import check_content, read_index
from lightning_compress.deploy.packed.codec import decode, encode, encode_quantized, same_bits
from lightning_compress.files import write_whole
from lightning_compress.quantization.fake_quant import computes_weight, weights
from lightning_compress.quantization.model import check_whole, quantization_of, restore_quantization
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.structure.record import restore_structure, structure_of

__all__ = ["is_packed", "load_packed", "read_packed", "save_packed"]

_KEY = "lightning_compress.packed"
_VERSION = 2
# a weight as its quantizer shows it, its levels, their scales, and the axis of the scales
Shown = tuple[Tensor, Tensor, Tensor, int]


def save_packed(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write the weights in few bytes; the file that was at the path stays until the new one is whole.

    Of a quantized model the file holds the values that its layers compute with, as codes, with every zero +0; and where
    activations are quantized too, all that :func:`load_packed` needs to do so again. Weights that a layer computes from
    others stand there as those, in floats, and are quantized again where the file is loaded into a model.

    Args:
        model: The model, or its state dict.
        path: The file to write, ``.safetensors`` by custom.

    Raises:
        ValueError: If something in the state dict is not a plain tensor.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_packed(nn.Linear(3, 2), path)
        >>> {name: tuple(value.shape) for name, value in load_packed(path).items()}
        {'bias': (2,), 'weight': (2, 3)}
    """
    check_instance("save_packed.model", model, (nn.Module, Mapping), "an nn.Module or its state dict")
    check_path("save_packed.path", path, "the path of the file to write")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    quantized = dict(_quantized(model)) if isinstance(model, nn.Module) else {}
    blobs: list[bytes] = []
    entries: dict[str, dict[str, Any]] = {}
    seen: dict[Any, str] = {}
    for name in sorted(state):
        value = state[name]
        _check_plain(name, value)
        value = value.detach()
        first = seen.setdefault(_identity(value), name) if value.numel() else name
        if first != name and _shown_alike(quantized.get(first), quantized.get(name)):
            entries[name] = {"encoding": "tied", "to": first}
            continue
        if name in quantized:
            entry, blob = encode_quantized(value, *quantized[name])
        else:
            entry, blob = encode(value)
        entries[name] = {**entry, "bytes": len(blob), "crc32": zlib.crc32(blob)}
        blobs.append(blob)
    structure = structure_of(model) if isinstance(model, nn.Module) else {}
    content = {
        "tensors": entries,
        "structure": structure if any(structure.values()) else {},
        "quantization": _quantization(model) if isinstance(model, nn.Module) else {},
    }
    index = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(_dump(content).encode())
    parts = {"data": b"".join(blobs), "index": index}
    write_whole(path, save({k: np.frombuffer(v, np.uint8) for k, v in parts.items()}, {_KEY: str(_VERSION)}))


def load_packed(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The state dict of a packed file, bit for bit as it was saved, on the CPU; tensors that were tied are one.

    Args:
        path: The file, written by :func:`save_packed`.
        model: Loads the weights too, if given; its names and shapes must be those of the file, but for channels and
            blocks that were removed: the model takes the structure of the file, and quantizes its activations if the
            saved one did.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of another kind, or is not of this model.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> trained = nn.Linear(3, 2)
        >>> save_packed(trained, path)
        >>> model = nn.Linear(3, 2)
        >>> sorted(load_packed(path, model))
        ['bias', 'weight']
        >>> torch.equal(model.weight, trained.weight)
        True
    """
    check_path("load_packed.path", path, "the path of a file of save_packed")
    if model is not None:
        check_instance("load_packed.model", model, nn.Module, "an nn.Module, or None for the state dict alone")
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file. Give the path of a file of save_packed.")
    with _damage(path):
        state, content = _read(Path(path))
    if model is not None:
        with _damage(path):
            structure = content["structure"]
            if structure or any(structure_of(model).values()):
                restore_structure(model, structure, state)
        _check_fits(state, model.state_dict(), path)
        model.load_state_dict(state)
        with _damage(path):
            if content.get("quantization"):  # not in a file from before they were kept
                _quantize(model, content["quantization"])
    return state


def is_packed(path: str | Path) -> bool:
    """Whether a safetensors file is one of :func:`save_packed`.

    Raises:
        SafetensorError: If it is no safetensors file.
    """
    with safe_open(path, "np") as file:
        return _KEY in (file.metadata() or {})


def read_packed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a packed file, and how its model differs from a dense one.

    Raises:
        ValueError: If the file is damaged.
    """
    with _damage(path):
        state, content = _read(Path(path))
    return state, content["structure"]


@contextmanager
def _damage(path: str | Path) -> Iterator[None]:
    """Whatever a file that is damaged, or of another kind, leads to is one error with the file's name."""
    try:
        yield
    except OSError:  # of the disk, not of what it holds
        raise
    except Exception as error:
        # raised by the code that takes a value for what it is not, whose words would explain nothing
        is_blind = isinstance(error, AttributeError | IndexError | KeyError | RecursionError | TypeError)
        of_other_kinds = "what it says of its tensors is of other kinds than save_packed writes"
        reason = of_other_kinds if is_blind else first_line(error)
        raise ValueError(
            f"path={str(path)!r}: this is no whole file of save_packed ({reason}). Accepted is what "
            "save_packed of this or an earlier version wrote: save it again, or load other checkpoints by torch.load "
            "or safetensors."
        ) from error


@torch.no_grad()
def _quantized(model: nn.Module) -> Iterator[tuple[str, Shown]]:
    """By name, the weights that a quantizer shows: as shown, and as levels and scales along an axis."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for parameter, fake_quantize in weights(module).items():
            if not fake_quantize.enabled or computes_weight(module):
                continue
            weight = module._parameters[parameter]
            axis = fake_quantize.axis or 0
            codes, qparams = fake_quantize.codes(weight)
            scale = qparams.scale.float()
            if scale.dim():
                channels = codes.movedim(axis, 0)
                unscaled = qparams._replace(scale=torch.ones_like(scale), axis=0)
                rows = fake_quantize.quantizer.dequantize(channels.reshape(len(scale), -1).float(), unscaled)
                levels = rows.view(channels.shape).movedim(0, axis)
            else:
                levels = codes
            shown = fake_quantize(weight) + 0.0  # no code tells -0 from 0
            yield f"{prefix}.{parameter}".lstrip("."), (shown, levels + 0.0, scale, axis)


def _quantization(model: nn.Module) -> dict[str, Any]:
    """What quantizes the activations of a model, as plain values, with the parameters of its weights; or nothing."""
    check_whole(model)
    quantization = quantization_of(model)
    if quantization is None:
        return {}
    computed = [layer for layer in quantization.layers if layer.source and weights(layer.module)["weight"].enabled]
    if not computed and not any(a.enabled for a in quantization.activations.values()):
        return {}
    state: Any = quantization.state_dict()
    for layer in quantization.layers:  # held, the parameters give the weights of the file again
        if not weights(layer.module)[layer.parameter].enabled:
            continue
        _, qparams = weights(layer.module)[layer.parameter].codes(layer.multiplied)
        state["learned"].setdefault(layer.name, {k: v for k, v in qparams._asdict().items() if v is not None})
    return state


def _quantize(model: nn.Module, state: Any) -> None:
    """Let a model quantize as the saved one did."""
    restore_quantization(model, Scheme.from_state(state["scheme"]), state)


def _identity(value: Tensor) -> tuple[object, ...]:
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride(), value.is_conj(), value.is_neg()


def _check_plain(name: str, value: Any) -> None:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    if not plain or value.is_meta or is_traceable_wrapper_subclass(value):
        raise ValueError(
            f"{name} is {type(value).__name__}: accepted are plain dense tensors that hold values. Leave it out: "
            "save_packed({k: v for k, v in model.state_dict().items() if k != " + repr(name) + "}, path)."
        )


def _check_fits(state: Mapping[str, Tensor], ours: Mapping[str, Any], path: str | Path) -> None:
    there = {name: tuple(value.shape) for name, value in state.items()}
    here = {name: tuple(value.shape) for name, value in ours.items() if isinstance(value, Tensor)}
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    wrong = [f"{n} is {there.get(n, 'missing')} there and {here.get(n, 'missing')} here" for n in names]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(
            f"path={str(path)!r} is of another model: {'; '.join(wrong[:5])}{more}. "
            "Build the model with the arguments it was saved with, or give its own file."
        )


def _dump(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=_to_plain)


def _to_plain(value: Tensor) -> dict[str, Any]:
    return {"dtype of tensor": str(value.dtype).removeprefix("torch."), "values": value.detach().cpu().tolist()}


def _shown_alike(a: Shown | None, b: Shown | None) -> bool:
    """Whether two names of one weight show it alike: both plain, or quantized to the same values."""
    if a is None or b is None:
        return a is b
    return same_bits(a[0], b[0])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the index."""
    with safe_open(path, "np") as file:
        version = (file.metadata() or {}).get(_KEY)
        if version is None:
            raise ValueError(f"its metadata has no {_KEY!r}")
        if version != str(_VERSION):
            raise ValueError(f"version {version}, and this package reads version {_VERSION}")
        content = read_index(file.get_tensor("index").tobytes())
        data = file.get_tensor("data").reshape(-1).view(np.uint8)
    check_content(content, path.stat().st_size)
    state: dict[str, Tensor] = {}
    begin = 0
    for name, entry in content["tensors"].items():
        if "to" in entry:
            state[name] = state[entry["to"]]
            continue
        blob = data[begin : begin + entry["bytes"]]
        begin += entry["bytes"]
        if zlib.crc32(blob) != entry["crc32"]:
            raise ValueError(f"the checksum of {name} is wrong")
        state[name] = decode(entry, blob)
    if begin != len(data):
        raise ValueError(f"{len(data)} bytes where {begin} were expected")
    return state, content
