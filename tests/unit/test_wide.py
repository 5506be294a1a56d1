"""Activations of more than 8 bits: the arithmetic against numpy, what files hold of them, and who takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from lightning_compress import Scheme, convert, int8, w8a16
from lightning_compress.deploy.files import Pair, write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.onnx import Runner, export
from lightning_compress.deploy.tflm import Runner as Micro
from lightning_compress.forward import Inputs
from lightning_compress.quantization import Affine
from lightning_compress.quantization.activation_codes import code_types
from lightning_compress.quantization.convert import overflowing
from lightning_compress.quantization.model import quantize_layers
from lightning_compress.testing import check_quantizer

from .helpers import largest_difference, noise, quantize, randomized, run
from .test_graph import Tokens
from .test_placement import Residual

IMAGES, SEQUENCES = noise(8, 2, 8, 8), noise(8, 5, 6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [12, 16])
def test_the_contract_is_kept(bits: int, symmetric: bool) -> None:
    check_quantizer(Affine(bits, symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-0.3, 2.7), (0.0, 6.0), (-5.0, 1e-3), (-400.0, 1.0)])
@pytest.mark.parametrize("bits", [12, 16])
def test_codes_and_values_are_the_formula_in_exact_arithmetic(
    bits: int, low: float, high: float, symmetric: bool
) -> None:
    quantizer = Affine(bits, symmetric)
    qparams = quantizer.qparams(torch.tensor(low), torch.tensor(high))
    top = 2 ** (bits - 1) - 1
    first, last = (-top, top) if symmetric else (0, 2**bits - 1)
    scale = max(-low, high) / top if symmetric else (high - low) / last
    zero_point = 0 if symmetric else round(-low / scale)
    assert float(qparams.scale) == pytest.approx(scale, rel=1e-6)
    assert int(qparams.zero_point) == zero_point
    widest = 2 * max(-low, high)
    x = np.linspace(-widest, widest, 20011)
    exact = x / float(qparams.scale)
    x, exact = (values[np.abs(exact % 1 - 0.5) > 0.05] for values in (x, exact))
    expected = np.clip(np.round(exact) + zero_point, first, last)
    codes = quantizer.quantize(torch.from_numpy(x).float(), qparams)
    np.testing.assert_array_equal(codes.numpy(), expected)
    assert {codes.min().item(), codes.max().item()} == {first, last}
    values = quantizer.dequantize(codes, qparams).numpy()
    np.testing.assert_allclose(values, (expected - zero_point) * float(qparams.scale), rtol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_values_and_gradient_are_those_of_the_fused_operation_of_torch(symmetric: bool) -> None:
    quantizer = Affine(16, symmetric)
    qparams = quantizer.qparams(torch.tensor(-1.0), torch.tensor(2.0))
    ours, theirs = (noise(5000).requires_grad_() for _ in range(2))
    upstream = noise(5000, seed=1)
    faked = quantizer.fake_quantize(ours, qparams)
    expected = torch.fake_quantize_per_tensor_affine(theirs, qparams.scale, qparams.zero_point, *quantizer.limits)
    assert torch.equal(faked, expected)
    faked.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)
    assert ours.grad[ours > 2.1].eq(0).all()
    assert torch.equal(ours.grad[ours.abs() < 0.9], upstream[ours.abs() < 0.9])


def test_weights_of_more_than_8_bits_are_refused_by_name() -> None:
    said = (
        r"Scheme\.weight=Affine\(bits=16.*accepted is a Quantizer of at most 8 bits, since weights are stored as int8"
    )
    with pytest.raises(ValueError, match=said):
        Scheme(weight=Affine(16, symmetric=True))


def test_weights_beside_16_bits_keep_all_their_codes() -> None:
    assert w8a16().weight_of("layer").limits == (-127, 127)
    mixed = w8a16(overrides={"head": int8()})
    assert (mixed.weight_of("body").limits, mixed.weight_of("head").limits) == ((-127, 127), (-64, 64))


def zero_points(path: Path) -> dict[str, set[tuple[int, int]]]:
    """Type and value of the zero points of an ONNX file, by the operation."""
    graph = onnx.load(path).graph
    stored = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    kinds = {x.name: x.data_type for x in graph.initializer}
    found: dict[str, set[tuple[int, int]]] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            name = node.input[2]
            found.setdefault(node.op_type, set()).add((kinds[name], int(stored[name])))
    return found


@pytest.mark.parametrize("inputs", [Affine(16, symmetric=True), Affine(16), Affine(12), Affine(12, symmetric=True)])
def test_an_onnx_file_holds_int16_codes_and_computes_what_was_trained(inputs: Affine, tmp_path: Path) -> None:
    """By the reference of the ONNX project, on inputs that leave the ranges, too; and by onnxruntime."""
    model = randomized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 6))).eval()
    plain = run(model, IMAGES)
    quantize(model, IMAGES, scheme=Scheme(inputs=inputs))
    converted = convert(model)
    assert overflowing(converted) == []
    assert code_types(model, "uint8") == "int16"
    export(converted, Inputs((IMAGES,), {}), path := tmp_path / "model.onnx")
    points = zero_points(path)["QuantizeLinear"]
    assert {kind for kind, _ in points} == {TensorProto.INT16}
    assert not inputs.symmetric or points == {(TensorProto.INT16, 0)}
    runner = Runner(path, plain)
    reference = ReferenceEvaluator(str(path))
    for x in (IMAGES, 3 * IMAGES):
        expected = run(model, x)
        size = float(expected.max() - expected.min())
        assert largest_difference(run(converted, x), expected) < 1e-3 * size
        assert largest_difference(runner(Inputs((x,), {})), expected) < 1e-3 * size
        (got,) = reference.run(None, {runner.names[0]: x.numpy()})
        assert largest_difference(torch.from_numpy(got), expected) < 1e-3 * size
    assert runner.integer_kernels() == (0, 2)


def test_onnxruntime_multiplies_matrices_by_what_was_trained(tmp_path: Path) -> None:
    """It would make MatMulNBits of another form, which quantizes activations to 8 bits: 0.003 of the range."""
    model = randomized(Tokens()).eval()
    quantize(model, SEQUENCES, scheme=w8a16())
    export(convert(model), Inputs((SEQUENCES,), {}), path := tmp_path / "model.onnx")
    expected = run(model, SEQUENCES)
    runner = Runner(path, expected)
    assert largest_difference(runner(Inputs((SEQUENCES,), {})), expected) < 1e-5 * float(expected.abs().max())
    assert runner.integer_kernels() == (0, 2)
    stored = {x.data_type for x in onnx.load(path).graph.initializer if len(x.dims) == 2}
    assert TensorProto.INT8 in stored


@pytest.mark.parametrize(
    ("scheme", "name", "said"),
    [
        (w8a16(), "executorch", "accepted is a Quantizer of at most 8 bits, or None, in executorch. Take int8()"),
        (w8a16(), "openvino", "accepted is a Quantizer of at most 8 bits, or None, in openvino. Take int8()"),
        (Scheme(inputs=Affine(16)), "litert", r"accepted is Affine\(16, symmetric=True\), or .* Take w8a16\(\)"),
        (Scheme(inputs=Affine(12, symmetric=True)), "tflm", r"accepted is Affine\(16, symmetric=True\), or"),
        (int8(overrides={"1": w8a16()}), "executorch", r"Scheme\.inputs at 1="),
        (w8a16(overrides={"1": int8()}), "litert", r"Scheme\.inputs at 1=.*of at most 8 bits in all layers, in litert"),
    ],
)
def test_who_takes_none_refuses_them_before_training(scheme: Scheme, name: str, said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    quantize_layers(model, scheme)
    with pytest.raises(ValueError, match=said):
        FORMATS[name].check(model)


@pytest.mark.parametrize("name", ["onnx", "torch", "litert", "tflm"])
def test_who_takes_them_does(name: str) -> None:
    quantize_layers(model := nn.Sequential(nn.Linear(4, 2)), w8a16())
    FORMATS[name].check(model)


def written(model: nn.Module, x: Tensor, name: str, folder: Path) -> tuple[Path, Any]:
    kind = FORMATS[name]
    quantize(model, x, scheme=w8a16())
    files = write_files(kind, model, Inputs((x,), {}), folder / f"model{kind.suffix}", (1,))
    return files.shipped[1], Pair(kind, files, model, Inputs((x,), {})).shipped


@pytest.mark.runtimes
def test_litert_and_tflm_compute_16x8_in_integers(tmp_path: Path) -> None:
    model = randomized(Residual()).eval()
    path, runner = written(model, IMAGES, "litert", tmp_path)
    expected = run(model, IMAGES)
    size = float(expected.max() - expected.min())
    assert runner.integer_kernels() == (6, 6)
    assert [d["dtype"] for d in (*runner.inputs, *runner.outputs)] == [np.int16, np.int16]
    assert largest_difference(runner(Inputs((IMAGES,), {})), expected) < 1e-3 * size
    micro = Micro(path, expected)
    assert largest_difference(micro(Inputs((IMAGES,), {})), expected) < 1e-3 * size
    found = micro.compare(Inputs((IMAGES,), {}), reference=True)
    assert found.num == 24
    assert found.largest <= 2


@pytest.mark.runtimes
def test_inductor_computes_in_float_around_the_codes(tmp_path: Path) -> None:
    model = randomized(nn.Sequential(nn.Linear(6, 4))).eval()
    x = noise(8, 6)
    _, runner = written(model, x, "torch", tmp_path)
    expected = run(model, x)
    assert largest_difference(runner(Inputs((x,), {})), expected) < 1e-4 * float(expected.abs().max())
    assert runner.integer_kernels() == (0, 1)
