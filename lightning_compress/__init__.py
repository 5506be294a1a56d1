"""Prune, quantize, export and prove any LightningModule during its normal training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.checkpoint import load_from_checkpoint
    from lightning_compress.deploy.pack_quantized import save_pack_quantized
    from lightning_compress.deploy.packed import load_packed, save_packed
    from lightning_compress.phase import Phase
    from lightning_compress.quantization.convert import convert
    from lightning_compress.quantization.schemes import (
        Scheme,
        apot4,
        binary,
        codebook,
        exp4,
        fp8,
        int4,
        int8,
        log4,
        lsq,
        scheme,
        ternary,
        w2a8,
        w4_groups,
        w4a8,
        w4a8_groups,
        w8,
        w8a16,
    )
    from lightning_compress.recipes import recipe

__version__ = "0.1.0"
__all__ = [
    "Phase",
    "Scheme",
    "apot4",
    "binary",
    "codebook",
    "convert",
    "exp4",
    "fp8",
    "int4",
    "int8",
    "load_from_checkpoint",
    "load_packed",
    "log4",
    "lsq",
    "recipe",
    "save_pack_quantized",
    "save_packed",
    "scheme",
    "ternary",
    "w2a8",
    "w4_groups",
    "w4a8",
    "w4a8_groups",
    "w8",
    "w8a16",
]

_SCHEMES = (
    "Scheme",
    "apot4",
    "binary",
    "codebook",
    "exp4",
    "fp8",
    "int4",
    "int8",
    "log4",
    "lsq",
    "scheme",
    "ternary",
    "w2a8",
    "w4_groups",
    "w4a8",
    "w4a8_groups",
    "w8",
    "w8a16",
)
# Nothing heavy at import: Hydra imports this package only to find its configuration files.
_WHERE = {
    "Phase": "phase",
    "convert": "quantization.convert",
    "load_from_checkpoint": "checkpoint",
    "load_packed": "deploy.packed",
    "recipe": "recipes",
    "save_pack_quantized": "deploy.pack_quantized",
    "save_packed": "deploy.packed",
    **dict.fromkeys(_SCHEMES, "quantization.schemes"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
