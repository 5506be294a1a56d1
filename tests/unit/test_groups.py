"""Weights with a scale a group: the codes and scales of training, in every file that holds groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import Scheme, int8, w4_groups, w4a8_groups
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.forward import Inputs
from lightning_compress.quantization import Affine, LearnedStep, PerToken, ShortScale, quantization_of
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.model import quantize_layers
from lightning_compress.testing import check_quantizer
from tests.unit.helpers import quantize


class Net(nn.Module):
    """Linear layers with a bias and without, on two axes and on three, beside a norm that stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 64)
        self.norm = nn.LayerNorm(64)
        self.second = nn.Linear(64, 128, bias=False)
        self.head = nn.Linear(128, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.second(nn.functional.silu(self.norm(self.first(x))))
        return self.head(y.mean(1))


def grouped(scheme: Scheme) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(6, 5, 128)
    quantize(model, x, scheme=scheme)
    return model, x


def written(model: nn.Module, name: str, x: Tensor, folder: Path) -> tuple[Path, Any]:
    kind = FORMATS[name]
    path = folder / f"model{kind.suffix}"
    options = {} if kind.dynamic_batch else {"batch_size": len(x)}
    kind.export(kind.convert(model), Inputs((x,), {}), path, **options)
    return path, kind.runner(path, model(x))


def unpacked(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Blocks of MatMulNBits as codes, by onnxruntime's description of the operation: the low half of a byte first."""
    if bits == 4:
        blocks = np.stack([blocks & 15, blocks >> 4], -1)
    return blocks.reshape(len(blocks), -1).astype(int) - 2 ** (bits - 1)


@pytest.mark.parametrize(
    "scheme",
    [
        *(w4_groups(16), w4_groups(32), w4_groups(64), w4a8_groups(32)),
        Scheme(Affine(8, symmetric=True), None, weight_granularity=32),
        Scheme(LearnedStep(3, symmetric=True), None, weight_granularity=64),
        w4_groups(32, overrides={"head": int8()}),
    ],
    ids=["16", "32", "64", "by token", "8 bits", "learned", "int8 head"],
)
def test_the_onnx_file_has_the_codes_and_scales_of_training(scheme: Scheme, tmp_path: Path) -> None:
    import onnx

    model, x = grouped(scheme)
    path, runner = written(model, "onnx", x, tmp_path)
    expected = model(x)
    torch.testing.assert_close(runner(Inputs((x,), {})), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runner(Inputs((x[:1],), {})), model(x[:1]), rtol=1e-4, atol=1e-5)  # any batch size
    graph = onnx.load(path).graph
    stored = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    found = [node for node in graph.node if node.op_type == "MatMulNBits"]
    layers = [model.first, model.second] if scheme.overrides else [model.first, model.second, model.head]
    assert len(found) == len(layers)
    for node, layer in zip(found, layers, strict=True):
        attributes = {a.name: a.i for a in node.attribute}
        codes, qparams = weights(layer)["weight"].codes(layer._parameters["weight"])
        assert np.array_equal(unpacked(stored[node.input[1]], attributes["bits"]), codes.numpy())
        assert np.array_equal(stored[node.input[2]].ravel(), qparams.scale.detach().numpy())
        assert attributes["block_size"] == scheme.weight_granularity
        assert not any(value.shape == tuple(layer.weight.shape) for value in stored.values())  # nothing in float beside


@pytest.mark.runtimes
def test_executorch_computes_in_8da4w_what_training_computed(tmp_path: Path) -> None:
    model, x = grouped(w4a8_groups(32))
    _, runner = written(model, "executorch", x, tmp_path)
    expected = model(x)
    # one value in a thousand lies so near to the border between two codes that rounding decides
    assert (runner(Inputs((x,), {})) - expected).abs().max() < 0.004 * (expected.max() - expected.min())
    assert runner.integer_kernels() == (3, 3)


@pytest.mark.runtimes
def test_executorch_finds_ranges_at_run_time_where_training_kept_activations_in_float(tmp_path: Path) -> None:
    model, x = grouped(w4_groups(64))
    path, runner = written(model, "executorch", x, tmp_path)
    expected = model(x)
    assert (runner(Inputs((x,), {})) - expected).abs().max() < 0.02 * (expected.max() - expected.min())
    assert runner.integer_kernels() == (3, 3)
    plain = tmp_path / "float.pte"
    FORMATS["executorch"].export(Net(), Inputs((x,), {}), plain, batch_size=6)
    assert path.stat().st_size < 0.4 * plain.stat().st_size


@pytest.mark.runtimes
def test_openvino_takes_the_same_blocks(tmp_path: Path) -> None:
    model, x = grouped(w4_groups(32))
    _, runner = written(model, "openvino", x, tmp_path)
    expected = model(x)
    assert (runner(Inputs((x,), {})) - expected).abs().max() < 0.02 * (expected.max() - expected.min())


@pytest.mark.parametrize(
    ("layer", "scheme", "name", "said"),
    [
        (nn.Conv2d(32, 4, 3), w4_groups(), "onnx", "'channel' or 'tensor' for layer, a Conv2d.*exclude=\\['layer'\\]"),
        (nn.Embedding(9, 32), w4_groups(), "onnx", "'channel' or 'tensor' for layer, a Embedding"),
        (nn.LSTM(32, 32), w4_groups(), "onnx", "'channel' or 'tensor' for layer.weight_ih_l0, a LSTM"),
        (nn.Linear(48, 4), w4_groups(), "onnx", "a divisor of the 48 inputs of layer"),
        (nn.Linear(48, 4), w4_groups(24), "onnx", "groups of 16, 32, 64, 128, 256 and at most 8 bits in onnx"),
        (nn.Linear(48, 4), w4_groups(16), "executorch", "at layer='16 of 4 bits': accepted is groups of 32, 64"),
        (nn.Linear(64, 4), Scheme(weight_granularity=32), "executorch", "'32 of 8 bits'.*at most 4 bits"),
        (nn.Linear(64, 4), w4_groups(), "litert", "accepted is 'channel' or 'tensor' in litert"),
        (nn.Linear(64, 4), w4_groups(), "torch", "accepted is 'channel' or 'tensor' in torch"),
    ],
)
def test_groups_that_no_kernel_takes_are_refused_before_training(
    layer: nn.Module, scheme: Scheme, name: str, said: str
) -> None:
    model = nn.Module()
    model.layer = layer
    quantize_layers(model, scheme)
    with pytest.raises(ValueError, match=said):
        FORMATS[name].check(model)


def test_a_batch_norm_behind_groups_is_not_folded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16))
    x = torch.randn(64, 32)
    model(x)
    quantize(model, x, scheme=w4_groups())
    _, runner = written(model, "onnx", x, tmp_path)
    torch.testing.assert_close(runner(Inputs((x,), {})), model(x), rtol=1e-4, atol=1e-5)


