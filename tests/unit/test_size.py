"""Bytes of a file."""

from __future__ import annotations

from pathlib import Path

import zstandard

from lightning_compress.deploy.size import weigh


def test_bytes_are_those_on_disk_and_of_a_stream_that_unpacks_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(range(256)) * 40)
    size, packed = weigh(path)
    assert size == path.stat().st_size == 10_240
    assert packed == len(zstandard.compress(path.read_bytes(), 19))
    assert packed < size
