"""Every mistake is refused before the first training step: what was given, what is accepted, how to fix it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch.utils.data import DataLoader, IterableDataset

import lightning_compress
from experiments.bench import errors
from lightning_compress.callbacks import (
    AccuracyGuard,
    ChannelPruning,
    CompressionReport,
    Export,
    FineTuning,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.layers import Layer
from lightning_compress.phase import Phase
from lightning_compress.pruning import BatchNormScale, Linear, Rounds, Taylor, Wanda
from lightning_compress.quantization import Affine, Scheme

from ..harness import make_module, make_trainer
from ..zoo import MLP, ConvResidual


class NoTraining(pl.Callback):
    """Fails the test if training starts."""

    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("training has started")


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield tuple(t[0] for t in MLP().tensors())


def fit(folder: Path, *callbacks: pl.Callback, module: pl.LightningModule | None = None, **options: Any) -> None:
    make_trainer(folder, callbacks=[*callbacks, NoTraining()], **options).fit(module or make_module("mlp"))


def endless(folder: Path) -> None:
    trainer = make_trainer(folder, callbacks=[GradualPruning(), NoTraining()], max_epochs=-1)
    trainer.fit(make_module("mlp"), DataLoader(Endless(), 8))


def without_validation(folder: Path) -> None:
    module = make_module("mlp")
    module.val_dataloader = None
    fit(folder, AccuracyGuard(), module=module)


def nan_weights(folder: Path) -> None:
    module = make_module("mlp")
    module.net[0].weight.data[0, :3] = torch.nan
    fit(folder, GradualPruning(), module=module)


def other_structure(folder: Path) -> None:
    trainer = make_trainer(folder, callbacks=[GradualPruning()], max_epochs=1)
    trainer.fit(make_module("mlp"))
    trainer.save_checkpoint(folder / "mlp.ckpt")
    make_trainer(folder, callbacks=[GradualPruning(), NoTraining()]).fit(ConvResidual(), ckpt_path=folder / "mlp.ckpt")


def strategy(kind: type[Strategy], callback: pl.Callback | None = None) -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    with patch.object(pl.Trainer, "strategy", kind()):
        (callback or GradualPruning()).setup(trainer, make_module("mlp"), "fit")


def missing_extra(folder: Path) -> None:
    with patch("lightning_compress.deploy.formats.find_spec", lambda name: None):
        fit(folder, Export(["onnx"]))


Case = tuple[Callable[[Path], Any], type[Exception], str]
CASES: dict[str, Case] = {
    "sparsity=90": (lambda _: GradualPruning(90), ValueError, "sparsity=90: accepted is a share in 0..1"),
    "sparsity=True": (lambda _: GradualPruning(True), ValueError, "sparsity=True: accepted is a share"),
    "Linear(1.5)": (lambda _: Linear(1.5), ValueError, "Linear.final=1.5: accepted is a share in 0..1"),
    "scope='all'": (lambda _: GradualPruning(scope="all"), ValueError, "scope='all': accepted are 'global'"),
    "every=0": (lambda _: GradualPruning(every=0), ValueError, "every=0: accepted is a whole number"),
    "criterion='l1'": (lambda _: GradualPruning(criterion="l1"), TypeError, "criterion='l1': accepted is a Criterion"),
    "freeze=0": (lambda _: QuantizationAwareTraining(freeze=0), ValueError, "freeze=0: accepted is a share"),
    "bits=17": (lambda _: Affine(17), ValueError, "bits=17: accepted is a whole number in 2..16"),
    "weight=8": (lambda _: Scheme(weight=8), TypeError, "Scheme.weight=8: accepted is a Quantizer"),
    "learning_rate='slow'": (lambda _: FineTuning(learning_rate="slow"), ValueError, "accepted is 'rewind'"),
    "freeze matches nothing": (lambda f: fit(f, FineTuning(freeze=["x.*"])), ValueError, "freeze='x.*' matches no"),
    "Phase(0.6, 0.2)": (lambda _: Phase(0.6, 0.2), ValueError, "accepted is 0 <= begin <= end"),
    "Phase(0, 20)": (lambda _: Phase(0, 20), ValueError, "fractions of the run lie in 0..1"),
    "phases overlap": (
        lambda f: fit(f, GradualPruning(phase=Phase(0, 0.8)), QuantizationAwareTraining()),
        ValueError,
        "overlap. Phases follow each other",
    ),
    "calibrate after phase": (
        lambda _: QuantizationAwareTraining(calibrate=Phase(0.5, 0.9)),
        ValueError,
        "Let calibrate end where phase begins",
    ),
    "phase longer than the run": (
        lambda f: fit(f, GradualPruning(phase=Phase(2, 90, "epoch"))),
        ValueError,
        "the run has 6 epochs. Train longer or end the phase earlier",
    ),
    "run without an end": (lambda f: endless(f), ValueError, "the run has no known end"),
    "include matches nothing": (
        lambda f: fit(f, GradualPruning(include=["encoder.*"])),
        ValueError,
        "include='encoder.*' matches no layer. The layers are: net.0",
    ),
    "exclude matches nothing": (
        lambda f: fit(f, QuantizationAwareTraining(lightning_compress.int8(exclude=["haed"]))),
        ValueError,
        "exclude='haed' matches no layer",
    ),
    "strategy=FSDPStrategy": (
        lambda _: strategy(FSDPStrategy),
        ValueError,
        r"strategy=FSDPStrategy: .* Train with Trainer\(strategy='ddp'\)",
    ),
    **{
        f"strategy=ModelParallelStrategy, {kind.__name__}": (
            lambda _, kind=kind: strategy(ModelParallelStrategy, kind()),
            ValueError,
            f"strategy=ModelParallelStrategy: {kind.__name__} does not know .* Accepted are single-device and DDP",
        )
        for kind in (
            ChannelPruning,
            CompressionReport,
            Export,
            KnowledgeDistillation,
            LayerPruning,
            PostTrainingQuantization,
            QuantizationAwareTraining,
        )
    },
    **{
        f"strategy=ModelParallelStrategy, {criterion}": (
            lambda _, criterion=criterion: strategy(ModelParallelStrategy, GradualPruning(0.5, criterion)),
            ValueError,
            rf"criterion={type(criterion).__name__}\(\) with strategy=ModelParallelStrategy: .* Accepted are",
        )
        for criterion in (Wanda(), Taylor(), BatchNormScale())
    },
    "strategy=ModelParallelStrategy, rewind": (
        lambda _: strategy(ModelParallelStrategy, GradualPruning(Rounds(0.9), rewind=0.1)),
        ValueError,
        "GradualPruning.rewind=0.1 with strategy=ModelParallelStrategy: .* Accepted is None",
    ),
    "unknown format": (lambda _: Export(["tflite9"]), ValueError, "formats='tflite9': accepted are 'onnx'"),
    "missing extra": (missing_extra, ModuleNotFoundError, r"pip install 'lightning-compress\[onnx\]'"),
    "no validation data": (
        without_validation,
        ValueError,
        r"judges by validation data, but there is no val_dataloader\. Give one: trainer\.fit",
    ),
    "NaN weights": (nan_weights, ValueError, "net.0 has 3 weights that are NaN or infinite"),
    "checkpoint of another model": (other_structure, ValueError, "The checkpoint is of another structure"),
    "no such checkpoint": (
        lambda f: lightning_compress.load_from_checkpoint(MLP, f / "no.ckpt"),
        FileNotFoundError,
        "there is no such checkpoint",
    ),
}


@pytest.mark.parametrize("given", list(CASES))
def test_refused_before_training(given: str, tmp_path: Path) -> None:
    call, kind, message = CASES[given]
    with pytest.raises(kind, match=message) as caught:
        call(tmp_path)
    assert len(str(caught.value).split()) >= 8, "an error says what is accepted and how to fix it"


WORDS = "accepted are int8, w8, w8a16, int4, w4a8, w2a8, ternary, binary, log4, exp4, apot4, codebook, fp8, w4_groups, "
WORDS += "w4a8_groups, lsq"
LAYER = r"matches no layer. The layers are: layer\. Give a name"
NO_BATCHES = "calibrated on no batches, so that no range is known"
SIMULATED = "has no form in integer kernels at .*simulated only: .*bytes are those of save_packed. For export take"
# of every input of `python -m experiments.bench errors`, which prints the table
SAID: dict[str, tuple[type[Exception], str]] = {
    "scheme('w4a9')": (ValueError, rf"scheme='w4a9': {WORDS}\. Did you mean 'w4a8'"),
    "QuantizationAwareTraining('int')": (ValueError, rf"scheme='int': {WORDS}\. Did you mean 'int8'"),
    "QuantizationAwareTraining(8)": (TypeError, r"scheme=8: accepted is a Scheme, for instance int8\(\)"),
    **{
        f"{kind}({bits})": (
            ValueError,
            rf"{kind}\.bits={bits}: accepted is a whole number in 2\.\.{most}, for instance {kind}",
        )
        for kind, most in {
            "Affine": 16,
            **dict.fromkeys(("LearnedStep", "LearnedClip", "PowerOfTwo", "AdditivePowerOfTwo", "Codebook"), 8),
        }.items()
        for bits in (1, most + 1)
    },
    "Exponential(2)": (ValueError, r"Exponential\.bits=2: accepted is a whole number in 3\.\.8"),
    "Affine(4.0)": (ValueError, r"Affine\.bits=4\.0: accepted is a whole number in .* Give 4\."),
    "Float8('e3m4')": (ValueError, r"Float8\.format='e3m4': accepted are 'e4m3' and 'e5m2'"),
    "MovingAverage(0)": (ValueError, r"MovingAverage\.rate=0: accepted is a share above 0 and up to 1"),
    "Percentile(99.9)": (ValueError, r"Percentile\.share=99\.9: accepted is a share above 0 and up to 1"),
    "Scheme(weight=8)": (TypeError, r"Scheme\.weight=8: accepted is a Quantizer"),
    "Scheme(weight=Affine(16))": (ValueError, r"Scheme\.weight=Affine\(bits=16.*at most 8 bits, since weights are"),
    "Scheme(inputs='int8')": (TypeError, r"Scheme\.inputs='int8': accepted is a Quantizer or None, for"),
    "Scheme(observer=Affine())": (TypeError, r"Scheme\.observer=Affine\(.*accepted is an Observer"),
    "Scheme(observer=MinMax)": (TypeError, r"Scheme\.observer=<class .*accepted is an Observer"),
    "Scheme(weight_granularity='row')": (
        ValueError,
        "weight_granularity='row': accepted is 'channel' or 'tensor', or",
    ),
    "Scheme(weight_granularity=0)": (ValueError, "weight_granularity=0: accepted is 'channel' or 'tensor', or"),
    "int8(overrides={'head': 4})": (TypeError, r"overrides\['head'\]=4: accepted is a Scheme"),
    "int8(overrides={'head': int8(['a'])})": (ValueError, r"overrides\['head'\] has an include, .*of its own"),
    "fit: int8(overrides={'haed': w8()})": (ValueError, rf"overrides='haed' {LAYER}"),
    "fit: int8(include=['haed'])": (ValueError, rf"include='haed' {LAYER}"),
    "fit: int8(exclude=['haed'])": (ValueError, rf"exclude='haed' {LAYER}"),
    "learning_rate=0": (ValueError, "learning_rate=0: accepted is a number above 0"),
    "learning_rate=nan": (ValueError, "learning_rate=nan: accepted is a number above 0"),
    "freeze=1.5": (ValueError, "freeze=1.5: accepted is a share of the phase, above 0 and up to 1"),
    "calibrate=0.7": (TypeError, "calibrate=0.7: accepted is a Phase"),
    "phase=0.75": (TypeError, "phase=0.75: accepted is a Phase"),
    "calibrate=Phase(0.5, 0.9)": (ValueError, "phases overlap. Let calibrate end where phase begins"),
    "validate: limit_val_batches=0": (ValueError, rf"{NO_BATCHES}\. Validate on two batches at least"),
    "validate: limit_val_batches=1": (ValueError, rf"{NO_BATCHES}\. Validate on two batches at least"),
    "test: a ternary checkpoint, scheme int8": (
        ValueError,
        "quantized by another scheme: weight is .*LearnedStep.* there and .*Affine.* here. Give the scheme",
    ),
    "Export(['tflite'])": (ValueError, "formats='tflite': accepted are 'onnx', .* and 'tflm'"),
    "check_formats(['coreml'])": (ValueError, "formats='coreml': accepted are 'onnx', .* and 'tflm'"),
    **{
        f"{name} without its packages": (
            ModuleNotFoundError,
            rf"'{name}' needs .*not installed. Run: pip install 'lightning-compress\[{name}\]'",
        )
        for name in ("onnx", "openvino", "executorch", "litert", "tflm")
    },
    **{
        f"fit: Export([{name!r}]) of linalg.svdvals": (
            ValueError,
            rf"Export\.formats='{name}' cannot take _Strange: \w+: .*Change that part .* leave '{name}' out",
        )
        for name in ("onnx", "openvino", "executorch", "litert")
        if not FORMATS[name].missing
    },
    "fit: log4 and Export(['onnx'])": (
        ValueError,
        rf"Export\.formats='onnx' cannot take BoringModel: .*PowerOfTwo.* {SIMULATED} equal steps: weight=Affine",
    ),
    **{
        f"QuantizationAwareTraining({given})": (
            ValueError,
            rf"QuantizationAwareTraining\.{given}: .*accepted are a phase.* use PostTrainingQuantization\(scheme\)",
        )
        for given in ("phase=None", "equalize=True", "correct_bias=True")
    },
    "PostTrainingQuantization(8)": (
        TypeError,
        r"PostTrainingQuantization\.scheme=8: accepted is a Scheme, for instance",
    ),
    **{
        f"fit: {name}=True": (ValueError, rf"\.{name}=True with trainer\.fit: .*Fit without this callback")
        for name in ("equalize", "correct_bias")
    },
    "convert: not quantized": (ValueError, "The model is not quantized: .*Train through its phase, or"),
    "convert: activations='int4'": (ValueError, "activations='int4': accepted are 'uint8' and 'int8'"),
    "convert: log4()": (ValueError, rf"Scheme\.weight=PowerOfTwo.* {SIMULATED} equal steps: weight=Affine"),
    "convert: inputs=Float8()": (ValueError, rf"Scheme\.inputs=Float8.* {SIMULATED} equal steps: inputs=Affine"),
    "litert: weight_granularity=4": (ValueError, "accepted (is|are) 'channel' or 'tensor'"),
    "export: a way that depends on the data": (Exception, "data-dependent expression"),
}


def test_every_input_of_the_table_has_a_message() -> None:
    assert errors.CASES.keys() == SAID.keys()


@pytest.mark.parametrize("given", list(SAID))
def test_what_quantization_and_export_say(given: str) -> None:
    error = errors.message(given)
    kind, said = SAID[given]
    assert isinstance(error, kind)
    assert re.search(said, str(error)), str(error)
    assert len(str(error).split()) >= 8, "an error says what is accepted and how to fix it"


def test_a_failing_export_costs_no_checkpoint(tmp_path: Path) -> None:
    """A disk that refuses, a model that cannot be captured: training has ended well, its checkpoint loads."""
    module, trainer = make_module("branch"), make_trainer(tmp_path, [export := Export()], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="The trained model and its checkpoints are safe"):
        trainer.fit(module)
    assert export.failures
    loaded = lightning_compress.load_from_checkpoint(type(module), trainer.checkpoint_callback.best_model_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
    assert "Export to onnx failed" in (tmp_path / "report.json").read_text()


def test_a_gradient_clip_counts_only_kept_weights(tmp_path: Path) -> None:
    """The clipped norm is that of the weights that are still there."""
    seen = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            layer = Layer("net.3", pl_module.net[3])
            if layer.weight.grad is not None:
                seen.append(float(layer.weight.grad[layer.weight == 0].abs().sum()))

    pruning = GradualPruning(0.5, phase=Phase(0.0, 0.1), every=1)
    make_trainer(tmp_path, callbacks=[pruning, Watch()], gradient_clip_val=0.1).fit(make_module("mlp"))
    assert len(seen) > 10
    assert not any(seen[4:])
