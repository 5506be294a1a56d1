"""Files are whole or not there, and a damaged one is refused by name before it takes memory."""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import zstandard
from safetensors import safe_open

from lightning_compress.deploy.packed import load_packed, save_packed
from lightning_compress.files import check_folder, free_folder, replacing, write_whole


def interrupted(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("sec")
        path.parent.read_text()


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "below" / "words"
    write_whole(path, "first")
    with pytest.raises(IsADirectoryError):
        interrupted(path)
    assert path.read_text() == "first"
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", "words")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "words"


def write_pair(path: Path, content: str) -> None:
    with replacing(path, ".bin") as temporary:
        temporary.write_text(content)
        temporary.with_suffix(".bin").write_text(content)


@pytest.mark.parametrize("kill_at", range(4))
def test_two_files_of_one_are_of_one_writing_wherever_it_is_killed(kill_at: int, tmp_path: Path) -> None:
    """Or the file that is read first is missing: no file system renames two at once."""
    path = tmp_path / "model.xml"
    write_pair(path, "old")
    if not (pid := os.fork()):
        replace = os.replace
        calls = iter(range(10))
        os.replace = lambda a, b: os._exit(9) if next(calls) == kill_at else replace(a, b)
        write_pair(path, "new")
        os._exit(0)
    os.waitpid(pid, 0)
    found = [p.read_text() if p.exists() else None for p in (path, path.with_suffix(".bin"))]
    assert found[0] in (None, found[1])
    assert found == {0: ["old", "old"], 3: ["new", "new"]}.get(kill_at, found)
    write_pair(path, "newer")
    assert path.read_text() == path.with_suffix(".bin").read_text() == "newer"


def test_what_a_killed_writer_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    if not (pid := os.fork()):
        with replacing(tmp_path / "model.xml", ".bin") as temporary:
            temporary.write_text("half")
            temporary.with_suffix(".bin").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.iterdir())) == 2
    running = tmp_path / f".{platform.node()}.{os.getpid()}.old.model.bin"
    others = [running, tmp_path / f".elsewhere.{pid}.model.xml", tmp_path / f".{platform.node()}.{pid}.amodel.xml"]
    for path in others:
        path.write_text("another's")
    write_pair(tmp_path / "model.xml", "new")
    assert set(tmp_path.iterdir()) == {tmp_path / "model.xml", tmp_path / "model.bin", *others}


@pytest.mark.parametrize("given", ["/proc/outputs", "file/below", "file", "nul\0"])
def test_a_folder_that_cannot_be_written_to_is_refused_in_words(given: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"Some.dirpath=.*: no file can be written to .* Accepted is a folder"):
        check_folder("Some.dirpath", tmp_path / given, given)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_was_tried_is_as_it_was(tmp_path: Path) -> None:
    check_folder("Some.dirpath", tmp_path / "a" / "b", None)
    assert not list(tmp_path.iterdir())


def test_the_files_of_an_earlier_run_are_left_alone(tmp_path: Path) -> None:
    names = ["report.json", "report.html"]
    assert free_folder(tmp_path, names) == tmp_path
    for expected in ("version_1", "version_2"):
        write_whole(free_folder(tmp_path, names) / "report.html", "a run")
        assert free_folder(tmp_path, names) == tmp_path / expected


# Packed files.


def parts_of(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The data, and the index as JSON."""
    with safe_open(path, "np") as file:
        index = zstandard.ZstdDecompressor().decompress(file.get_tensor("index").tobytes())
        return file.get_tensor("data").tobytes(), json.loads(index)


def build(path: Path, data: bytes, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    index = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(text.encode())
    arrays = {name: np.frombuffer(value, np.uint8) for name, value in (("data", data), ("index", index))}
    path.write_bytes(safetensors.numpy.save(arrays, {"lightning_compress.packed": "2"}))


def bomb(blob: bytes, **claims: Any) -> tuple[bytes, dict[str, Any]]:
    """One tensor that claims what its bytes do not hold."""
    entry = {"dtype": "float32", "shape": [1], "encoding": "bytes", "bytes": len(blob), "crc32": zlib.crc32(blob)}
    return blob, {"tensors": {"w": {**entry, **claims}}, "structure": {}, "quantization": {}}


def zeros(num: int) -> bytes:
    """Many compressed zeros."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    chunks = [compressor.compress(bytes(2**24)) for _ in range(num // 2**24)]
    return b"".join([*chunks, compressor.flush()])


NOTHING = zstandard.ZstdCompressor().compress(b"")
SCALE = {
    "dtype": "float32",
    "shape": [1, 2**28],
    "encoding": "bytes",
    "bytes": len(NOTHING),
    "levels": "int8",
    "axis": 0,
}
BOMBS = {
    "more behind a tensor than it holds": lambda: bomb(zeros(2**29)),
    "zeros by their distances": lambda: bomb(NOTHING, shape=[2**29], encoding="gaps", num_gaps=0, num_values=0),
    "zeros by their places": lambda: bomb(zeros(2**28), shape=[2**31], encoding="bitmask", num_values=0),
    "2^40 values": lambda: bomb(NOTHING, shape=[2**20, 2**20]),
    "2^62 distances": lambda: bomb(NOTHING, shape=[9], encoding="gaps", num_gaps=2**62, num_values=0),
    "2^40 levels": lambda: bomb(NOTHING, shape=[9], encoding="table", num_levels=2**40),
    "a scale of two axes": lambda: bomb(NOTHING, scale=SCALE),
    "JSON without an end": lambda: (b"", "[" * 200_000 + "]" * 200_000),
    "much JSON": lambda: (b"", "[" + "0," * 2**23 + "0]"),
    "many tensors": lambda: (
        NOTHING,
        {"tensors": {str(i): bomb(NOTHING, shape=[2**24])[1]["tensors"]["w"] for i in range(64)}},
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_file_takes_no_more_memory_than_its_size_can_stand_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    build(path, *BOMBS[kind]())
    assert path.stat().st_size < 2**17
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
    try:
        with pytest.raises(ValueError, match=r"bomb'.*no whole file of save_packed") as caught:
            load_packed(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "MemoryError" not in str(caught.value)


def test_a_tensor_of_zeros_alone_is_justified(tmp_path: Path) -> None:
    save_packed({"mask": torch.zeros(4096, 4096, dtype=torch.bool)}, tmp_path / "x")
    assert load_packed(tmp_path / "x")["mask"].shape == (4096, 4096)
