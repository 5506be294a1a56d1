"""Weights that the integer kernels of every x86 CPU multiply exactly: the arithmetic, and what files hold."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_compress import Scheme, convert, int4, int8, lsq, w4a8, w8
from lightning_compress.deploy.onnx import export
from lightning_compress.forward import Inputs
from lightning_compress.quantization import Affine, Binary, Float8, LearnedClip, LearnedStep, PowerOfTwo, Quantizer
from lightning_compress.quantization.convert import overflowing
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.overflow import fits_pairs, portable

from ..nightly import some
from .helpers import noise, quantize, randomized
from .test_placement import Residual

MOST = 2**15 - 1


def vpmaddubsw(activations: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The dot product of unsigned activations and signed weights as AVX2 computes it: pairs saturate in 16 bits."""
    products = activations.astype(np.int64) * codes.astype(np.int64)
    return np.clip(products.reshape(-1, 2).sum(1), -(2**15), MOST).sum()


@pytest.mark.parametrize(
    ("weight", "inputs", "limits"),
    [
        (Affine(8, symmetric=True), Affine(8), (-64, 64)),
        (LearnedStep(8, symmetric=True), LearnedStep(8), (-64, 64)),
        (LearnedClip(8, symmetric=True), Affine(8), (-64, 64)),
        (Affine(8, symmetric=True), Affine(8, symmetric=True), (-64, 64)),
        (Affine(7, symmetric=True), Affine(8), (-63, 63)),
        (Affine(8, symmetric=True), Affine(7), (-127, 127)),
        (Affine(8, symmetric=True), None, (-127, 127)),
        (Affine(8, symmetric=True), Affine(16, symmetric=True), (-127, 127)),
        (Affine(4, symmetric=True), Affine(8), (-7, 7)),
    ],
    ids=str,
)
def test_codes_are_narrowed_only_where_two_products_could_overflow(
    weight: Affine, inputs: Quantizer | None, limits: tuple[int, int]
) -> None:
    narrowed = portable(weight, inputs)
    assert isinstance(narrowed, type(weight))
    assert narrowed.limits == limits
    assert narrowed.bits == weight.bits
    if limits == weight.limits:
        assert narrowed is weight
    if inputs is not None and inputs.num_codes <= 256:  # kernels that add in 16 bits read bytes
        assert 2 * limits[1] * (inputs.num_codes - 1) <= MOST


@pytest.mark.parametrize("weight", [Affine(8), Binary(), PowerOfTwo(4), Float8()], ids=str)
def test_other_codes_are_left_as_they_are(weight: Quantizer) -> None:
    assert portable(weight, Affine(8)) is weight


def test_what_fits_is_what_no_pair_of_a_saturating_kernel_can_clip() -> None:
    """Against the kernel's own arithmetic, over all orders of the weights and the worst activations."""
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        codes = generator.integers(-127, 128, 4) // generator.integers(1, 4)
        worst = [255 * (codes > 0), 255 * (codes < 0)]
        orders = [list(order) for order in itertools.permutations(range(4))]
        exact = all(vpmaddubsw(x[o], codes[o]) == (x * codes).sum() for x in worst for o in orders)
        assert fits_pairs(torch.tensor(codes)[None], 0, 255) == exact, codes
        seen.add(exact)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("codes", "axis", "largest", "fits"),
    [
        ([[64, 64]], 0, 255, True),
        ([[65, 64]], 0, 255, False),
        ([[65], [65]], 0, 255, True),  # of two channels
        ([[65], [65]], 1, 255, False),
        ([[-64, -64, 127, 1]], 0, 255, True),
        ([[-64, -65]], 0, 255, False),
        ([[127, 127]], 0, 129, True),
        ([[127, 127]], 0, 130, False),
        ([[127]], 0, 255, True),
        ([[]], 0, 255, True),
    ],
)
def test_the_two_largest_codes_of_one_sign_decide(codes: list[list[int]], axis: int, largest: int, fits: bool) -> None:
    assert fits_pairs(torch.tensor(codes, dtype=torch.int8), axis, largest) is fits


