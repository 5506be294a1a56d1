"""One tensor as few bytes, and back bit for bit.

A tensor is written as the positions of its values that are not zero and as those values alone, where that is smaller:
the distances between them (Han 2016, arXiv:1510.00149), or one bit per position where they are dense. Values of which
at most 256 are distinct are stored as a lookup table plus one index per value. Quantized weights share one table across
channels and store a scale per channel. Other values are written byte by byte: all exponents, then all first bytes of
the mantissas, and so on (the shuffle of HDF5 and Blosc). Each part is compressed by zstd: exponents of trained weights
are alike and shrink to two bits, distances and indices come near their entropy; mantissas are noise and cost what they
are. Bytes are little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from lightning_compress.deploy.packed.claims import dtype_of

__all__ = ["decode", "encode", "encode_quantized", "same_bits"]

# Weights repeat themselves by chance alone: short matches cost more than the entropy coder that they bypass.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(9, strategy=zstandard.STRATEGY_DFAST, min_match=7)
_SMALL = 2**10  # bytes below which a frame for each part costs more than it wins
_FEW = 256  # values that a byte tells apart
_AT_ONCE = 2**20  # indices that are looked up at once


def encode(value: Tensor) -> tuple[dict[str, Any], bytes]:
    """The entry of the index, and the bytes: frames of zstd that hold places, signs of zeros, table, and values."""
    words, is_float = _words(value)
    entry: dict[str, Any] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    values = words
    bits = 8 * words.itemsize
    # of floats the sign is the lowest bit: 0 is +0, 1 is -0
    kept = words > 1 if is_float else words != 0
    num_values = int(np.count_nonzero(kept))
    encoding: list[str] = []
    parts: list[np.ndarray] = []
    if (len(words) - num_values) * bits > len(words):
        values = words[kept]
        negative = words[~kept] != 0
        gaps = _to_gaps(kept) if num_values < len(words) / 8 else None
        if gaps is not None and len(gaps) < len(words) / 8:
            encoding.append("gaps")
            parts.append(gaps)
            entry["num_gaps"] = len(gaps)
        else:
            encoding.append("bitmask")
            parts.append(np.packbits(kept))
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


def decode(entry: Mapping[str, Any], blob: np.ndarray) -> Tensor:
    """The tensor of an entry of the index, whose claims have been checked, and its bytes.

    Raises:
        ValueError: If there are more or fewer bytes than the entry says, or they contradict it.
    """
    encoding = entry["encoding"].split("+")
    if "scale" in entry:
        end = entry["scale"]["bytes"]
        levels = {**entry, "dtype": entry["scale"]["levels"]}
        del levels["scale"]
        scaled = _scaled(decode(levels, blob[end:]), decode(entry["scale"], blob[:end]), entry["scale"]["axis"])
        return scaled.to(dtype_of(entry["dtype"]))
    dtype = dtype_of(entry["dtype"])
    itemsize = _word_size(dtype)
    num = math.prod(entry["shape"]) * (2 if dtype.is_complex else 1)
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
    expected = sum(sizes.values())
    reader = zstandard.ZstdDecompressor().stream_reader(blob.data, read_across_frames=True)
    # no more than one byte too many: a few bytes may go on for gigabytes
    data = np.frombuffer(reader.read(expected + 1), np.uint8)
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes or more where {expected} were expected")
    parts = dict(zip(sizes, np.split(data, np.cumsum([*sizes.values()])[:-1]), strict=True))
    words = np.stack([parts.pop(f"plane {i}") for i in range(itemsize)], 1).reshape(-1).view(f"u{itemsize}")
    if "table" in encoding:
        words = _look_up(words, parts.pop("index"))[:num_values]
    del data
    if num_values < num or "bitmask" in encoding:
        kept = _from_gaps(parts["gaps"], num) if "gaps" in encoding else _unpack(parts["bitmask"], num)
        if np.count_nonzero(kept) != num_values:
            raise ValueError(f"places of {np.count_nonzero(kept)} values where {num_values} were expected")
        values = words
        words = np.zeros(num, values.dtype)
        words[kept] = values
        if "signs" in encoding:
            words[~kept] = _unpack(parts["signs"], num - num_values)
    if dtype == torch.bool and words.max(initial=0) > 1:
        raise ValueError(f"a byte of {words.max()} where 0 or 1 was expected")
    if dtype.is_floating_point or dtype.is_complex:
        # the sign goes back to the front
        signs = words << (8 * itemsize - 1)
        words >>= 1
        words |= signs
    return torch.from_numpy(words.view(np.uint8)).view(dtype).view(entry["shape"])


def encode_quantized(
    value: Tensor, shown: Tensor, levels: Tensor, scale: Tensor, axis: int
) -> tuple[dict[str, Any], bytes]:
    """A weight by its levels and their scales, or as it is where it is no product of these."""
    plain, blob = encode(shown)
    if scale.dim() == 0 or not same_bits(_scaled(levels, scale, axis).to(value.dtype), shown):
        return plain, blob
    entry, of_levels = encode(levels)
    scales, of_scales = encode(scale)
    if len(of_levels) + len(of_scales) >= len(blob):
        return plain, blob
    scales |= {"bytes": len(of_scales), "levels": entry["dtype"], "axis": axis}
    return {**entry, "dtype": plain["dtype"], "scale": scales}, of_scales + of_levels


def _scaled(levels: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Levels times scales, which stand for the same number of weights each, in the order of the channels."""
    channels = levels.movedim(axis, 0)
    return (channels.reshape(len(scale), -1) * scale[:, None]).view(channels.shape).movedim(0, axis)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bitwise one."""
    return np.array_equal(_words(a)[0], _words(b)[0])


def _to_gaps(kept: np.ndarray) -> np.ndarray:
    """How many places lie between one that is kept and the next, a byte each; 255 stands for more to come."""
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1)
    found = np.full(ends[-1] if len(ends) else 0, 255, np.uint8)
    found[ends - 1] = gaps % 255
    return found


def _from_gaps(gaps: np.ndarray, num: int) -> np.ndarray:
    places = np.cumsum(gaps, dtype=np.int64)[gaps < 255]
    places += np.arange(len(places))
    if len(places) and places[-1] >= num:
        raise ValueError(f"a value at place {places[-1]} of {num}")
    kept = np.zeros(num, bool)
    kept[places] = True
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


def _look_up(table: np.ndarray, joined: np.ndarray) -> np.ndarray:
    """The levels that bytes of joined indices stand for."""
    weights = len(table) ** np.arange(_digits(len(table)))
    rows = table[np.arange(256)[:, None] // weights % len(table)]
    found = np.empty((len(joined), len(weights)), table.dtype)
    for i in range(0, len(joined), _AT_ONCE):  # numpy takes eight bytes for each index
        found[i : i + _AT_ONCE] = rows[joined[i : i + _AT_ONCE]]
    return found.reshape(-1)


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
