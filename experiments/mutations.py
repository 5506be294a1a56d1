"""Damages to packed files: to their bytes, and to what they claim, with every checksum made right again."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import zstandard

__all__ = ["FORGERIES", "ODD", "WOUNDS", "Parts", "build", "damaged_value", "parts_of"]

# Values that no field of a file of ours has, or only another field.
ODD: list[Any] = [
    *(None, True, "", -1, 0, 1, 7, 255, 257, 2**20, 2**31, 2**40, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e300),
    *(float("nan"), float("inf"), "bytes", "gaps", "bitmask+table", "gaps+signs+table", "tied", "float64", "quint8"),
    *(
        "complex128",
        "load",
        "__class__",
        "weight",
        "Scheme",
        "Observer",
        "a" * 300,
        [],
        [1],
        [[]],
        [-3],
        [2**31, 2**31],
    ),
    *([0, 2**40], {}, {"a": 1}, {"class": "Affine"}, {"class": "MSE", "x": 1}, {"to": "0.bias"}),
    {"dtype of tensor": "float32", "values": [1.0, 2.0]},
    {"dtype of tensor": "int64", "values": [[1], [1, 2]]},
    {"dtype of tensor": "float32", "values": [[[[[[1.0]]]]]] * 50},
    {"dtype of tensor": "bits8", "values": 3},
]


class Parts:
    """A packed file in its parts: metadata, data, and the index as JSON; or as ready text or bytes.

    Args:
        metadata: Of safetensors.
        data: The bytes of all tensors.
        content: The index.
    """

    def __init__(self, metadata: dict[str, str], data: bytes, content: Any) -> None:
        self.metadata = metadata
        self.data = data
        self.content = content


def parts_of(file: bytes) -> Parts:
    """The parts of a whole file."""
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    arrays = {}
    for name in ("data", "index"):
        begin, end = header[name]["data_offsets"]
        arrays[name] = file[8 + length + begin : 8 + length + end]
    content = json.loads(zstandard.ZstdDecompressor().decompress(arrays["index"]))
    return Parts(header["__metadata__"], arrays["data"], content)


def build(parts: Parts, change: Callable[[dict[str, Any]], None] | None = None) -> bytes:
    """A file of these parts, whole for all that checksums and lengths say; the header may be changed once more."""
    text = parts.content if isinstance(parts.content, str) else json.dumps(parts.content)
    index = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(text.encode())
    middle, end = len(parts.data), len(parts.data) + len(index)
    header: dict[str, Any] = {
        "__metadata__": parts.metadata,
        "data": {"dtype": "U8", "shape": [middle], "data_offsets": [0, middle]},
        "index": {"dtype": "U8", "shape": [len(index)], "data_offsets": [middle, end]},
    }
    if change is not None:
        change(header)
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written + parts.data + index


# To the bytes: nothing is made right again.


def _flip(file: bytes, other: bytes, rng: random.Random) -> bytes:
    changed = bytearray(file)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set(file: bytes, other: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(file))
    return file[:place] + rng.randbytes(1) + file[place + 1 :]


def _cut(file: bytes, other: bytes, rng: random.Random) -> bytes:
    begin, end = _range(file, rng)
    return rng.choice((file[:begin], file[end:], file[:begin] + file[end:]))


def _grow(file: bytes, other: bytes, rng: random.Random) -> bytes:
    place = rng.choice((0, len(file), rng.randrange(len(file))))
    more = rng.choice((bytes, rng.randbytes))(rng.choice((1, 2, 8, 100, 4096)))
    return file[:place] + more + file[place:]


def _swap(file: bytes, other: bytes, rng: random.Random) -> bytes:
    a, b, c, d = sorted(rng.randrange(len(file) + 1) for _ in range(4))
    return file[:a] + file[c:d] + file[b:c] + file[a:b] + file[d:]


def _zero(file: bytes, other: bytes, rng: random.Random) -> bytes:
    begin, end = _range(file, rng)
    return file[:begin] + rng.choice((b"\0", b"\xff")) * (end - begin) + file[end:]


def _splice(file: bytes, other: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(file))
    return file[:begin] + other[rng.choice((begin, rng.randrange(len(other)))) :]


def _repeat(file: bytes, other: bytes, rng: random.Random) -> bytes:
    begin, end = _range(file, rng)
    return file[:end] + file[begin:end] + file[end:]


def _range(file: bytes, rng: random.Random) -> tuple[int, int]:
    begin = rng.randrange(len(file))
    return begin, min(len(file), begin + rng.choice((1, 4, 16, 64, rng.randrange(1, len(file)))))


WOUNDS: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "bits flipped": _flip,
    "a byte set": _set,
    "a part cut out": _cut,
    "bytes put in": _grow,
    "parts swapped": _swap,
    "a part overwritten": _zero,
    "two files spliced": _splice,
    "a part twice": _repeat,
}


# To the claims: checksums, lengths and the header are those of what is written.


def _field(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    parts.content = damaged_value(parts.content, rng)
    return build(parts)


def _fields(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(2, 5)):
        parts.content = damaged_value(parts.content, rng)
        if not isinstance(parts.content, dict | list):
            break
    return build(parts)


def _nudge(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    places = [(node, key) for node, key in _places(parts.content) if type(node[key]) is int]
    for node, key in rng.sample(places, min(len(places), rng.choice((1, 1, 2)))):
        node[key] = rng.choice((node[key] + 1, node[key] - 1, 2 * node[key], -node[key], node[key] * 2**16))
    return build(_resealed(parts))


def _moved(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    """A value from another place, of this file or of another."""
    source, key = rng.choice(list(_places(rng.choice((parts, other)).content)))
    value = copy.deepcopy(source[key])
    node, key = rng.choice(list(_places(parts.content)))
    node[key] = value
    return build(parts)


def _twice(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    """A key that stands twice in one object, with different values."""
    dicts = [(node, key) for node, key in _places(parts.content) if isinstance(key, str)]
    node, key = rng.choice(dicts)
    mark = f"twice{rng.random()}"
    node[mark] = rng.choice(ODD)
    parts.content = json.dumps(parts.content).replace(json.dumps(mark), json.dumps(key))
    return build(parts)


def _tensors(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    """Entries swapped, renamed, dropped, added from another file, or tied to what is not there."""
    entries = parts.content["tensors"]
    names = [*entries, "extra"]
    a, b = rng.choice(names), rng.choice(names)
    how = rng.randrange(5)
    if how == 0 and a in entries and b in entries:
        entries[a], entries[b] = entries[b], entries[a]
    elif how == 1 and a in entries:
        entries[rng.choice((a.upper(), "", b, "\0", "a" * 1000))] = entries.pop(a)
    elif how == 2:
        entries.pop(a, None)
    elif how == 3:
        entries |= other.content["tensors"]
        parts.data += rng.choice((b"", other.data))
    else:
        entries[a] = {"encoding": "tied", "to": rng.choice((a, b, "nothing", None, 3, ["a"]))}
    return build(_resealed(parts))


def _blobs(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    """Data that was damaged before its checksums were taken."""
    if parts.data:
        wound = rng.choice((_flip, _set, _zero))
        parts.data = wound(parts.data, other.data, rng)
    return build(_resealed(parts))


def _bomb(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    """A tensor whose few bytes go on for up to gigabytes, with claims that agree, or nearly."""
    dtype, size = rng.choice((("bool", 1), ("int8", 1), ("uint16", 2), ("float32", 4), ("float64", 8)))
    small, large = (2**10, 2**16, 2**20), (2**23, 2**24, 2**25, 2**26, 2**27, 2**28, 2**31, 2**40)
    num = rng.choice(small if rng.random() < 0.9 else large)
    places = rng.choice(("", "", "bitmask", "gaps"))
    entry: dict[str, Any] = {"dtype": dtype, "shape": [num]}
    values, hidden = num, 0
    if places:
        values = num // 8 if places == "gaps" else 0
        hidden = num // 8
        entry |= {"num_values": values} | ({"num_gaps": values} if places == "gaps" else {})
    names = [places] * bool(places)
    if rng.random() < 0.3:
        names.append("signs")
        hidden += (num - values + 7) // 8
    if rng.random() < 0.4:
        names.append("table")
        entry["num_levels"] = levels = rng.choice((1, 2, 17, 256))
        digits = next(digits for digits in range(8, 0, -1) if levels**digits <= 256)
        hidden += levels * size + -(-values // digits)
    else:
        hidden += values * size
    if rng.random() < 0.3:  # one of the claims is another's
        entry[rng.choice(("num_values", "num_gaps", "num_levels"))] = rng.choice((0, 1, 255, 2**20, 2**31, num))
        hidden = rng.choice((hidden, 0, 2**20, 2**31))
    blob = _zeros(min(hidden, 2**34))
    parts.content["tensors"]["zeros"] = entry | {"encoding": "+".join(names) or "bytes", "bytes": len(blob)}
    parts.data += blob
    return build(_resealed(parts))


def _deep(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    """JSON without an end, in place of the index or of a value in it."""
    depth = rng.choice((50, 500, 990, 5_000, 200_000))
    begin, end = rng.choice((("[", "]"), ('{"a":', "}"), ('{"dtype of tensor":"int8","values":[', "]}")))
    text = begin * depth + "1" * (begin != "[") + end * depth
    if rng.random() < 0.7:
        node, key = rng.choice(list(_places(parts.content)))
        node[key] = "the place"
        text = json.dumps(parts.content).replace('"the place"', text)
    parts.content = text
    return build(parts)


def _text(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    """An index that is no JSON, or one of another shape."""
    text = json.dumps(parts.content)
    number = rng.choice(("1e999", "-1e999", "NaN", "Infinity", "9" * 5_000, "1E5", "0x10"))
    place = rng.randrange(len(text))
    how = rng.randrange(8)
    if how == 0:
        text = json.dumps({**parts.content, "tensors": {str(i): {} for i in range(5_000)}})
    elif how == 1:
        text = "[" + "0," * rng.choice((2**16, 2**16, 2**16, 2**22)) + "0]"
    elif how == 2:
        text = text[:place] + rng.choice('\0"{}[],:\\é') + text[place + 1 :]
    elif how == 3:
        text = rng.choice((text[:place], text + text))
    elif how == 4:
        text = rng.choice(("", "null", "[]", "{}", "3", '"a"'))
    else:
        text = text.replace(str(rng.choice((0, 1, 2, 4, 8))), number, 1)
    parts.content = text
    return build(parts)


def _header(parts: Parts, other: Parts, rng: random.Random) -> bytes:
    """The header of safetensors itself."""

    def change(header: dict[str, Any]) -> None:
        node, key = rng.choice(list(_places(header)))
        how = rng.randrange(4)
        if how == 0:
            del node[key]
        elif how == 1 and type(node[key]) is int:
            node[key] += rng.choice((-1, 1, 2**16, -(2**16), 2**63))
        elif how == 2 and isinstance(key, str):
            node[key + "2"] = node.pop(key)
        else:
            node[key] = rng.choice((*ODD, "I8", "F32", "BOOL", "F8_E4M3", "U64", "3", "1", "\uff12"))

    return build(parts, change)


FORGERIES: dict[str, Callable[[Parts, Parts, random.Random], bytes]] = {
    "a field": _field,
    "several fields": _fields,
    "numbers": _nudge,
    "a value moved": _moved,
    "a key twice": _twice,
    "tensors": _tensors,
    "data": _blobs,
    "gigabytes": _bomb,
    "nesting": _deep,
    "text": _text,
    "header": _header,
}


def damaged_value(content: Any, rng: random.Random) -> Any:
    """The same values, in dicts and lists, but one of them missing, odd, or beside another."""
    content = copy.deepcopy(content)
    node, key = rng.choice(list(_places(content)) or [({"content": content}, "content")])
    chance = rng.random()
    if chance < 0.15:
        del node[key]
    elif chance < 0.25 and isinstance(node, dict):
        node[rng.choice(("extra", "scale", "num_values", "class", "to", "dtype of tensor"))] = rng.choice(ODD)
    else:
        node[key] = rng.choice(ODD)
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested dicts and lists: what holds it, and its key."""
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield content, key
        yield from _places(content[key])


def _resealed(parts: Parts) -> Parts:
    """With the checksum of each tensor that of its bytes."""
    place = 0
    for entry in parts.content["tensors"].values():
        size = entry.get("bytes")
        if type(size) is int and size >= 0:
            entry["crc32"] = zlib.crc32(parts.data[place : place + size])
            place += size
    return parts


def _zeros(num: int) -> bytes:
    """So many zeros, compressed: a frame for each power of two."""
    return b"".join(_frame(bit) for bit in range(num.bit_length()) if num >> bit & 1)


@cache
def _frame(bit: int) -> bytes:
    if bit > 24:  # the frame of so many would take seconds to make
        return _frame(24) * 2 ** (bit - 24)
    return zstandard.ZstdCompressor(level=1).compress(bytes(2**bit))