def test_a_scheme_writes_portable_codes_unless_kernels_are_promised_to_be_exact() -> None:
    ours = int8(overrides={"head": lsq(8), "light": w8(), "few": Scheme(inputs=Affine(6))})
    limits = {name: ours.weight_of(name).limits for name in ("body", "head", "light", "few")}  # type: ignore[attr-defined]
    assert limits == {"body": (-64, 64), "head": (-64, 64), "light": (-127, 127), "few": (-127, 127)}
    exact = int8(overrides={"head": lsq(8)}, exact_kernels=True)
    assert exact.weight_of("head") == LearnedStep(8, symmetric=True)
    assert exact.weight_of("body") == Affine(8, symmetric=True)
    one = int8(overrides={"head": lsq(8, exact_kernels=True)})
    assert [one.weight_of(name).limits for name in ("body", "head")] == [(-64, 64), (-127, 127)]  # type: ignore[attr-defined]


def test_a_promise_that_is_no_bool_is_refused() -> None:
    with pytest.raises(TypeError, match=r"exact_kernels='no': accepted is True or False"):
        Scheme(exact_kernels="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(("fields", "said"), [({"top": 128}, "1..127"), ({"top": 0}, "1..127"), ({"top": 7.0}, "1..")])
def test_a_top_that_no_code_has_is_refused(fields: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Affine(8, symmetric=True, **fields)
    with pytest.raises(ValueError, match="for symmetric codes"):
        Affine(8, top=64)


class Attentive(nn.Module):
    """Attention, an embedding, and linear layers before and behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(x)).mean(1))


NETS = {
    "convolutions": (Residual, lambda: noise(4, 2, 8, 8).abs()),
    "attention": (Attentive, lambda: torch.arange(24).view(4, 6) % 11),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv1d(4, 6, 1), nn.Flatten()),
        lambda: noise(4, 4, 9).abs(),
    ),
}


def pairs_of(path: Path) -> dict[str, int]:
    """The largest sum of two codes of one sign in a channel of each integer weight of an ONNX file."""
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    stored |= {
        node.output[0]: stored[node.input[0]]
        for node in graph.node
        if node.op_type == "Cast" and node.input[0] in stored
    }
    found = {}
    for node in graph.node:
        codes = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.ndim < 2:
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        channels = np.moveaxis(codes.astype(int), axis, 0).reshape(codes.shape[axis], -1)
        ordered = np.sort(channels, axis=1)
        found[node.output[0]] = int(
            max(ordered[:, -2:].clip(min=0).sum(1).max(), -ordered[:, :2].clip(max=0).sum(1).min())
        )
    return found


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "scheme", some([int8(), lsq(8), w4a8(), int4()], int8(), w4a8()), ids=["int8", "lsq8", "w4a8", "int4"]
)
def test_no_pair_of_weights_in_a_file_can_overflow(net: str, scheme: Scheme, tmp_path: Path) -> None:
    make, inputs = NETS[net]
    model, x = randomized(make()).eval(), inputs()
    quantize(model, x, scheme=scheme).begin()
    converted = convert(model)
    export(converted, Inputs((x[:1],), {}), tmp_path / "model.onnx")
    found = pairs_of(tmp_path / "model.onnx")
    assert len(found) >= 2
    assert {name: pair for name, pair in found.items() if 255 * pair > MOST} == {}
    assert overflowing(converted) == []


def test_the_full_range_is_named_layer_by_layer(tmp_path: Path) -> None:
    model, x = randomized(Residual()).eval(), noise(4, 2, 8, 8).abs()
    quantization = quantize(model, x, scheme=int8(exact_kernels=True))
    converted = convert(model)
    export(converted, Inputs((x[:1],), {}), tmp_path / "model.onnx")
    beyond = [pair for pair in pairs_of(tmp_path / "model.onnx").values() if 255 * pair > MOST]
    assert len(overflowing(converted)) == len(beyond) > 0
    assert set(overflowing(converted)) <= {layer.name for layer in quantization.layers}
    assert overflowing(convert(model, activations="int8")) == overflowing(converted)


def test_a_layer_that_computes_in_float_overflows_nothing() -> None:
    model, x = randomized(Residual()).eval(), noise(4, 2, 8, 8)
    quantize(model, x, scheme=w8())
    assert int(max(weights(m)["weight"].codes(m.weight)[0].max() for m in model.modules() if weights(m))) == 127
    assert overflowing(convert(model)) == []
    assert overflowing(nn.Linear(2, 2)) == []
