"""What a packed file may claim of its tensors: checked before any memory is taken for them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import zstandard

from lightning_compress.checks import is_whole, shown

__all__ = ["check_content", "check_entry", "dtype_of", "read_index"]

# Bytes of tensors and bytes of JSON that any file may ask for, and those for each of its bytes. Zeros cost next to
# nothing in a file, so that no bound is exact; a network in which one weight of 10,000 is left stays below this one.
_BYTES = 2**27
_BYTES_PER_BYTE = 2**14
_JSON = 2**22
_JSON_PER_BYTE = 2**8

_ENCODINGS = {"bytes", "bitmask", "gaps", "signs", "table"}
_NEEDS = {"bitmask": "num_values", "gaps": "num_gaps", "signs": "num_values", "table": "num_levels"}


def read_index(index: bytes) -> dict[str, Any]:
    """The content of a compressed index, its dicts of tensors as tensors.

    Raises:
        ValueError: If it is said to be larger than an index of so many bytes can be, or is no JSON of ours.
    """
    size = zstandard.get_frame_parameters(index).content_size
    if size > _JSON + _JSON_PER_BYTE * len(index):
        raise ValueError(f"{len(index):,} bytes of index claim to hold {size:,}")
    try:
        content = json.loads(zstandard.ZstdDecompressor().decompress(index), object_pairs_hook=_from_pairs)
    except RecursionError:
        raise ValueError("its index is nested without an end") from None
    return _kind("its index", content, dict, "an object")


def check_content(content: Mapping[str, Any], num_bytes: int) -> None:
    """Refuse an index that is malformed, or that a file of this size cannot stand for.

    Raises:
        ValueError: If it is so.
    """
    for part in ("tensors", "structure"):
        if part not in content:
            raise ValueError(f"its index has no {part!r}")
    for part in ("tensors", "structure", "quantization"):  # the last is not in a file from before it was kept
        _kind(part, content.get(part, {}), dict, "an object")
    entries = content["tensors"]
    asked = 0
    plain = set()  # what another may be tied to
    for name, entry in entries.items():
        _kind(name, entry, dict, "an object")
        if "to" not in entry:
            asked += check_entry(name, entry)
            _whole(f"{name}.crc32", entry.get("crc32"), 2**32)
            plain.add(name)
        elif not isinstance(entry["to"], str) or entry["to"] not in plain:
            raise ValueError(f"{name} is tied to {shown(entry['to'])}, which is no tensor before it")
    if asked > _BYTES + _BYTES_PER_BYTE * num_bytes:
        raise ValueError(f"{num_bytes:,} bytes claim to hold {asked:,}")


def check_entry(name: str, entry: Mapping[str, Any]) -> int:
    """How many bytes of tensors an entry asks for.

    Raises:
        ValueError: If it is malformed.
    """
    dtype = dtype_of(entry.get("dtype"))
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(is_whole(size) and size >= 0 for size in shape):
        raise ValueError(f"{name} is of shape {shown(shape)}")
    encoding = _kind(f"{name}.encoding", entry.get("encoding"), str, "a text").split("+")
    unknown = set(encoding) - _ENCODINGS
    if unknown:
        raise ValueError(f"encoding {shown(sorted(unknown)[0])} is not known to this version")
    num = math.prod(shape) * (2 if dtype.is_complex else 1)
    _whole(f"{name}.bytes", entry.get("bytes"), math.inf)
    # A byte for the distance to each value, where there are fewer than eighths of all: else it had been a bit each.
    most = {"num_values": num, "num_gaps": num // 8, "num_levels": 256}
    needed = {_NEEDS[part] for part in encoding if part in _NEEDS}
    for field in needed | (entry.keys() & most.keys()):
        _whole(f"{name}.{field}", entry.get(field), most[field], least=int(field == "num_levels"))
    places = [part for part in encoding if part in ("bitmask", "gaps")]
    if len(places) != (entry.get("num_values", num) < num or "num_gaps" in entry or "bitmask" in encoding):
        raise ValueError(f"{name}.encoding {shown(entry['encoding'])} does not say where the values are")
    asked = num * dtype.itemsize // (2 if dtype.is_complex else 1)
    return asked + (0 if "scale" not in entry else _check_scale(f"{name}.scale", entry["scale"], shape))


def _check_scale(name: str, scale: Any, shape: list[int]) -> int:
    """How many bytes the scales of a tensor of levels ask for."""
    _kind(name, scale, dict, "an object")
    asked = check_entry(name, scale)
    levels = dtype_of(scale.get("levels"))
    num = scale["shape"][0] if len(scale["shape"]) == 1 else 0
    if (
        "scale" in scale
        or not num
        or math.prod(shape) % num
        or levels.is_complex
        or dtype_of(scale["dtype"]).is_complex
    ):
        raise ValueError(f"{name} is of shape {shown(scale['shape'])} in a tensor of shape {shape}")
    _whole(f"{name}.axis", scale.get("axis"), len(shape) - 1)
    return asked + math.prod(shape) * levels.itemsize


def dtype_of(name: Any) -> torch.dtype:
    """A dtype by its name; those of torch's own quantized tensors and of its single bits are none of a file's."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or name.startswith(("q", "bits")):
        raise ValueError(f"dtype {shown(name)} is not known to this version")
    return found


def _kind(name: str, value: Any, kind: type, accepted: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {shown(value)}, where {accepted} was expected")
    return value


def _whole(name: str, value: Any, most: float, least: int = 0) -> None:
    if not is_whole(value) or not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}")


def _from_pairs(pairs: list[tuple[str, Any]]) -> Any:
    """An object of the index; a tensor for one that stands for it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its index has two values for one key")
    if "dtype of tensor" not in found:
        return found
    try:
        return torch.tensor(found["values"], dtype=dtype_of(found["dtype of tensor"]))
    except (KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"its index has a tensor of no values ({error})") from None
