"""The smallest checkpoint that loads back bit for bit: one safetensors file, read without pickle.

A tensor is written as the places of its values that are not zero and as those values alone, where that is smaller: the
distances between them (Han 2016, arXiv:1510.00149), or a bit a place where they are dense. Up to 256 different values
are a table and an index each; so is a weight that shares its levels with other channels but for a scale each, as all
quantizers write them. Other values are written byte by byte: all exponents, then all first bytes of the mantissas, and
so on (the shuffle of HDF5 and Blosc). Each part is compressed by zstd: exponents of trained weights are alike and
shrink to two bits, distances and indices come near their entropy; mantissas are noise and cost what they are. Bytes
are little-endian.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.model import quantization_of, quantize_layers
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.structure.record import restore_structure, structure_of

__all__ = ["load_packed", "save_packed"]

_KEY, _VERSION = "lightning_compress.packed", 2
# Weights repeat themselves by chance alone: short matches cost more than the entropy coder that they bypass.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(9, strategy=zstandard.STRATEGY_DFAST, min_match=7)
_SMALL = 2**10  # bytes below which a frame for each part costs more than it wins
_FEW = 256  # values that a byte tells apart
_ENCODINGS = {"bytes", "bitmask", "gaps", "signs", "table"}


def save_packed(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write the weights in the fewest bytes; what was at the path stays until the new file is whole.

    Of a quantized model the file holds the values that its layers compute with, as codes, with every zero +0; and where
    activations are quantized too, all that :func:`load_packed` needs to do so again.

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
    quantized = dict(_quantized(model)) if isinstance(model, nn.Module) else {}
    blobs: list[bytes] = []
    entries: dict[str, dict[str, Any]] = {}
    seen: dict[Any, str] = {}
    for name in sorted(state):
        value = state[name]
        _check_plain(name, value)
        value = value.detach()
        first = seen.setdefault(_identity(value), name) if value.numel() else name
        if first != name and _same(quantized.get(first), quantized.get(name)):
            entries[name] = {"encoding": "tied", "to": first}
            continue
        entry, blob = _encode_quantized(value, *quantized[name]) if name in quantized else _encode(value)
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
    _write(Path(path), save({k: np.frombuffer(v, np.uint8) for k, v in parts.items()}, {_KEY: str(_VERSION)}))


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
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file. Give the path of a file of save_packed.")
    try:
        state, content = _read(Path(path))
        structure = content["structure"]
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
        if content.get("quantization"):
            _quantize(model, content["quantization"])
    return state


def _encode(value: Tensor) -> tuple[dict[str, Any], bytes]:
    """The entry of the index, and the bytes: frames of zstd that hold places, signs of zeros, table, and values."""
    words, is_float = _words(value)
    entry: dict[str, Any] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    values, bits = words, 8 * words.itemsize
    kept = words > 1 if is_float else words != 0  # the sign is the lowest bit: 0 is +0, 1 is -0
    num_values = int(np.count_nonzero(kept))
    encoding, parts = [], []
    if (len(words) - num_values) * bits > len(words):
        values, negative = words[kept], words[~kept] != 0
        gaps = _to_gaps(kept) if num_values < len(words) / 8 else None
        if gaps is not None and len(gaps) < len(words) / 8:
            encoding, parts = ["gaps"], [gaps]
            entry["num_gaps"] = len(gaps)
        else:
            encoding, parts = ["bitmask"], [np.packbits(kept)]
        entry["num_values"] = num_values
        if negative.any():
            encoding.append("signs")
            parts.append(np.packbits(negative))
    table = np.unique(values) if len(np.unique(values[:4096])) <= _FEW else values
    if len(table) <= _FEW and len(table) * words.itemsize + len(values) < len(values) * words.itemsize:
        encoding.append("table")
        entry["num_levels"] = len(table)
        parts += [*_planes(table), _join(np.searchsorted(table, values), len(table))]
    else:
        parts += _planes(values)
    if sum(part.size for part in parts) < _SMALL:
        parts = [np.concatenate(parts)]
    compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    blob = b"".join(compressor.compress(part.data) for part in parts)
    return {**entry, "encoding": "+".join(encoding) or "bytes"}, blob


def _decode(entry: dict[str, Any], blob: np.ndarray) -> Tensor:
    encoding = entry["encoding"].split("+")
    unknown = set(encoding) - _ENCODINGS
    if unknown:
        raise ValueError(f"encoding {sorted(unknown)[0]!r} is not known to this version")
    if "scale" in entry:
        end = entry["scale"]["bytes"]
        levels = {**entry, "dtype": entry["scale"]["levels"]}
        del levels["scale"]
        scaled = _scaled(_decode(levels, blob[end:]), _decode(entry["scale"], blob[:end]), entry["scale"]["axis"])
        return scaled.to(getattr(torch, entry["dtype"]))
    dtype = getattr(torch, entry["dtype"])
    itemsize, num = _word_size(dtype), math.prod(entry["shape"]) * (2 if dtype.is_complex else 1)
    num_values = entry.get("num_values", num)
    sizes = {
        "gaps": entry.get("num_gaps", 0),
        "bitmask": math.ceil(num / 8),
        "signs": math.ceil((num - num_values) / 8),
    }
    sizes = {name: size for name, size in sizes.items() if name in encoding}
    num_words = entry["num_levels"] if "table" in encoding else num_values
    sizes |= {f"plane {i}": num_words for i in reversed(range(itemsize))}
    if "table" in encoding:
        sizes["index"] = math.ceil(num_values / _digits(num_words))
    data = np.frombuffer(
        zstandard.ZstdDecompressor().stream_reader(blob.data, read_across_frames=True).read(), np.uint8
    )
    if len(data) != sum(sizes.values()):
        raise ValueError(f"{len(data)} bytes where {sum(sizes.values())} were expected")
    parts = dict(zip(sizes, np.split(data, np.cumsum([*sizes.values()])[:-1]), strict=True))
    words = np.stack([parts[f"plane {i}"] for i in range(itemsize)], 1).reshape(-1).view(f"u{itemsize}")
    words = words[_split(parts["index"], num_words)[:num_values]] if "table" in encoding else words
    if num_values < num or "bitmask" in encoding:
        kept = _from_gaps(parts["gaps"], num) if "gaps" in encoding else _unpack(parts["bitmask"], num)
        values, words = words, np.zeros(num, words.dtype)
        words[kept] = values
        if "signs" in encoding:
            words[~kept] = _unpack(parts["signs"], num - num_values)
    if dtype.is_floating_point or dtype.is_complex:
        words = (words >> 1) | (words << (8 * itemsize - 1))
    return torch.from_numpy(words.view(np.uint8)).view(dtype).view(entry["shape"])


def _encode_quantized(value: Tensor, shown: Tensor, levels: Tensor, scale: Tensor, axis: int) -> tuple[dict, bytes]:
    """A weight by its levels and their scales, or as it is where it is no product of these."""
    plain, blob = _encode(shown)
    if scale.dim() == 0 or not _same(_scaled(levels, scale, axis).to(value.dtype), shown):
        return plain, blob
    (entry, of_levels), (scales, of_scales) = _encode(levels), _encode(scale)
    if len(of_levels) + len(of_scales) >= len(blob):
        return plain, blob
    scales |= {"bytes": len(of_scales), "levels": entry["dtype"], "axis": axis}
    return {**entry, "dtype": plain["dtype"], "scale": scales}, of_scales + of_levels


def _scaled(levels: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Levels times scales, which stand for the same number of weights each, in the order of the channels."""
    channels = levels.transpose(0, axis)
    return (channels.reshape(len(scale), -1) * scale[:, None]).view(channels.shape).transpose(0, axis)


