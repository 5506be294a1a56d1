"""Packed files of small models, one of each kind: what the fuzz of the reader damages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.deploy.packed import load_packed, save_packed
from lightning_compress.quantization import Affine, Codebook, Float8, LearnedStep, Scheme
from lightning_compress.quantization.model import quantize_layers
from lightning_compress.quantization.placement import find_placement
from lightning_compress.quantization.schemes import apot4, binary, exp4, fp8, int4, int8, log4, lsq, ternary
from lightning_compress.structure.record import Record, apply_record
from lightning_compress.watch import Watch

__all__ = ["SPECIMENS", "Specimen", "make_specimens", "same"]

_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "complex64", "int64", "int8", "uint16", "bool")
_SCHEMES = {
    "int8": int8(),
    "int4": int4(),
    "in groups": Scheme(Affine(4, symmetric=True), None, weight_granularity=8),
    "a tensor": Scheme(Affine(4, symmetric=True), None, weight_granularity="tensor"),
    "lsq": lsq(3),
    "codebook": Scheme(Codebook(3), LearnedStep(8)),
    "ternary": ternary(),
    "binary": binary(),
    "log4": log4(),
    "exp4": exp4(),
    "apot4": apot4(),
    "fp8": fp8(),
    "e5m2": Scheme(Float8("e5m2"), None),
}


@dataclass(frozen=True)
class Specimen:
    """A packed file, and what it holds.

    Args:
        name: Of its kind.
        data: Its bytes.
        state: The state dict that it loads to.
        fresh: Makes a dense model that the file fits; None for a state dict of no model.
    """

    name: str
    data: bytes
    state: dict[str, Tensor]
    fresh: Callable[[], nn.Module] | None


def _net() -> nn.Module:
    """Convolution, norm, two linear layers, a block that can go."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 3)).eval()


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _trained() -> nn.Module:
    """The net with weights by the seed, not by the process."""
    model = _net()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(_noise(*p.shape, seed=i))
    return model


@torch.no_grad()
def _masked(share: float, signed: bool = False) -> nn.Module:
    """Zeros in all weights, of either sign if asked for."""
    model = _trained()
    for i, p in enumerate(model.parameters()):
        if p.dim() > 1:
            kept = torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) >= share
            p.copy_(p * kept if signed else torch.where(kept, p, 0.0))
    return model


@torch.no_grad()
def _quantized(scheme: Scheme, model: nn.Module) -> nn.Module:
    x = _noise(6, 1, 6, 6)
    found = quantize_layers(model, scheme)
    if scheme.inputs is not None:
        with Watch(model) as watch:
            model(x)
        found.place(model, find_placement(watch.trace, model, {layer.module_name for layer in found.layers}))
        found.observe(True)
        model(x)
        found.observe(False)
    found.enable(True)
    found.begin()
    return model


def _cut() -> nn.Module:
    """The net without some channels, and without a block."""
    model = _trained()
    kept = torch.tensor([0, 3])
    pixels = torch.cat([kept[:, None] * 16 + torch.arange(16)]).flatten()
    vectors = {f"1.{name}": {0: kept} for name in ("weight", "bias", "running_mean", "running_var")}
    record = Record(
        kept={"0.weight": {0: kept}, "0.bias": {0: kept}, **vectors, "4.weight": {1: pixels}},
        attributes={"0": {"out_channels": 2}, "1": {"num_features": 2}, "4": {"in_features": 32}},
        removed=["6"],
    )
    apply_record(model, record)
    return model


def _pair() -> nn.Module:
    return nn.ModuleDict({"b": nn.Linear(16, 16, bias=False), "a": nn.Linear(16, 16, bias=False)})


def _tied() -> Any:
    model: Any = _pair()
    model["a"].weight = model["b"].weight
    with torch.no_grad():
        model["a"].weight.copy_(_noise(16, 16))
    return model


def _dtypes() -> dict[str, Tensor]:
    """A dense, a sparse, an empty tensor and a scalar of each dtype."""
    found = {}
    for name in _DTYPES:
        values = (_noise(12, 9).abs() * 20).to(getattr(torch, name))
        found[f"{name} dense"] = values
        found[f"{name} sparse"] = torch.where(_noise(12, 9) > 1, _noise(12, 9).abs() * 9, 0.0).to(values.dtype)
        found[f"{name} empty"] = values[:0]
        found[f"{name} scalar"] = values[0, 0]
    return found


SPECIMENS: Mapping[str, tuple[Callable[[], Any], Callable[[], nn.Module] | None]] = {
    "float": (_trained, _net),
    "half zeros": (lambda: _masked(0.5), _net),
    "many zeros": (lambda: _masked(0.97), _net),
    "zeros of either sign": (lambda: _masked(0.9, signed=True), _net),
    "zeros alone": (lambda: _masked(1.1), _net),
    "every dtype": (_dtypes, None),
    "nothing": (dict, None),
    "cut": (_cut, _net),
    "tied": (_tied, _pair),
    "cut and quantized": (lambda: _quantized(int8(), _cut()), _net),
    "zeros and int8": (lambda: _quantized(int8(), _masked(0.8)), _net),
    **{name: (lambda scheme=scheme: _quantized(scheme, _trained()), _net) for name, scheme in _SCHEMES.items()},  # type: ignore[misc]
}


def make_specimens(folder: Path) -> list[Specimen]:
    """One of each kind, saved and loaded once."""
    found = []
    for name, (make, fresh) in SPECIMENS.items():
        path = folder / "whole.safetensors"
        save_packed(make(), path)
        found.append(Specimen(name, path.read_bytes(), load_packed(path), fresh))
    return found


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are bitwise one."""
    if a.keys() != b.keys():
        return False
    pairs = [(a[name], b[name]) for name in a]
    alike = all(x.dtype == y.dtype and x.shape == y.shape for x, y in pairs)
    return alike and all(torch.equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)
