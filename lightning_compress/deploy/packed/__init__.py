"""Packed checkpoints: small files that load back bit for bit."""

from lightning_compress.deploy.packed.file import load_packed, save_packed

__all__ = ["load_packed", "save_packed"]
