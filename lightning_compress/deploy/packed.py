"""The smallest checkpoint that loads back bit for bit: one safetensors file, read without pickle.

A tensor is written as the bits that tell which values are not zero and as those values alone, where that is smaller
(bitmask format, Han 2015, arXiv:1510.00149, stored relative indices instead), and byte by byte: all exponents, then all
first bytes of the mantissas, and so on, each compressed by zstd (the shuffle of HDF5 and Blosc). Exponents of trained
weights are alike and shrink to two bits; mantissas are noise and cost what they are. Bytes are little-endian.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_compress.pruning.surgery import restore_structure, structure_of

__all__ = ["load_packed", "save_packed"]

_KEY, _VERSION = "lightning_compress.packed", 1
_LEVEL = 9  # beyond it .0006 of the dense bytes are won, in ten times the time
_SMALL = 2**10  # bytes below which a frame for each part costs more than it wins


def save_packed(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write the weights in the fewest bytes; what was at the path stays until the new file is whole.

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
    state = model.state_dict() if isinstance(model, nn.Module) else model
    blobs: dict[str, np.ndarray] = {}
    entries: dict[str, dict[str, Any]] = {}
    seen: dict[Any, str] = {}
    for name in sorted(state):
        value = state[name]
        _check_plain(name, value)
        value = value.detach()
        first = seen.setdefault(_identity(value), name) if value.numel() else name
        if first == name:
            entries[name], blobs[name] = _encode(value)
        else:
            entries[name] = {"encoding": "tied", "to": first}
    structure = structure_of(model) if isinstance(model, nn.Module) else {}
    content = {"version": _VERSION, "tensors": entries, "structure": structure if any(structure.values()) else {}}
    _write(Path(path), save(blobs, {_KEY: _dump({**content, "crc32": _checksum(content)})}))


def load_packed(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The state dict of a packed file, bit for bit as it was saved, on the CPU; tensors that were tied are one.

    Args:
        path: The file, written by :func:`save_packed`.
        model: Loads the weights too, if given; its names and shapes must be those of the file, but for channels and
            blocks that were removed: the model takes the structure of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of another kind, or is not of this model.

    Example:
        >>> load_packed("model.safetensors", MyModule())  # doctest: +SKIP
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file. Give the path of a file of save_packed.")
    try:
        state, structure = _read(Path(path))
    except (SafetensorError, zstandard.ZstdError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"path={str(path)!r}: this is no whole file of save_packed ({error}). Accepted is what save_packed of this "
            "or an earlier version wrote: save it again, or load other checkpoints by torch.load or safetensors."
        ) from error
    if model is not None:
        if structure or any(structure_of(model).values()):
            restore_structure(model, structure, state)
        _check_fits(state, model.state_dict(), path)
        model.load_state_dict(state)
    return state


def _encode(value: Tensor) -> tuple[dict[str, Any], np.ndarray]:
    """The entry of the index, and the bytes: frames of zstd that hold zero bits, signs of zeros, and values by byte."""
    words, is_float = _words(value)
    entry: dict[str, Any] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    values, bits = words, 8 * words.itemsize
    kept = words > 1 if is_float else words != 0  # the sign is the lowest bit: 0 is +0, 1 is -0
    num_values = int(np.count_nonzero(kept))
    parts = []
    entry["encoding"] = "bytes"
    if (len(words) - num_values) * bits > len(words):
        values, negative = words[kept], words[~kept] != 0
        parts.append(np.packbits(kept))
        entry |= {"encoding": "bitmask", "num_values": num_values}
        if negative.any():
            parts.append(np.packbits(negative))
            entry["encoding"] = "bitmask+signs"
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), words.itemsize)
    parts += [np.ascontiguousarray(planes[:, i]) for i in reversed(range(words.itemsize))]
    if sum(part.size for part in parts) < _SMALL:
        parts = [np.concatenate(parts)]
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    return entry, np.frombuffer(b"".join(compressor.compress(part.data) for part in parts), np.uint8)


def _decode(entry: dict[str, Any], blob: np.ndarray) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    itemsize, num = _word_size(dtype), math.prod(entry["shape"]) * (2 if dtype.is_complex else 1)
    if entry["encoding"] not in ("bytes", "bitmask", "bitmask+signs"):
        raise ValueError(f"encoding {entry['encoding']!r} is not known to this version")
    num_values = entry.get("num_values", num)
    num_bits = [] if entry["encoding"] == "bytes" else [num]
    num_bits += [num - num_values] if entry["encoding"] == "bitmask+signs" else []
    sizes = [math.ceil(n / 8) for n in num_bits] + [num_values] * itemsize
    frames = zstandard.ZstdDecompressor().stream_reader(blob.data, read_across_frames=True)
    data = np.frombuffer(frames.read(), np.uint8)
    if len(data) != sum(sizes):
        raise ValueError(f"{len(data)} bytes where {sum(sizes)} were expected")
    parts = np.split(data, np.cumsum(sizes)[:-1])
    words = np.stack(parts[len(num_bits) :][::-1], 1).reshape(-1).view(f"u{itemsize}")
    if num_bits:
        kept, *signs = (np.unpackbits(p, count=n).view(bool) for p, n in zip(parts, num_bits, strict=False))
        values, words = words, np.zeros(num, words.dtype)
        words[kept] = values
        for negative in signs:
            words[~kept] = negative
    if dtype.is_floating_point or dtype.is_complex:
        words = (words >> 1) | (words << (8 * itemsize - 1))
    return torch.from_numpy(words.view(np.uint8)).view(dtype).view(entry["shape"])


def _words(value: Tensor) -> tuple[np.ndarray, bool]:
    """The values' bits as unsigned integers, the sign of floats moved behind the mantissa; whether they are floats."""
    value = value.cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    size = _word_size(value.dtype)
    words = value.view(torch.uint8).numpy().view(f"u{size}")
    is_float = value.dtype.is_floating_point or value.dtype.is_complex
    return ((words << 1) | (words >> (8 * size - 1)) if is_float else words), is_float


