"""The ONNX file in onnxruntime, against the fake-quantized model."""

from __future__ import annotations

import copy
import logging
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import convert
from lightning_compress.deploy.onnx import Runner, export
from lightning_compress.forward import Inputs, run_model
from lightning_compress.quantization import Affine, Scheme, w8
from lightning_compress.quantization.convert import to_float

from .helpers import largest_difference, noise, quantize, randomized, run
from .test_convert import IMAGES, dead_channel, negative_gamma
from .test_placement import Residual


class Wide(nn.Module):
    """Two convolutions with weights worth packing, and a layer too small for it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).flatten(1))


def export_quantized(model: nn.Module, x: Tensor, path: Path) -> Runner:
    """The file of a model that is quantized in place."""
    quantize(model, x)
    export(convert(model), Inputs((x[:1],), {}), path)
    return Runner(path, run(model, x))


def kernels(path: Path) -> list[str]:
    """The operations that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Runner]:
    model = randomized(Residual())
    path = tmp_path_factory.mktemp("onnx") / "below" / "model.onnx"
    return model, path, export_quantized(model, IMAGES, path)


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_the_file_computes_what_the_fake_quantized_model_computes_at_any_batch_size(residual: Any, size: int) -> None:
    model, _, runner = residual
    x = noise(size, 2, 8, 8, seed=size)
    expected, plain = run(model, x), run(to_float(model), x)
    got = runner(Inputs((x,), {}))
    assert got.shape == (size, 3)
    assert largest_difference(got, expected) < 0.5 * largest_difference(expected, plain)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_the_file_runs_in_integer_kernels(residual: Any) -> None:
    _, path, _ = residual
    found = kernels(path)
    assert found.count("QLinearConv") == 5
    assert found.count("QLinearAdd") == 2
    assert found.count("QLinearAveragePool") == 1
    assert "Conv" not in found
    assert "Add" not in found


def test_weights_of_four_bits_are_stored_two_to_a_byte_and_run_like_those_of_eight(tmp_path: Path) -> None:
    model, codes, sizes = randomized(Wide()), {}, {}
    for bits in (8, 4):
        copied, path = copy.deepcopy(model), tmp_path / f"{bits}.onnx"
        x = noise(4, 2, 8, 8)
        quantize(copied, x, scheme=Scheme(Affine(bits, symmetric=True)))
        export(convert(copied), Inputs((x[:1],), {}), path)
        onnx.checker.check_model(onnx.load(path), full_check=True)
        runner, codes[bits], sizes[bits] = Runner(path, run(copied, x)), kernels(path), path.stat().st_size
        expected = run(copied, x)
        off = largest_difference(expected, run(to_float(copied), x))
        assert largest_difference(runner(Inputs((x,), {})), expected) < 0.5 * off
    assert codes[4] == codes[8]
    assert "QLinearConv" in codes[4]
    assert "Cast" not in codes[4]
    num = sum(p.numel() for p in model.parameters() if p.numel() >= 256)
    assert 0.45 * num < sizes[8] - sizes[4] < 0.5 * num


def test_the_weights_are_stored_as_int8_in_the_one_file(residual: Any) -> None:
    model, path, _ = residual
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto)
    stored = [onnx.numpy_helper.to_array(t) for t in proto.graph.initializer]
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert sorted(a.size for a in stored if a.dtype == np.int8 and a.ndim > 1) == sorted(p.numel() for p in weights)
    assert not [a for a in stored if a.dtype == np.float32 and a.ndim > 1 and a.size > 8]
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".data"] == []


@pytest.mark.parametrize("build", [negative_gamma, dead_channel])
def test_flipped_and_dead_channels_agree_in_the_file(build: Any, tmp_path: Path) -> None:
    model = build()
    path = tmp_path / "model.onnx"
    runner = export_quantized(model, IMAGES, path)
    expected, plain = run(model, IMAGES), run(to_float(model), IMAGES)
    assert kernels(path).count("QLinearConv") == 2
    assert largest_difference(runner(Inputs((IMAGES,), {})), expected) < 0.5 * largest_difference(expected, plain)


def dead_and_faint_channels(layer: nn.Module) -> None:
    layer.weight[1:] *= torch.tensor([0.0, 1e-4, 1e-6]).view(3, 1, 1, 1)
    layer.bias[1:] = torch.tensor([1.0, 5.0, 1.0])


def dead_layer(layer: nn.Module) -> None:
    layer.weight.zero_()
    layer.bias.fill_(0.5)


@pytest.mark.parametrize("prune", [dead_and_faint_channels, dead_layer])
def test_what_was_pruned_away_lives_on_by_its_bias_in_the_file(prune: Any, tmp_path: Path) -> None:
    model, images = randomized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))), IMAGES.sigmoid()
    with torch.no_grad():
        model[0].weight *= 0.3
        prune(model[0])
    runner = export_quantized(model, images, tmp_path / "model.onnx")
    expected = run(model, images)
    difference = largest_difference(runner(Inputs((images,), {})), expected)
    assert difference < 0.02 * float(expected.abs().max())