def test_short_scales_are_bfloat16_and_clip_nothing() -> None:
    check_quantizer(ShortScale(4))
    x = torch.randn(1000, 32)
    found = ShortScale(4).fit(x, 0)
    assert torch.equal(found.scale, found.scale.bfloat16().float())
    away = (ShortScale(4).fake_quantize_fitted(x, 0) - x).abs().amax(1)
    assert (away <= found.scale * 0.52).all()


def test_tokens_are_quantized_by_their_own_range_as_torch_does() -> None:
    import torch.ao.quantization.fx._decomposed

    ops = torch.ops.quantized_decomposed
    x = torch.randn(50, 3, 40) * torch.logspace(-3, 3, 50)[:, None, None]
    x[0] = 0
    scale, zero_point = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    rest = (scale, zero_point, -128, 127, torch.int8)
    expected = ops.dequantize_per_token(ops.quantize_per_token(x, *rest), *rest, torch.float32)
    given = x.clone().requires_grad_()
    q = PerToken()
    values = q.fake_quantize(given, q.qparams(torch.tensor(-1.0), torch.tensor(1.0)))
    off = (values - expected).abs() / scale.float()
    assert off.max() < 1.01  # at a border between two codes rounding decides
    assert (off > 0.01).float().mean() < 0.005
    values.sum().backward()
    assert torch.equal(given.grad, torch.ones_like(x))


@pytest.mark.parametrize("wrong", [{"bits": 4}, {"symmetric": True}])
def test_tokens_have_one_form(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"accepted is PerToken\(\) alone"):
        PerToken(**wrong)


def test_layers_quantize_what_they_read_by_token_and_sums_stay_in_float() -> None:
    model, _ = grouped(w4a8_groups(32))
    assert set(quantization_of(model).activations) == {"first:input", "second:input", "head:input"}
    mixed, _ = grouped(w4a8_groups(32, overrides={"head": int8()}))
    places = quantization_of(mixed).activations
    assert isinstance(places["second:input"].quantizer, PerToken)
    assert type(places["head:input"].quantizer) is Affine
