"""Bytes of a 90 % pruned ResNet-50-size checkpoint as it is stored here and elsewhere, against its dense ``.pt`` file.

The same state dict each time: convolutions and the last layer pruned together by magnitude, norms and buffers dense.
COO and CSR are torch's layouts in a ``.pt`` file, CSR with 32-bit indices. Every way is decoded again and compared bit
for bit. Single-threaded, from memory to memory but for ours, which goes through the file; medians.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import zstandard
from torch import Tensor

from experiments.bench.step_overhead import resnet50
from lightning_compress.deploy.packed import load_packed, save_packed
from lightning_compress.layers import find_layers
from lightning_compress.pruning import Element, Magnitude, Masks

SPARSITY, LEVEL = 0.9, 9
State = dict[str, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--repeats."""
    parser.add_argument("--repeats", type=int, default=5)


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


def run(repeats: int = 5) -> dict[str, Any]:
    """Headline: resnet50_ratio, exact, encode_s, decode_s of ours."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Sparse (CSR tensor|invariant)")
    model = resnet50()
    masks = Masks(find_layers(model)[0])
    masks.update(Magnitude(), Element(), SPARSITY, "global")
    state = {name: value.detach() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    signed = {n: v * torch.randn(v.shape, generator=generator).sign() if v.dim() > 1 else v for n, v in state.items()}

    def packed(state: State) -> bytes:
        return to_pt(by_weight(state, to_bitmask))

    ways: dict[str, tuple[State, Callable[[State], bytes], Callable[[bytes], State]]] = {
        ".pt": (state, to_pt, from_pt),
        ".pt + zstd": (state, lambda s: to_zstd(to_pt(s)), lambda b: from_pt(from_zstd(b))),
        "COO": (state, lambda s: to_pt(by_weight(s, Tensor.to_sparse)), lambda b: from_layout(from_pt(b))),
        "CSR": (state, lambda s: to_pt(by_weight(s, to_csr)), lambda b: from_layout(from_pt(b))),
        "bitmask + values": (state, packed, lambda b: from_bitmask(from_pt(b))),
        "bitmask + values + zstd": (state, lambda s: to_zstd(packed(s)), lambda b: from_bitmask(from_pt(from_zstd(b)))),
        "ours": (state, to_file, from_file),
        "ours, zeros of either sign": (signed, to_file, from_file),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    sizes, exact = {}, {}
    for _ in range(repeats):
        for name, (value, encode, decode) in ways.items():
            begin = time.perf_counter()
            data = encode(value)
            middle = time.perf_counter()
            decoded = decode(data)
            taken[name].append((middle - begin, time.perf_counter() - middle))
            sizes[name], exact[name] = len(data), is_same(decoded, value)
    rows = [
        {
            "file": name,
            "mb": sizes[name] / 1e6,
            "ratio": sizes[name] / sizes[".pt"],
            "exact": int(exact[name]),
            "encode_s": median(t for t, _ in times),
            "decode_s": median(t for _, t in times),
        }
        for name, times in taken.items()
    ]
    ours = next(row for row in rows if row["file"] == "ours")
    headline = {"resnet50_ratio": ours["ratio"], **{key: ours[key] for key in ("exact", "encode_s", "decode_s")}}
    return {"headline": headline, "rows": rows}
