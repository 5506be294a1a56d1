"""Packed checkpoints: small files that load back bit for bit."""

from lightning_compress.deploy.packed.file import is_packed, load_packed, read_packed, save_packed

__all__ = ["is_packed", "load_packed", "read_packed", "save_packed"]
