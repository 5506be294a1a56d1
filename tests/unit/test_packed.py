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
import zstandard
from safetensors import safe_open
from torch import Tensor, nn

import lightning_compress
from lightning_compress.deploy.packed import file, load_packed, save_packed
from lightning_compress.quantization import Codebook, Float8, LearnedStep, Scheme
from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.model import quantization_of, quantize_layers
from lightning_compress.quantization.schemes import apot4, binary, codebook, exp4, fp8, int4, int8, log4, lsq, ternary
from lightning_compress.structure.record import Record, apply_record

from .helpers import noise, quantize, randomized, run

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
        return json.loads(zstandard.ZstdDecompressor().decompress(file.get_tensor("index").tobytes()))["tensors"]


@pytest.mark.parametrize("dtype", FLOATS + COMPLEX + INTS, ids=str)
def test_every_sparsity(dtype: torch.dtype, tmp_path: Path) -> None:
    for share in (0.0, 0.02, 0.5, 0.95, 1.0):
        value = sparse(40, 33, share=share) * (1 if dtype.is_floating_point or dtype.is_complex else 20)
        assert_round_trip({"weight": (value.abs() if "uint" in str(dtype) else value).to(dtype)}, tmp_path / "x")


@pytest.mark.parametrize("dtype", FLOATS + COMPLEX + INTS, ids=str)
def test_every_bit_pattern(dtype: torch.dtype, tmp_path: Path) -> None:
    """NaN with their payloads, infinities, denormals; bools are bytes of 0 and 1."""
    for num in (1, 7, 4096):
        generator = torch.Generator().manual_seed(num)
        raw = torch.randint(256, (num * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        value = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
        raw.view(-1, dtype.itemsize)[::3] = 0
        assert_round_trip({"some": value, "none": torch.zeros_like(value)}, tmp_path / "x")


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=str)
def test_negative_zeros_stay_negative(dtype: torch.dtype, tmp_path: Path) -> None:
    value = (sparse(50, 20) * noise(50, 20, seed=1).sign()).to(dtype)
    assert_round_trip({"mixed": value, "all": torch.full((70,), -0.0).to(dtype), "dense": value[0, :2]}, tmp_path / "x")
    assert entries(tmp_path / "x")["mixed"]["encoding"] == "gaps+signs"


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
    assert entries(tmp_path / "x")["weight"]["encoding"] == "gaps"
    save_packed({"weight": noise(500, 1000)}, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size < 0.9 * 4 * 500_000


def test_safetensors_reads_the_container(tmp_path: Path) -> None:
    save_packed({"weight": sparse(30, 30)}, tmp_path / "x")
    assert safetensors.torch.load_file(tmp_path / "x")["data"].dtype == torch.uint8


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
    """Two bits of a frame of zstd, three in older versions, mean nothing for its content; all others are noticed."""
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
    assert unnoticed <= 3


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
    encode = file.encode
    monkeypatch.setattr(file, "encode", lambda v: ({**encode(v)[0], "encoding": "runs"}, encode(v)[1]))
    save_packed({"a": noise(3)}, tmp_path / "x")
    with pytest.raises(ValueError, match="encoding 'runs' is not known"):
        load_packed(tmp_path / "x")
    monkeypatch.setattr(file, "_VERSION", 3)
    save_packed({"a": noise(3)}, tmp_path / "x")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 3, and this package reads version 2"):
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
    record = Record(
        kept={"0.weight": {0: kept}, "0.bias": {0: kept}, "1.weight": {1: kept}},
        attributes={"0": {"out_features": 3}, "1": {"in_features": 3}},
        removed=["2"],
    )
    apply_record(small, record)
    save_packed(small, tmp_path / "small")
    save_packed(net(2), tmp_path / "dense")
    load_packed(tmp_path / "small", dense)
    assert dense[0].out_features == 3
    assert_same(dict(sorted(dense.state_dict().items())), dict(small.state_dict()))
    assert torch.equal(dense(noise(2, 4)), small(noise(2, 4)))
    load_packed(tmp_path / "dense", dense)
    assert torch.equal(dense(noise(2, 4)), net(2)(noise(2, 4)))


def test_few_values_are_a_table(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = noise(256)
    for num, most in ((2, 0.126), (3, 0.21), (16, 0.51), (256, 1.01)):
        value = levels[torch.randint(num, (200, 300), generator=generator)]
        assert_round_trip({"weight": value}, tmp_path / "x")
        assert entries(tmp_path / "x")["weight"]["encoding"] == "table"
        assert (tmp_path / "x").stat().st_size < most * value.numel() + 1500
    assert_round_trip(
        {"half": value.half(), "bool": value > 0, "int": (value > 0).int(), "first": value}, tmp_path / "x"
    )


@pytest.mark.parametrize("share", [0.5, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("shape", [(1, 70_000), (300, 784), (7,)])
def test_distances_of_any_length(share: float, shape: tuple[int, ...], tmp_path: Path) -> None:
    assert_round_trip({"weight": sparse(*shape, share=share).sign()}, tmp_path / "x")
    ends = torch.zeros(2000)
    ends[0] = ends[-1] = ends[256] = ends[511] = 1.5
    assert_round_trip({"ends": ends}, tmp_path / "x")


def shown(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with the weights as the layers show them, every zero +0."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        for parameter in weights(module):
            state[f"{name}.{parameter}".lstrip(".")] = getattr(module, parameter).detach() + 0.0
    return dict(sorted(state.items()))


def net(seed: int = 0) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten()]
    model = randomized(nn.Sequential(*layers, nn.Linear(4 * 8 * 8, 10), nn.Unflatten(1, (2, 5)), nn.LSTM(5, 6)), seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(noise(*p.shape, seed=seed).abs() > 1)
    return model


SCHEMES = {
    "int8": int8(),
    "int4": int4(),
    "w4 a tensor": Scheme(Affine(4, symmetric=True), None, weight_granularity="tensor"),
    "w4 in groups": Scheme(Affine(4, symmetric=True), None, weight_granularity=8),
    "asymmetric a channel": Scheme(Affine(8), None),
    "asymmetric a tensor": Scheme(Affine(3), None, weight_granularity="tensor"),
    "lsq": lsq(3),
    "codebook": codebook(3),
    "codebook a channel": Scheme(Codebook(4), None),
    "codebook and codes": Scheme(Codebook(4), LearnedStep(8)),
    "ternary": ternary(),
    "binary": binary(),
    "log4": log4(),
    "exp4": exp4(),
    "apot4": apot4(),
    "fp8": fp8(),
    "e5m2": Scheme(Float8("e5m2"), None),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_model_is_what_its_layers_show(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    x, model = noise(4, 3, 8, 8).to(dtype), net().to(dtype)
    quantization = quantize(model, x, scheme=SCHEMES[name])
    quantization.begin()
    for log in quantization.learned().values():
        log.data += 0.1  # as if trained
    save_packed(model, tmp_path / "x")
    state = load_packed(tmp_path / "x")
    assert_same(state, shown(model))
    loaded = net(1).to(dtype).eval()
    assert_same(load_packed(tmp_path / "x", loaded), state)
    assert torch.equal(run(loaded, x)[0], run(model, x)[0])
    assert (quantization_of(loaded) is None) == (not quantization.activations)
    save_packed(loaded, tmp_path / "again")
    assert_same(load_packed(tmp_path / "again"), state)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_code_costs_no_more_than_its_bits(name: str, tmp_path: Path) -> None:
    model = randomized(nn.Sequential(nn.Linear(512, 256, bias=False)))
    quantize_layers(model, SCHEMES[name]).enable(True)
    save_packed(model, tmp_path / "x")
    assert_same(load_packed(tmp_path / "x"), shown(model))
    bits = SCHEMES[name].weight.bits + (32 / 8 if "groups" in name else 0)  # a scale for eight weights
    bits += 1.5 if name == "asymmetric a channel" else 0  # the zero of a channel is any code: levels are -255..255
    assert (tmp_path / "x").stat().st_size < bits / 8 * 256 * 512 + 4 * 256 + 2000


def test_a_model_whose_quantization_has_not_begun_is_float(tmp_path: Path) -> None:
    model = net()
    quantize_layers(model, int4())
    save_packed(model, tmp_path / "x")
    assert_same(load_packed(tmp_path / "x"), dict(net().state_dict()))


class Halves(Affine):
    """A user's own, whose levels are no multiples of the scale."""

    def fake_quantize(self, x: Tensor, qparams: object) -> Tensor:
        return (x * 2).round() / 2

    def fake_quantize_fitted(self, x: Tensor, axis: int | None) -> Tensor:
        return (x * 2).round() / 2


def test_a_quantizer_that_does_not_scale_levels_is_stored_as_shown(tmp_path: Path) -> None:
    model = net()
    quantize_layers(model, Scheme(Halves(4, symmetric=True), None)).enable(True)
    save_packed(model, tmp_path / "x")
    assert_same(load_packed(tmp_path / "x"), shown(model))


def test_tied_quantized_weights_are_stored_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(40, 40, bias=False), "b": nn.Linear(40, 40, bias=False)})
    model["a"].weight = model["b"].weight
    quantize_layers(model, codebook(4)).enable(True)
    save_packed(model, tmp_path / "x")
    state = load_packed(tmp_path / "x")
    assert state["a.weight"] is state["b.weight"]
    assert_same(state, shown(model))


def test_a_quantized_model_without_some_channels_loads_into_a_dense_one(tmp_path: Path) -> None:
    small = randomized(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    kept = torch.tensor([0, 2, 5])
    record = Record(
        kept={"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}},
        attributes={"0": {"out_features": 3}, "2": {"in_features": 3}},
    )
    apply_record(small, record)
    quantize(small, noise(9, 4))
    save_packed(small, tmp_path / "x")
    dense = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    load_packed(tmp_path / "x", dense)
    assert torch.equal(run(dense, noise(2, 4)), run(small, noise(2, 4)))


def test_a_pruned_quantized_layer_comes_near_its_entropy(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(784, 300, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(sparse(300, 784, share=0.95))
    quantize_layers(model, codebook(4)).enable(True)
    save_packed(model, tmp_path / "x")
    weight = model[0].weight.flatten()
    counts = weight.unique(return_counts=True)[1].double() / len(weight)
    entropy = float(-(counts * counts.log2()).sum()) * len(weight) / 8
    assert (tmp_path / "x").stat().st_size < 1.03 * entropy + 500


def shown_weights(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names of the quantized weights, as the layers show them, and their modules."""
    return [(f"{name}.{key}", module) for name, module in model.named_modules() for key in weights(module)]


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    """Weights bit for bit; so are outputs where the same kernels run: here, without gradients on both sides.

    With gradients oneDNN takes another kernel for an LSTM on CPUs with AVX2 alone, which differs in the last bit.
    """
    x, model = noise(4, 3, 8, 8), net()
    quantize(model, x)
    save_packed(model, tmp_path / "x")
    shown = {name: getattr(module, name.rpartition(".")[2]) for name, module in shown_weights(model)}
    torch.save({"x": x, "y": run(model, x)[0], "shown": shown}, tmp_path / "io")
    code = (
        "import sys, torch; from tests.unit.test_packed import net, shown_weights; import lightning_compress as c\n"
        "io = torch.load(sys.argv[1]); model = net(1).eval(); c.load_packed(sys.argv[2], model)\n"
        "found = {name: getattr(module, name.rpartition('.')[2]) for name, module in shown_weights(model)}\n"
        "assert found.keys() == io['shown'].keys() and len(found) == 5\n"
        "assert all(torch.equal(found[name], io['shown'][name]) for name in found)\n"
        "with torch.no_grad(): assert torch.equal(model(io['x'])[0], io['y'])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "io", tmp_path / "x"], check=True, timeout=120)


def test_a_model_that_is_not_the_quantized_one_is_refused(tmp_path: Path) -> None:
    model = net()
    quantize(model, noise(4, 3, 8, 8))
    save_packed(model, tmp_path / "x")
    with pytest.raises(ValueError, match="is of another model"):
        load_packed(tmp_path / "x", nn.Sequential(nn.Linear(3, 2)))


def test_the_package_exports_both() -> None:
    assert lightning_compress.save_packed is save_packed
    assert lightning_compress.load_packed is load_packed
