"""Packed checkpoints: bit for bit, small, and never half written or half read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import lightning_compress
from lightning_compress.deploy import packed
from lightning_compress.deploy.packed import load_packed, save_packed
from lightning_compress.pruning.surgery import apply_record

from .helpers import noise, randomized

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
COMPLEX = [torch.complex64, torch.complex128]
INTS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool]


def bits(value: Tensor) -> Tensor:
    return value.detach().resolve_conj().contiguous().flatten().view(torch.uint8)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == sorted(expected)
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(bits(got[name]), bits(value)), name


def assert_round_trip(state: dict[str, Tensor], path: Path) -> None:
    save_packed(state, path)
    assert_same(load_packed(path), state)


def sparse(*shape: int, share: float = 0.9, seed: int = 0) -> Tensor:
    return noise(*shape, seed=seed) * (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share)


def entries(path: Path) -> dict[str, dict]:
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["lightning_compress.packed"])["tensors"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("dtype", FLOATS + COMPLEX + INTS, ids=str)
def test_every_dtype_at_every_sparsity(dtype: torch.dtype, share: float, tmp_path: Path) -> None:
    value = sparse(40, 33, share=share) * (1 if dtype.is_floating_point or dtype.is_complex else 20)
    assert_round_trip({"weight": (value.abs() if "uint" in str(dtype) else value).to(dtype)}, tmp_path / "x")


@pytest.mark.parametrize("dtype", FLOATS + COMPLEX + INTS, ids=str)
@pytest.mark.parametrize("num", [1, 7, 4096])
def test_every_bit_pattern(dtype: torch.dtype, num: int, tmp_path: Path) -> None:
    """NaN with their payloads, infinities, denormals; bools are bytes of 0 and 1."""
    raw = torch.randint(256, (num * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num))
    value = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    raw.view(-1, dtype.itemsize)[::3] = 0
    assert_round_trip({"some": value, "none": torch.zeros_like(value)}, tmp_path / "x")


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=str)
def test_negative_zeros_stay_negative(dtype: torch.dtype, tmp_path: Path) -> None:
    value = (sparse(50, 20) * noise(50, 20, seed=1).sign()).to(dtype)
    assert_round_trip({"mixed": value, "all": torch.full((70,), -0.0).to(dtype), "dense": value[0, :2]}, tmp_path / "x")
    assert entries(tmp_path / "x")["mixed"]["encoding"] == "bitmask+signs"


def test_signs_of_zeros_cost_a_bit_each_and_nothing_where_all_are_alike(tmp_path: Path) -> None:
    def size(value: Tensor) -> int:
        save_packed({"weight": value}, tmp_path / "x")
        return (tmp_path / "x").stat().st_size

    value = sparse(1000, 1000)
    negative = torch.where(value == 0, torch.tensor(-0.0), value)
    mixed = value * noise(1000, 1000, seed=3).sign()
    assert size(negative) < size(value) + 500
    assert size(mixed) < size(value) + 1_000_000 / 8


def test_empty_and_zero_dimensional_and_strided_tensors(tmp_path: Path) -> None:
    value = sparse(12, 10)
    state = {
        "empty": torch.empty(0),
        "empty matrix": torch.empty(3, 0, 2, dtype=torch.float16),
        "scalar": torch.tensor(-1.5, dtype=torch.bfloat16),
        "steps": torch.tensor(12_345),
        "flag": torch.tensor(True),
        "transposed": value.t(),
        "every second": value[::2, 1::3],
        "expanded": value[:1].expand(5, 10),
        "channels last": noise(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "conjugated": torch.complex(noise(5), noise(5, seed=1)).conj(),
    }
    assert_round_trip(state, tmp_path / "x")


def test_a_model_loads_back_into_another(tmp_path: Path) -> None:
    def net(seed: int) -> nn.Module:
        return randomized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LSTM(5, 6)), seed)

    saved, other = net(0), net(1)
    save_packed(saved, tmp_path / "x")
    assert_same(load_packed(str(tmp_path / "x"), other), dict(saved.state_dict()))
    assert_same(dict(sorted(other.state_dict().items())), dict(saved.state_dict()))


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = nn.ModuleDict({"b": nn.Linear(50, 50, bias=False), "a": nn.Linear(50, 50, bias=False)})
    save_packed(model, tmp_path / "untied")
    model["a"].weight = model["b"].weight
    save_packed(model, tmp_path / "tied")
    state = load_packed(tmp_path / "tied", model)
    assert_same(state, dict(model.state_dict()))
    assert state["a.weight"] is state["b.weight"]
    assert (tmp_path / "tied").stat().st_size < 0.6 * (tmp_path / "untied").stat().st_size


def test_views_of_one_storage_are_not_tied(tmp_path: Path) -> None:
    base = noise(6, 6)
    assert_round_trip({"a": base, "b": base[0], "c": base.t(), "d": base.view(torch.int32)}, tmp_path / "x")
    base = torch.complex(noise(3), noise(3, seed=1))
    assert_round_trip({"a": base, "b": base.conj(), "c": base.conj().imag}, tmp_path / "x")


def test_the_file_is_the_same_whatever_the_order_and_the_process(tmp_path: Path) -> None:
    names = [f"layer{i}.weight" for i in range(20)]
    state = {name: sparse(9, 9, seed=i) for i, name in enumerate(names)}
    torch.save(state, tmp_path / "state.pt")
    code = "import sys, torch, lightning_compress as c; c.save_packed(torch.load(sys.argv[1]), sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "state.pt", tmp_path / "theirs"], check=True, timeout=60)
    for folder, order in (("a", names), ("b", names[::-1])):
        save_packed({name: state[name].clone() for name in order}, tmp_path / folder)
        assert (tmp_path / folder).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_sparse_tensor_is_small(tmp_path: Path) -> None:
    value = noise(500, 1000)
    save_packed({"weight": torch.where(value.abs() > 1.645, value, 0.0)}, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size < 0.1 * 4 * 500_000
    assert entries(tmp_path / "x")["weight"]["encoding"] == "bitmask"
    save_packed({"weight": noise(500, 1000)}, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size < 0.9 * 4 * 500_000


def test_safetensors_reads_the_container(tmp_path: Path) -> None:
    save_packed({"weight": sparse(30, 30)}, tmp_path / "x")
    assert safetensors.torch.load_file(tmp_path / "x")["weight"].dtype == torch.uint8


@pytest.mark.parametrize(
    "value",
    [3, "text", None, torch.empty(2, device="meta"), torch.eye(3).to_sparse()],
    ids=["int", "str", "None", "meta", "sparse"],
)
def test_what_is_not_a_plain_tensor_is_refused_by_name(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extra is .*accepted are plain dense tensors.*Leave it out"):
        save_packed({"weight": noise(2), "extra": value}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [*(1 << bit for bit in range(8)), 0xFF])
def test_a_damaged_byte_never_gives_other_weights(mask: int, tmp_path: Path) -> None:
    """Two bits of a frame of zstd mean nothing for its content; all others are noticed."""
    state = {"a.weight": sparse(9, 9), "b": torch.tensor(4)}
    save_packed(state, tmp_path / "x")
    whole, unnoticed = (tmp_path / "x").read_bytes(), 0
    for i in range(len(whole)):
        (tmp_path / "y").write_bytes(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :])
        try:
            got = load_packed(tmp_path / "y")
        except ValueError:
            continue
        assert_same(got, state)
        unnoticed += 1
    assert unnoticed <= 2


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    save_packed({"a": sparse(9, 9)}, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "y").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no whole file of save_packed"):
            load_packed(tmp_path / "y")


def test_foreign_files_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    torch.save({"weight": noise(3)}, tmp_path / "pickle")
    safetensors.torch.save_file({"weight": noise(3)}, tmp_path / "plain")
    safetensors.torch.save_file({"weight": noise(3)}, tmp_path / "tagged", {"format": "pt"})
    (tmp_path / "text").write_text("weights " * 100)
    for name in ("pickle", "plain", "tagged", "text"):
        with pytest.raises(ValueError, match=f"{name}'.*no whole file of save_packed.*torch.load or safetensors"):
            load_packed(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_packed(tmp_path / "nothing")


def test_a_later_encoding_or_version_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = packed._encode
    monkeypatch.setattr(packed, "_encode", lambda v: ({**encode(v)[0], "encoding": "codes"}, encode(v)[1]))
    save_packed({"a": noise(3)}, tmp_path / "x")
    with pytest.raises(ValueError, match="encoding 'codes' is not known"):
        load_packed(tmp_path / "x")
    monkeypatch.setattr(packed, "_VERSION", 2)
    save_packed({"a": noise(3)}, tmp_path / "x")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 2, and this package reads version 1"):
        load_packed(tmp_path / "x")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    save_packed({"a": noise(3)}, path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, fail)
        with pytest.raises(OSError, match="No space left"):
            save_packed({"a": noise(4)}, path)
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (nn.Linear(4, 2), r"weight is \(2, 3\) there and \(2, 4\) here"),
        (nn.Linear(3, 2, bias=False), r"bias is \(2,\) there and missing here"),
        (nn.Bilinear(3, 3, 2), r"weight is \(2, 3\) there and \(2, 3, 3\) here"),
    ],
)
def test_another_model_is_refused_before_it_is_touched(other: nn.Module, what: str, tmp_path: Path) -> None:
    save_packed(nn.Linear(3, 2), tmp_path / "x")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=what + ".*Build the model"):
        load_packed(tmp_path / "x", other)
    assert_same(dict(sorted(other.state_dict().items())), before)


def test_a_model_without_some_channels_and_a_block_loads_into_a_dense_one(tmp_path: Path) -> None:
    def net(seed: int) -> nn.Module:
        return randomized(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Sequential(nn.Linear(3, 3))), seed).eval()

    small, dense = net(0), net(1)
    kept = torch.tensor([0, 2, 5])
    record = {
        "kept": {"0.weight": {0: kept}, "0.bias": {0: kept}, "1.weight": {1: kept}},
        "attributes": {"0": {"out_features": 3}, "1": {"in_features": 3}},
        "removed": ["2"],
    }
    apply_record(small, record)
    save_packed(small, tmp_path / "small")
    save_packed(net(2), tmp_path / "dense")
    load_packed(tmp_path / "small", dense)
    assert dense[0].out_features == 3
    assert_same(dict(sorted(dense.state_dict().items())), dict(small.state_dict()))
    assert torch.equal(dense(noise(2, 4)), small(noise(2, 4)))
    load_packed(tmp_path / "dense", dense)
    assert torch.equal(dense(noise(2, 4)), net(2)(noise(2, 4)))


def test_the_package_exports_both() -> None:
    assert lightning_compress.save_packed is save_packed
    assert lightning_compress.load_packed is load_packed