def test_a_channel_whose_norm_fades_away_lives_on_by_its_bias_in_the_file(tmp_path: Path) -> None:
    model, images = negative_gamma(), IMAGES.sigmoid()
    with torch.no_grad():
        model[0].weight *= 0.2
        model[1].weight[1], model[1].bias[1] = 1e-5, 0.5
    runner = export_quantized(model, images, tmp_path / "model.onnx")
    expected = run(model, images)
    difference = largest_difference(runner(Inputs((images,), {})), expected)
    assert difference < 0.02 * float(expected.abs().max())


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, extra: Tensor) -> dict[str, Any]:
        y = self.fc(x)
        return {"logits": y, "more": (y.softmax(-1), y + extra)}


class Batch(Several):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return super().forward(**batch)


@pytest.mark.parametrize("kind", ["by order", "by name", "by both", "in a dict"])
def test_several_inputs_and_outputs_keep_their_names_and_structure(kind: str, tmp_path: Path) -> None:
    def inputs(size: int) -> Inputs:
        values = {"x": noise(size, 3, seed=size), "extra": noise(size, 2, seed=9)}
        return {
            "by order": Inputs(tuple(values.values()), {}),
            "by name": Inputs((), values),
            "by both": Inputs((values["x"],), {"extra": values["extra"]}),
            "in a dict": Inputs((values,), {}),
        }[kind]

    model = randomized(Several() if kind.startswith("by") else Batch()).eval()
    export(model, inputs(1), tmp_path / "model.onnx")
    runner = Runner(tmp_path / "model.onnx", run_model(model, inputs(1)))
    for size in (1, 5):
        got, expected = runner(inputs(size)), run_model(model, inputs(size))
        assert got.keys() == expected.keys()
        assert isinstance(got["more"], tuple)
        assert largest_difference(got, expected) < 1e-5


def test_the_float_file_is_the_plain_model_and_exporting_leaves_no_trace_in_torch(tmp_path: Path) -> None:
    model, logger = negative_gamma().eval(), logging.getLogger("torch.onnx")
    plain = run(model, IMAGES)
    quantize(model, IMAGES)
    before = (nn.modules.transformer._detect_is_causal_mask, logger.level, list(warnings.filters))
    export(to_float(model), Inputs((IMAGES,), {}), tmp_path / "float.onnx")
    assert (nn.modules.transformer._detect_is_causal_mask, logger.level, list(warnings.filters)) == before
    runner = Runner(tmp_path / "float.onnx", plain)
    torch.testing.assert_close(runner(Inputs((IMAGES,), {})), plain, rtol=1e-4, atol=1e-4)


def test_a_prepared_call_runs_the_file(residual: Any) -> None:
    _, _, runner = residual
    inputs = Inputs((IMAGES,), {})
    (output,) = runner.prepare(inputs)()
    assert torch.equal(torch.from_numpy(output), runner(inputs))


def test_the_exporter_reads_its_operators_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And files are byte for byte those of an exporter that reads them anew."""
    registry = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    model, inputs = nn.Sequential(nn.Linear(3, 5), nn.ReLU()).eval(), Inputs((noise(2, 3),), {})
    for name in ("first", "second"):
        export(model, inputs, tmp_path / name)
    assert "cache" not in repr(registry.from_torchlib), "torch is left as it was"

    def fail(*_: Any) -> None:
        raise AssertionError("the operators are read again")

    monkeypatch.setattr(registry, "_cleanup_registry_based_on_opset_version", fail)
    export(model, inputs, tmp_path / "third")
    monkeypatch.undo()
    monkeypatch.setattr("lightning_compress.deploy.onnx._remembering", lambda read: read)
    export(model, inputs, tmp_path / "anew")
    assert len({(tmp_path / name).read_bytes() for name in ("first", "second", "third", "anew")}) == 1


@pytest.mark.parametrize("scheme", [w8(), Scheme(Affine(4, symmetric=True), None)], ids=["w8", "w4"])
def test_activations_in_float_stay_so_in_products_of_matrices(scheme: Scheme, tmp_path: Path) -> None:
    """Of such a product onnxruntime would make a MatMulNBits, which quantizes activations to 8 bits."""
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64))
    x = noise(8, 7, 64)
    quantize(model, x, scheme=scheme)
    path = tmp_path / "model.onnx"
    export(convert(model), Inputs((x[:1],), {}), path)
    assert "MatMulNBits" not in kernels(path)
    expected = run(model, x)
    torch.testing.assert_close(Runner(path, expected)(Inputs((x,), {})), expected, atol=1e-5, rtol=1e-5)


def test_zero_points_of_a_large_vocabulary_are_left_out(tmp_path: Path) -> None:
    """Behind a few thousand the exporter leaves nodes that make them."""
    model = randomized(nn.Sequential(nn.Embedding(30522, 2), nn.Linear(2, 3)))
    tokens = torch.arange(12).view(4, 3) * 2500
    quantize(model, tokens, scheme=w8())
    path = tmp_path / "model.onnx"
    export(convert(model), Inputs((tokens,), {}), path)
    graph = onnx.load(path).graph
    assert [len(node.input) for node in graph.node if node.op_type == "DequantizeLinear"] == [2, 3]
    assert not {node.op_type for node in graph.node} & {"Expand", "ConstantOfShape"}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), run(model, tokens), atol=1e-5, rtol=1e-4)
