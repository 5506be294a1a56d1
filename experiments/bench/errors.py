"""What is said to wrong inputs: of each argument by its kind, and in situations of quantization and export.

The exit status is 1 if a message lacks the field, what was given, what is accepted or how to fix it.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from experiments import wrong_arguments
from lightning_compress import int8, log4, scheme, w8
from lightning_compress.callbacks import Export, PostTrainingQuantization, QuantizationAwareTraining
from lightning_compress.deploy.formats import FORMATS, check_formats
from lightning_compress.forward import Inputs
from lightning_compress.phase import Phase
from lightning_compress.quantization import (
    AdditivePowerOfTwo,
    Affine,
    Codebook,
    Exponential,
    Float8,
    LearnedClip,
    LearnedStep,
    MinMax,
    MovingAverage,
    Percentile,
    PowerOfTwo,
    Scheme,
)
from lightning_compress.quantization.convert import convert
from lightning_compress.quantization.model import quantize_layers
from lightning_compress.quantization.placement import find_placement
from lightning_compress.watch import Watch

__all__ = ["CASES", "message", "run"]

_FEWEST_WORDS = 8  # what was given, what is accepted and how to fix it take as many


def _trainer(folder: Path, callback: pl.Callback, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return pl.Trainer(callbacks=[callback], max_epochs=1, **quiet, **options)


def _fit(folder: Path, callback: pl.Callback, **options: Any) -> None:
    _trainer(folder, callback, limit_train_batches=4, limit_val_batches=2, **options).fit(BoringModel())


def _validate(folder: Path, num_batches: int) -> None:
    callback = PostTrainingQuantization()
    _trainer(folder, callback, limit_val_batches=num_batches).validate(BoringModel(), verbose=False)


def _quantized(how: Scheme) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    found = quantize_layers(model, how)
    with torch.no_grad():
        with Watch(model) as watch:
            model(torch.randn(4, 8))
        found.place(model, find_placement(watch.trace, model, {layer.name for layer in found.layers}))
        found.observe(True)
        model(torch.randn(4, 8))
    found.enable(True)
    return model


def _without(package: str) -> None:
    with patch("lightning_compress.deploy.formats.find_spec", lambda name: None):
        check_formats([package])


class _Strange(BoringModel):
    """An operation that few runtimes have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(super().forward(x).unsqueeze(0)).sum().expand(len(x), 2)


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.mean()) > 0 else -x


def _exported(folder: Path, name: str) -> None:
    _trainer(folder, Export([name]), limit_train_batches=4, limit_val_batches=2).fit(_Strange())


def _logarithmic(folder: Path) -> None:
    callback = QuantizationAwareTraining("log4", Phase(0.25, 0.5), Phase(0.5, 1.0))
    trainer = _trainer(folder, callback, limit_train_batches=4, limit_val_batches=2)
    trainer.callbacks.append(Export(["onnx"]))  # type: ignore[attr-defined]
    trainer.fit(BoringModel())


def _resumed_with_another(folder: Path) -> None:
    module = BoringModel()
    callback = QuantizationAwareTraining("ternary", Phase(0.25, 0.5), Phase(0.5, 1.0))
    trainer = _trainer(folder, callback, limit_train_batches=4, limit_val_batches=2)
    trainer.fit(module)
    trainer.save_checkpoint(folder / "ternary.ckpt")
    other = _trainer(folder, QuantizationAwareTraining("int8"), limit_test_batches=1)
    other.test(BoringModel(), ckpt_path=folder / "ternary.ckpt", verbose=False)


_QAT = QuantizationAwareTraining
_WIDTHS = (Affine, LearnedStep, LearnedClip, PowerOfTwo, AdditivePowerOfTwo, Codebook)

