"""Bytes of a file, as it is and compressed."""

from __future__ import annotations

from pathlib import Path

import zstandard

__all__ = ["weigh"]

_LEVEL = 19


def weigh(path: Path) -> tuple[int, int]:
    """Bytes of a file, raw and compressed by zstd at level 19; with the weights beside an OpenVINO file."""
    weights = path.with_suffix(".bin")
    data = path.read_bytes() + (weights.read_bytes() if path.suffix == ".xml" else b"")
    return len(data), len(zstandard.ZstdCompressor(level=_LEVEL).compress(data))
