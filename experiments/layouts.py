"""Ways to write a pruned state dict to bytes and to read it back."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zstandard
from torch import Tensor

from lightning_compress.deploy.packed import load_packed, save_packed

__all__ = ["State", "Way", "is_same", "ways"]

LEVEL = 9
State = dict[str, Tensor]
Way = tuple[Callable[[State], bytes], Callable[[bytes], State]]


def to_pt(value: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def from_pt(data: bytes) -> Any:
    """What torch.load reads."""
    return torch.load(io.BytesIO(data), weights_only=True)


def to_zstd(data: bytes) -> bytes:
    """One frame."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(data)


def from_zstd(data: bytes) -> bytes:
    """The frame's content."""
    return zstandard.ZstdDecompressor().decompress(data)


def by_weight(state: State, encode: Callable[[Tensor], Any]) -> dict[str, Any]:
    """The pruned tensors encoded, as matrices of one row an output; the others as they are."""
    return {n: (encode(v.flatten(1)), list(v.shape)) if v.dim() > 1 else (v, list(v.shape)) for n, v in state.items()}


def from_layout(entries: dict[str, Any]) -> State:
    """Dense again."""
    return {n: (v.to_dense() if v.layout != torch.strided else v).reshape(s) for n, (v, s) in entries.items()}


def to_csr(value: Tensor) -> Tensor:
    """Compressed rows, 32-bit indices."""
    csr = value.to_sparse_csr()
    rows, columns = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, csr.values(), csr.shape)


def to_bitmask(value: Tensor) -> tuple[Tensor, Tensor]:
    """A bit a weight, and the weights that are not zero."""
    kept = value.reshape(-1) != 0
    bits = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8), value.reshape(-1)[kept]


def from_bitmask(entries: dict[str, Any]) -> State:
    """Dense again."""
    state = {}
    for name, (value, shape) in entries.items():
        if isinstance(value, tuple):
            bits, values = value
            kept = ((bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
            kept = kept[: torch.Size(shape).numel()].bool()
            value = torch.zeros(len(kept)).masked_scatter_(kept, values)
        state[name] = value.reshape(shape)
    return state


def to_file(state: State) -> bytes:
    """Ours."""
    with tempfile.TemporaryDirectory() as folder:
        save_packed(state, Path(folder, "model.safetensors"))
        return Path(folder, "model.safetensors").read_bytes()


def from_file(data: bytes) -> State:
    """Ours, read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(data)
        return load_packed(path)


def is_same(a: State, b: State) -> bool:
    """Bit for bit."""
    bits = [{n: v.reshape(-1).view(torch.uint8) for n, v in s.items()} for s in (a, b)]
    return a.keys() == b.keys() and all(torch.equal(bits[0][n], bits[1][n]) and a[n].dtype == b[n].dtype for n in a)


def _packed(state: State) -> bytes:
    return to_pt(by_weight(state, to_bitmask))


def ways() -> dict[str, Way]:
    """By name: what encodes a state dict, and what decodes it."""
    return {
        ".pt": (to_pt, from_pt),
        ".pt + zstd": (lambda s: to_zstd(to_pt(s)), lambda b: from_pt(from_zstd(b))),
        "COO": (lambda s: to_pt(by_weight(s, Tensor.to_sparse)), lambda b: from_layout(from_pt(b))),
        "CSR": (lambda s: to_pt(by_weight(s, to_csr)), lambda b: from_layout(from_pt(b))),
        "bitmask + values": (_packed, lambda b: from_bitmask(from_pt(b))),
        "bitmask + values + zstd": (lambda s: to_zstd(_packed(s)), lambda b: from_bitmask(from_pt(from_zstd(b)))),
        "ours": (to_file, from_file),
    }