# The values that are wrong on purpose carry an ignore: a type checker would refuse them before the error is seen.
CASES: dict[str, Callable[[Path], Any]] = {
    "scheme('w4a9')": lambda _: scheme("w4a9"),
    "QuantizationAwareTraining('int')": lambda _: _QAT("int"),
    "QuantizationAwareTraining(8)": lambda _: _QAT(8),  # type: ignore[arg-type]
    **{
        f"{kind.__name__}({bits!r})": lambda _, kind=kind, bits=bits: kind(bits)  # type: ignore[misc]
        for kind in _WIDTHS
        for bits in (1, 17 if kind is Affine else 9)
    },
    "Exponential(2)": lambda _: Exponential(2),
    "Affine(4.0)": lambda _: Affine(4.0),  # type: ignore[arg-type]
    "Float8('e3m4')": lambda _: Float8("e3m4"),
    "MovingAverage(0)": lambda _: MovingAverage(0),
    "Percentile(99.9)": lambda _: Percentile(99.9),
    "Scheme(weight=8)": lambda _: Scheme(weight=8),  # type: ignore[arg-type]
    "Scheme(weight=Affine(16))": lambda _: Scheme(weight=Affine(16)),
    "Scheme(inputs='int8')": lambda _: Scheme(inputs="int8"),  # type: ignore[arg-type]
    "Scheme(observer=Affine())": lambda _: Scheme(observer=Affine()),  # type: ignore[arg-type]
    "Scheme(weight_granularity='row')": lambda _: Scheme(weight_granularity="row"),  # type: ignore[arg-type]
    "Scheme(weight_granularity=0)": lambda _: Scheme(weight_granularity=0),
    "int8(overrides={'head': 4})": lambda _: int8(overrides={"head": 4}),  # type: ignore[dict-item]
    "int8(overrides={'head': int8(['a'])})": lambda _: int8(overrides={"head": int8(["a"])}),
    "fit: int8(overrides={'haed': w8()})": lambda f: _fit(f, _QAT(int8(overrides={"haed": w8()}))),
    "fit: int8(include=['haed'])": lambda f: _fit(f, _QAT(int8(include=["haed"]))),
    "fit: int8(exclude=['haed'])": lambda f: _fit(f, _QAT(int8(exclude=["haed"]))),
    "learning_rate=0": lambda _: _QAT(learning_rate=0),
    "learning_rate=nan": lambda _: _QAT(learning_rate=float("nan")),
    "freeze=1.5": lambda _: _QAT(freeze=1.5),
    "calibrate=0.7": lambda _: _QAT(calibrate=0.7),  # type: ignore[arg-type]
    "phase=0.75": lambda _: _QAT(phase=0.75),  # type: ignore[arg-type]
    "calibrate=Phase(0.5, 0.9)": lambda _: _QAT(calibrate=Phase(0.5, 0.9)),
    "validate: limit_val_batches=0": lambda f: _validate(f, 0),
    "validate: limit_val_batches=1": lambda f: _validate(f, 1),
    "test: a ternary checkpoint, scheme int8": _resumed_with_another,
    "Export(['tflite'])": lambda _: Export(["tflite"]),
    "check_formats(['coreml'])": lambda _: check_formats(["coreml"]),
    **{
        f"{name} without its packages": lambda _, name=name: _without(name)  # type: ignore[misc]
        for name, kind in FORMATS.items()
        if kind.packages
    },
    "convert: not quantized": lambda _: convert(nn.Linear(2, 2)),
    "convert: activations='int4'": lambda _: convert(_quantized(int8()), "int4"),  # type: ignore[arg-type]
    "convert: log4()": lambda _: convert(_quantized(log4())),
    "convert: inputs=Float8()": lambda _: convert(_quantized(Scheme(inputs=Float8()))),
    "litert: weight_granularity=4": lambda _: FORMATS["litert"].check(_quantized(Scheme(weight_granularity=4))),
    "export: a way that depends on the data": lambda f: FORMATS["torch"].export(
        _Branch().eval(), Inputs((torch.randn(2, 3),), {}), f / "model.pt2"
    ),
    **{
        f"fit: Export([{name!r}]) of linalg.svdvals": lambda f, name=name: _exported(f, name)  # type: ignore[misc]
        for name in ("onnx", "openvino", "executorch", "litert")
        if not FORMATS[name].missing
    },
    "fit: log4 and Export(['onnx'])": _logarithmic,
    "QuantizationAwareTraining(phase=None)": lambda _: _QAT(phase=None),
    "QuantizationAwareTraining(equalize=True)": lambda _: _QAT(equalize=True),
    "QuantizationAwareTraining(correct_bias=True)": lambda _: _QAT(correct_bias=True),
    "PostTrainingQuantization(8)": lambda _: PostTrainingQuantization(8),  # type: ignore[arg-type]
    "fit: equalize=True": lambda f: _fit(f, PostTrainingQuantization(equalize=True)),
    "fit: correct_bias=True": lambda f: _fit(f, PostTrainingQuantization(correct_bias=True)),
    "Scheme(observer=MinMax)": lambda _: Scheme(observer=MinMax),  # type: ignore[arg-type]
}


def message(given: str) -> Exception | None:
    """What the package raises for one of the inputs; None if it takes it."""
    names = ("lightning.pytorch", "lightning.fabric", "torch.export")
    before = {name: logging.getLogger(name).level for name in names}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            CASES[given](Path(folder))
        except Exception as error:
            return error
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
    return None


def run() -> dict[str, Any]:
    """How many arguments and situations are refused as they should be, and each that is not."""
    rows = []
    faults = []
    for call, cases in groupby(wrong_arguments.CASES, key=lambda case: case.call):
        errors = [(case, wrong_arguments.refused(case.call, {case.parameter: case.value})) for case in cases]
        lacking = [(case, error, wrong_arguments.fault(case, error)) for case, error in errors]
        faults += [f"{case}: {lack}: {error}" for case, error, lack in lacking if lack]
        kinds = Counter(type(error).__name__ for _, error in errors)
        said = ", ".join(f"{kind} {num}" for kind, num in kinds.items())
        rows.append(
            {"input": f"{call.__name__}(...)", "inputs": len(errors), "error": said, "message": str(errors[0][1])}
        )
    for given in CASES:
        error = message(given)
        # What a converter says in its own words is a message, too.
        if error is None or len(str(error).split()) < _FEWEST_WORDS:
            faults.append(f"{given}: {error}")
        first = str(error).strip().splitlines()[0]
        rows.append({"input": given, "inputs": 1, "error": type(error).__name__, "message": first})
    for text in faults:
        print(text)
    headline = {"inputs": len(wrong_arguments.CASES) + len(CASES), "not refused as they should be": len(faults)}
    return {"headline": headline, "rows": rows, "failed": len(faults)}
