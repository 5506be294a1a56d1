"""The interpreter of microcontrollers: the same codes as integer arithmetic gives, its arena, and what it lacks."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.callbacks import Export, QuantizationAwareTraining
from lightning_compress.demo.models import Classifier
from lightning_compress.deploy.files import write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.tflm import CodeDifference, Runner
from lightning_compress.forward import Inputs

from .helpers import noise, quantize, randomized, run

pytestmark = pytest.mark.runtimes
IMAGES = noise(12, 1, 8, 8)


class Small(nn.Module):
    """Convolutions, one of them depthwise, and a mean before the last."""

    def __init__(self, width: int = 4, depthwise: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.deep = nn.Conv2d(width, width, 3, groups=width if depthwise else 1)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.conv(x).relu()).relu().mean((2, 3), keepdim=True)).flatten(1)


def runner_of(model: nn.Module, x: Tensor, folder: Path) -> Runner:
    quantize(randomized(model).eval(), x)
    kind = FORMATS["tflm"]
    files = write_files(kind, model, Inputs((x,), {}), folder / "model.tflite", kind.batch_sizes)
    return Runner(files.shipped[1], run(model, x))


def test_convolutions_and_means_give_the_codes_of_the_reference_kernels(tmp_path: Path) -> None:
    runner = runner_of(Small(), IMAGES, tmp_path)
    found = runner.compare(Inputs((IMAGES,), {}), reference=True)
    assert found == CodeDifference(num=48, differing=0, largest=0)
    near = runner.compare(Inputs((IMAGES,), {}))
    assert near.num == 48
    assert near.largest <= 1


def test_a_linear_layer_rounds_twice_in_32_bit_integers(tmp_path: Path) -> None:
    """As gemmlowp does it (Jacob 2018, arXiv:1712.05877, 2.2), against numpy."""
    x = noise(40, 24)
    runner = runner_of(nn.Sequential(nn.Linear(24, 16)), x, tmp_path)
    details = {d["index"]: d for d in runner.interpreter.get_tensor_details()}
    (op,) = (op for op in runner.interpreter._get_ops_details() if op["op_name"] == "FULLY_CONNECTED")
    at, weight, bias = (int(i) for i in op["inputs"])
    (out,) = (int(i) for i in op["outputs"])
    (step, zero), (out_step, out_zero) = details[at]["quantization"], details[out]["quantization"]
    steps = details[weight]["quantization_parameters"]["scales"].astype(np.float64)
    codes = runner.codes_of(Inputs((x,), {}))[0]
    w, b = (runner.interpreter.get_tensor(i).astype(np.int64) for i in (weight, bias))
    sums = (codes.astype(np.int64) - zero) @ w.T + b
    fraction, exponent = np.frexp(steps * np.float64(step) / np.float64(out_step))
    high = np.round(fraction * 2**31) * sums / 2**31
    doubled = np.sign(high) * np.floor(np.abs(high) + 0.5)
    shifted = doubled / 2.0**-exponent
    expected = np.sign(shifted) * np.floor(np.abs(shifted) + 0.5) + out_zero
    got = np.concatenate([runner.run_codes([row[None]])[0] for row in codes])
    assert np.array_equal(got, np.clip(expected, -128, 127))


def test_a_wider_layer_takes_a_larger_arena_and_the_runner_answers_like_the_model(tmp_path: Path) -> None:
    models = {width: Small(width, depthwise=False) for width in (4, 32)}
    runners = {}
    for width, model in models.items():
        folder = tmp_path / str(width)
        folder.mkdir()
        runners[width] = runner_of(model, IMAGES, folder)
    arenas = {width: runner.arena_bytes for width, runner in runners.items()}
    # what a convolution reads and writes is there at once: 8 x 8 and 6 x 6 of 32 channels
    assert arenas[4] < 100 * 32 < arenas[32]
    for width, runner in runners.items():
        got, expected = runner(Inputs((IMAGES,), {})), run(models[width], IMAGES)
        assert float((got - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_an_operator_that_it_lacks_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kind = FORMATS["tflm"]
    kind.export(nn.Sequential(nn.Flatten(), nn.GELU()), Inputs((IMAGES,), {}), tmp_path / "model.tflite")
    with pytest.raises(RuntimeError, match=r"has no kernel for the operator GELU of the \.tflite file"):
        Runner(tmp_path / "model.tflite", IMAGES)
    assert "GELU" not in capfd.readouterr().err


class Net(Classifier):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__(0.05, num_classes=3)
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def fitted(activation: nn.Module, folder: Path, formats: list[str]) -> Export:
    data = torch.utils.data.TensorDataset(IMAGES, torch.arange(12) % 3)
    export = Export(formats, dirpath=folder)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[QuantizationAwareTraining(), export],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(data, 4)
    trainer.fit(Net(activation), loader, loader)
    return export


def test_export_refuses_before_training_what_the_interpreter_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Export.formats='tflm' cannot take Net: .* no kernel for the operator GELU"):
        fitted(nn.GELU(), tmp_path, ["tflm"])
    assert not list(tmp_path.iterdir())


def test_export_measures_the_arena_and_times_nothing(tmp_path: Path) -> None:
    export = fitted(nn.ReLU(), tmp_path, ["litert", "tflm"])
    assert not export.failures
    phone, board = export.artifacts
    assert phone.arena_bytes is None
    assert phone.latency_ms
    assert board.arena_bytes is not None
    assert 144 + 36 * 4 < board.arena_bytes < 8192
    assert board.latency_ms == board.latency_ms_float == {}
    assert board.integer_kernels == board.num_kernels == 2
    assert board.agreement == 1.0
    assert "val_acc" in export.metrics["tflm"]
    # one file for both
    assert (board.path, board.bytes) == (phone.path, phone.bytes)
