"""What the CPU can do, for a proof that says where it was made."""

from __future__ import annotations

import platform
from typing import Any

import torch

__all__ = ["cpu_features"]

_INTEGER = {"avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX512-VNNI", "amx_int8": "AMX-INT8"}


def cpu_features() -> str:
    """The CPU's vector instructions and the integer ones among them, such as ``"x86_64 AVX2"``.

    Without one of the integer ones, x86 kernels add pairs of products in 16 bits
    (:mod:`lightning_compress.quantization.overflow`).
    """
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    integer = [name for key, name in _INTEGER.items() if known.get(key)]
    # torch before get_capabilities() has no public name for it
    if not known and torch.cpu._is_vnni_supported():  # noqa: SLF001
        integer = [_INTEGER["avx512_vnni"]]
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *integer])