@torch.no_grad()
def _quantized(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor, int]]]:
    """By name, the weights that a quantizer shows: as shown, and as levels and scales along an axis."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for parameter, fake_quantize in weights(module).items():
            if not fake_quantize.enabled:
                continue
            weight, axis = module._parameters[parameter], fake_quantize.axis or 0
            codes, qparams = fake_quantize.codes(weight)
            scale = qparams.scale.float()
            if scale.dim():
                channels = codes.transpose(0, axis)
                unscaled = qparams._replace(scale=torch.ones_like(scale), axis=0)
                rows = fake_quantize.quantizer.dequantize(channels.reshape(len(scale), -1).float(), unscaled)
                levels = rows.view(channels.shape).transpose(0, axis)
            else:
                levels = codes
            shown = fake_quantize(weight) + 0.0  # no code tells -0 from 0
            yield f"{prefix}.{parameter}".lstrip("."), (shown, levels + 0.0, scale, axis)


def _quantization(model: nn.Module) -> dict[str, Any]:
    """What quantizes the activations of a model, as plain values, with the parameters of its weights; or nothing."""
    quantization = quantization_of(model)
    if quantization is None or not any(a.enabled for a in quantization.activations.values()):
        return {}
    state: Any = quantization.state_dict()
    for layer in quantization.layers:  # held, the parameters give the weights of the file again
        _, qparams = weights(layer.module)[layer.parameter].codes(layer.weight)
        state["learned"].setdefault(layer.name, {k: v for k, v in qparams._asdict().items() if v is not None})
    return state


def _quantize(model: nn.Module, state: Any) -> None:
    """Let a model quantize as the saved one did."""
    quantize_layers(model, Scheme.from_state(state["scheme"])).load_state_dict(model, state)


def _to_gaps(kept: np.ndarray) -> np.ndarray:
    """How many places lie between one that is kept and the next, a byte each; 255 stands for more to come."""
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1)
    found = np.full(ends[-1] if len(ends) else 0, 255, np.uint8)
    found[ends - 1] = gaps % 255
    return found


def _from_gaps(gaps: np.ndarray, num: int) -> np.ndarray:
    places = np.cumsum(gaps, dtype=np.int64)[gaps < 255]
    kept = np.zeros(num, bool)
    kept[places + np.arange(len(places))] = True
    return kept


def _unpack(bits: np.ndarray, num: int) -> np.ndarray:
    return np.unpackbits(bits, count=num).view(bool)


def _digits(base: int) -> int:
    """How many indices into a table of so many levels fit in a byte."""
    return next(digits for digits in range(8, 0, -1) if base**digits <= 256)


def _join(index: np.ndarray, base: int) -> np.ndarray:
    """Neighbouring indices as digits of a byte: zstd spends a bit on a byte at least, and finds no chance repeats."""
    weights = base ** np.arange(_digits(base))
    return (np.pad(index, (0, -len(index) % len(weights))).reshape(-1, len(weights)) @ weights).astype(np.uint8)


def _split(joined: np.ndarray, base: int) -> np.ndarray:
    return (joined[:, None] // base ** np.arange(_digits(base)) % base).reshape(-1)


def _planes(words: np.ndarray) -> list[np.ndarray]:
    """All highest bytes, then all that come next, and so on."""
    planes = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), words.itemsize)
    return [np.ascontiguousarray(planes[:, i]) for i in reversed(range(words.itemsize))]


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
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=_to_plain)


def _to_plain(value: Tensor) -> dict[str, Any]:
    return {"dtype of tensor": str(value.dtype).removeprefix("torch."), "values": value.detach().cpu().tolist()}


def _from_plain(value: dict[str, Any]) -> Any:
    kind = value.get("dtype of tensor")
    return value if kind is None else torch.tensor(value["values"], dtype=getattr(torch, kind))


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors, or the first of each tuple, are bitwise one; or neither is there."""
    a, b = (x[0] if isinstance(x, tuple) else x for x in (a, b))
    return a is b or (a is not None and b is not None and np.array_equal(_words(a)[0], _words(b)[0]))


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
        content, data = _first_version(metadata), None
        if content is None:
            if metadata != str(_VERSION):
                raise ValueError(f"version {metadata}, and this package reads the versions up to {_VERSION}")
            index = zstandard.ZstdDecompressor().decompress(file.get_tensor("index").tobytes())
            content, data = json.loads(index, object_hook=_from_plain), file.get_tensor("data")
        state: dict[str, Tensor] = {}
        end = 0
        for name, entry in content["tensors"].items():
            if "to" in entry:
                state[name] = state[entry["to"]]
                continue
            if data is None:
                blob = file.get_tensor(name)
            else:
                blob, end = data[end : end + entry["bytes"]], end + entry["bytes"]
                if zlib.crc32(blob) != entry["crc32"]:
                    raise ValueError(f"the checksum of {name} is wrong")
            state[name] = _decode(entry, blob)
        if data is not None and end != len(data):
            raise ValueError(f"{len(data)} bytes where {end} were expected")
    return state, content


def _first_version(metadata: str) -> dict[str, Any] | None:
    """The index of a file of version 1, whose metadata hold it, beside a tensor of bytes for each; or nothing."""
    content = json.loads(metadata)
    if not isinstance(content, dict):
        return None
    checksum = content.pop("crc32")
    if checksum != zlib.crc32(_dump(content).encode()):
        raise ValueError("the checksum of its index is wrong")
    if content["version"] != 1:
        raise ValueError(f"version {content['version']}, and this package reads the versions up to {_VERSION}")
    return content
