"""Recurrent layers in the files: what computes in integers, what in float, and that this is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import int8, w8
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.in_float import in_float
from lightning_compress.deploy.onnx import Runner
from lightning_compress.forward import Inputs
from lightning_compress.quantization import Affine, Scheme
from lightning_compress.quantization.convert import overflowing, to_float
from lightning_compress.quantization.fake_quant import weights

from ..nightly import some
from .helpers import largest_difference, noise, quantize, randomized, run

X = noise(4, 6, 8)


class Last(nn.Module):
    """The last output of a recurrent layer, through a linear one."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.recurrent = kind(8, 16, batch_first=True, bidirectional=True, **options)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def exported(model: nn.Module, x: Tensor, path: Path, scheme: Scheme | None = None, name: str = "onnx") -> Any:
    """The runner of the file of a model that is quantized in place."""
    quantize(model, x, scheme=scheme)
    kind = FORMATS[name]
    options = {} if kind.dynamic_batch else {"batch_size": len(x)}
    file = path / f"model{kind.suffix}"
    kind.export(kind.convert(model), Inputs((x,), {}), file, **options)
    return kind.runner(file, run(model, x))


def types(runner: Runner) -> list[str]:
    return [node.op_type for node in onnx.load(runner.path).graph.node]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("name", ["onnx", pytest.param("executorch", marks=pytest.mark.runtimes)])
def test_a_quantized_recurrent_layer_runs_in_its_file(name: str, kind: type[nn.RNNBase], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Last(kind)
    runner = exported(model, X, tmp_path, name=name)
    expected = run(model, X)
    assert (runner(Inputs((X,), {})) - expected).abs().max() < 0.02 * (expected.max() - expected.min())
    kernels = runner.integer_kernels()
    assert (kernels.integer == kernels.total) == (name == "onnx" and kind is nn.LSTM)
    named = in_float(model, runner.runtime, getattr(runner, "float_kernels", list)())
    assert named == (
        []
        if kernels.integer == kernels.total
        else [f"recurrent ({runner.runtime} has no integer kernel of {kind.__name__})"]
    )


def dynamically_quantized(x: np.ndarray) -> np.ndarray:
    """As onnxruntime's DynamicQuantizeLinear does it: 256 steps from the least value, or 0, to the largest, or 0."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = np.float32((high - low) / 255 or 1)
    zero = np.round(-low / step)
    return (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step


def lstm(x: np.ndarray, w: np.ndarray, r: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Outputs (batch, steps, hidden) of a layer that finds the range of all it multiplies."""
    hidden, cell = np.zeros((2, len(x), r.shape[1]), np.float32)
    outputs = []
    products = dynamically_quantized(x) @ w.T + bias
    for step in range(x.shape[1]):
        gates = products[:, step] + dynamically_quantized(hidden) @ r.T
        i, f, g, o = np.split(gates, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        cell = f * cell + i * np.tanh(g)
        hidden = o * np.tanh(cell)
        outputs.append(hidden)
    return np.stack(outputs, axis=1)


class Outputs(nn.Module):
    """All that one recurrent layer of one direction gives, and its input as it reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(8, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_lstm_of_the_file_is_one_that_quantizes_as_it_runs(granularity: Any, bits: int, tmp_path: Path) -> None:
    model = randomized(Outputs())
    scheme = Scheme(Affine(bits, symmetric=True), Affine(8), weight_granularity=granularity)
    runner = exported(model, X, tmp_path, scheme)
    assert "DynamicQuantizeLSTM" in types(runner)
    quantizers = weights(model.net)
    parameters = dict(model.net.named_parameters())
    w, r = (quantizers[name](parameters[name]).detach().numpy() for name in ("weight_ih_l0", "weight_hh_l0"))
    bias = (model.net.bias_ih_l0 + model.net.bias_hh_l0).detach().numpy()
    read = []
    with torch.no_grad(), model.net.register_forward_pre_hook(lambda _, args: read.append(args[0])):
        model(X)
    got = runner(Inputs((X,), {})).numpy()
    off = np.abs(run(to_float(model), X).numpy() - got).max()
    difference = np.abs(lstm(read[0].numpy(), w, r, bias) - got)
    assert difference.max() < 0.3 * off
    assert np.median(difference) < 1e-6


@pytest.mark.parametrize("size", some([1, 5], 5))
def test_two_layers_in_two_directions_at_any_batch_size(size: int, tmp_path: Path) -> None:
    model = randomized(Last(nn.LSTM, num_layers=2))
    runner = exported(model, X, tmp_path)
    assert types(runner).count("DynamicQuantizeLSTM") == 2
    x = noise(size, 6, 8, seed=size)
    expected = run(model, x)
    assert largest_difference(runner(Inputs((x,), {})), expected) < 0.02 * float(expected.max() - expected.min())


@pytest.mark.parametrize(("kind", "scheme"), [(nn.LSTM, w8()), (nn.GRU, None)])
def test_a_layer_that_stays_in_float_has_its_weights_decoded_once(
    kind: type[nn.RNNBase], scheme: Scheme | None, tmp_path: Path
) -> None:
    model = randomized(Last(kind))
    runner = exported(model, X, tmp_path, scheme)
    assert largest_difference(runner(Inputs((X,), {})), run(model, X)) < 1e-3
    stored = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(runner.path).graph.initializer}
    assert not [x for x in stored.values() if x.dtype == np.float32 and x.ndim == 3 and x.shape[2] > 1]
    Runner.session_of(runner.path, tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    (node,) = (node for node in graph.node if node.op_type == kind.__name__)
    assert set(node.input[1:3]) <= {value.name for value in graph.initializer}
    reason = "quantized in its weights only" if scheme else f"onnxruntime has no integer kernel of {kind.__name__}"
    assert in_float(model, "onnxruntime", runner.float_kernels())[0] == f"recurrent ({reason})"


def test_what_is_left_in_float_is_named_with_what_is_known_of_it(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose1d(8, 8, 1), nn.ReLU())
            self.out, self.head, self.raw = nn.Linear(8, 8), nn.Linear(8, 4), nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.out(self.net(x.mT).mT)) @ self.raw

    model = randomized(Net())
    runner = exported(model, X, tmp_path, int8(exclude=["out"]))
    assert set(in_float(model, "onnxruntime", runner.float_kernels())) == {
        "net.2 (onnxruntime has no integer kernel of ConvTranspose)",
        "out (excluded by name)",
        "raw (a raw parameter of Net, which is not a kind of layer known here)",
    }


def test_codes_that_saturate_in_the_lstm_of_a_cpu_without_vnni_are_doubted() -> None:
    for scheme in (int8(), int8(exact_kernels=True)):
        model = randomized(Last(nn.LSTM))
        quantize(model, X, scheme=scheme)
        found = overflowing(FORMATS["onnx"].convert(model), FORMATS["onnx"].integer_lstm)
        assert ("recurrent.weight_hh_l0" in found) == scheme.exact_kernels


@pytest.mark.runtimes
def test_openvino_reads_an_lstm_of_its_own(tmp_path: Path) -> None:
    model = randomized(Last(nn.LSTM))
    runner = exported(model, X, tmp_path, name="openvino")
    assert largest_difference(runner(Inputs((X,), {})), run(model, X)) < 1e-3
    assert runner.integer_kernels() == (1, 3)  # two directions, and what reads them
    (said,) = in_float(model, "openvino", runner.float_kernels())
    assert said == "recurrent (openvino's integer LSTM takes one scale for its input and its hidden state)"