def _word_size(dtype: torch.dtype) -> int:
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


def _identity(value: Tensor) -> Any:
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride(), value.is_conj(), value.is_neg()


def _check_plain(name: str, value: Any) -> None:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    if not plain or value.is_meta or is_traceable_wrapper_subclass(value):
        raise ValueError(
            f"{name} is {type(value).__name__}: accepted are plain dense tensors that hold values. Leave it out: "
            "save_packed({k: v for k, v in model.state_dict().items() if k != " + repr(name) + "}, path)."
        )


def _check_fits(state: Mapping[str, Tensor], ours: Mapping[str, Any], path: str | Path) -> None:
    there, here = ({k: tuple(v.shape) for k, v in s.items() if isinstance(v, Tensor)} for s in (state, ours))
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    wrong = [f"{n} is {there.get(n, 'missing')} there and {here.get(n, 'missing')} here" for n in names]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(
            f"path={str(path)!r} is of another model: {'; '.join(wrong[:5])}{more}. "
            "Build the model with the arguments it was saved with, or give its own file."
        )


def _dump(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(_dump(content).encode())


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "np") as file:
        metadata = (file.metadata() or {}).get(_KEY)
        if metadata is None:
            raise ValueError(f"its metadata has no {_KEY!r}")
        content = json.loads(metadata)
        if content.pop("crc32") != _checksum(content):
            raise ValueError("the checksum of its index is wrong")
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}, and this package reads version {_VERSION}")
        state: dict[str, Tensor] = {}
        for name, entry in content["tensors"].items():
            state[name] = state[entry["to"]] if "to" in entry else _decode(entry, file.get_tensor(name))
    return state, content["structure"]
