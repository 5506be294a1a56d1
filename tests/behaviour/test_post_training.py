"""Post-training quantization: by ``trainer.validate`` alone, and at the end of ``fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress
from lightning_compress.callbacks import Export, PostTrainingQuantization, QuantizationAwareTraining
from lightning_compress.phase import Phase
from lightning_compress.quantization import MSE, Affine, Observer, Percentile, Scheme, int8
from lightning_compress.quantization.model import quantization_of, quantize_layers
from lightning_compress.quantization.placement import find_placement
from lightning_compress.watch import Watch

from ..harness import (
    SaveAfter,
    SeedEachBatch,
    assert_agrees,
    assert_equal_outputs,
    callback_of,
    differences,
    make_module,
    make_trainer,
    outputs,
)
from ..zoo import BATCHES, MODULES

SCHEMES = {
    "int8": int8(),
    "percentile": Scheme(observer=Percentile(0.99)),
    "mse": Scheme(Affine(4, symmetric=True), Affine(4), MSE(), exclude=[]),
}


def make(folder: Path, scheme: Scheme | str = "int8", **options: Any) -> pl.Trainer:
    return make_trainer(folder, callbacks=[PostTrainingQuantization(scheme)], **options)


def validate(trainer: pl.Trainer, module: pl.LightningModule, **options: Any) -> dict[str, float]:
    return trainer.validate(module, verbose=False, **options)[0]


def by_hand(module: pl.LightningModule, scheme: Scheme, num_batches: int = BATCHES) -> pl.LightningModule:
    """The same with the engine alone: the first batch is watched, the others are observed."""
    module.eval()
    found = quantize_layers(module, scheme)
    batches = [x for x, _ in zip(module.val_dataloader(), range(num_batches), strict=False)]
    with torch.no_grad():
        with Watch(module) as watch:
            module(batches[0][0])
        names = {layer.module_name for layer in found.layers}
        found.place(module, find_placement(watch.trace, module, names))
        found.observe(True)
        for batch in batches[1:]:
            module(batch[0])
        found.observe(False)
    found.enable(True)
    return module


@pytest.mark.parametrize("name", ["mlp", "conv+bn+residual", "attention", "lstm", "tied", "reused"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_validation_calibrates_as_the_engine_does_by_hand(scheme: str, name: str, tmp_path: Path) -> None:
    """The first call gives the float model's metrics; from then on they are those of the quantized model."""
    module, trainer = make_module(name), make(tmp_path, SCHEMES[scheme])
    plain = validate(make_trainer(tmp_path, callbacks=[]), make_module(name))
    first, second, third = (validate(trainer, module) for _ in range(3))
    assert first == pytest.approx(plain, abs=1e-6)  # attention has a fused kernel where no module is hooked
    assert second == third != first
    reference = by_hand(make_module(name), SCHEMES[scheme])
    assert_equal_outputs(module, reference)
    assert not differences(quantization_of(module).state_dict(), quantization_of(reference).state_dict())
    assert validate(make_trainer(tmp_path, callbacks=[]), reference) == second


@pytest.mark.parametrize("name", list(MODULES), ids=lambda name: f"ptq-{name}")
def test_validate_alone(name: str, tmp_path: Path) -> None:
    """What validation calibrated is saved and loaded; no weight moves."""
    module, trainer = make_module(name), make(tmp_path)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    validate(trainer, module)
    assert quantization_of(module).enabled
    if before:  # foreign builds a part in configure_model
        assert not differences(before, {key: module.state_dict()[key] for key in before})
    trainer.save_checkpoint(tmp_path / "ptq.ckpt")
    assert_equal_outputs(lightning_compress.load_from_checkpoint(MODULES[name], tmp_path / "ptq.ckpt"), module)
    fresh = make_module(name)
    again = make(tmp_path)
    assert validate(again, fresh, ckpt_path=tmp_path / "ptq.ckpt") == validate(trainer, module)
    assert_equal_outputs(fresh, module)
    assert not differences(quantization_of(fresh).state_dict(), quantization_of(module).state_dict())


def test_a_second_validation_leaves_the_ranges(tmp_path: Path) -> None:
    module, trainer = make_module("mlp"), make(tmp_path)
    validate(trainer, module)
    state = quantization_of(module).state_dict()
    louder = TensorDataset(100 * module.tensors()[0], module.tensors()[1])
    trainer.validate(module, DataLoader(louder, 2), verbose=False)
    assert not differences(state, quantization_of(module).state_dict())


def test_validation_within_fit_calibrates_nothing(tmp_path: Path) -> None:
    """In a fit the training data calibrate, in the phase that says so."""
    seen: list[bool] = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(quantization_of(pl_module).placement is not None)

    quantize = PostTrainingQuantization("int8", Phase(0.5, 0.75))
    module = make_module("mlp")
    make_trainer(tmp_path, callbacks=[Watch(), quantize]).fit(module)
    assert seen == [False, False, False, False, True, True, True]  # the sanity check, then 6 epochs
    assert quantization_of(module).enabled


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("observer", [Percentile(), None])
def test_calibrating_on_no_batches_is_refused(limit: int, observer: Observer | None, tmp_path: Path) -> None:
    scheme = int8() if observer is None else Scheme(observer=observer)
    module = make_module("mlp")
    with pytest.raises(ValueError, match=r"calibrated on no batches.*Validate on two batches at least"):
        make(tmp_path, scheme, limit_val_batches=limit).validate(module, verbose=False)
    assert quantization_of(module) is None or not quantization_of(module).enabled
    validate(make(tmp_path, scheme, limit_val_batches=2), module)
    assert quantization_of(module).enabled


def test_a_quantized_model_may_be_validated_on_no_batches(tmp_path: Path) -> None:
    module, trainer = make_module("mlp"), make(tmp_path)
    validate(trainer, module)
    trainer.save_checkpoint(tmp_path / "ptq.ckpt")
    make(tmp_path, limit_val_batches=0).validate(module, verbose=False)
    make(tmp_path, limit_val_batches=0).validate(make_module("mlp"), ckpt_path=tmp_path / "ptq.ckpt", verbose=False)
    make_trainer(tmp_path, callbacks=[QuantizationAwareTraining()], limit_val_batches=0).validate(make_module("mlp"))


def test_a_run_that_stops_before_it_calibrates_says_so(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    callbacks = [PostTrainingQuantization("int8", Phase(0.5, 1.0)), Stop()]
    module = make_module("mlp")
    with pytest.warns(UserWarning, match=r"target not reached: asked bits 8, reached 32, because trainer.should_stop"):
        make_trainer(tmp_path, callbacks=callbacks).fit(module)
    assert not quantization_of(module).enabled


def test_fit_quantizes_at_its_end_before_the_export(tmp_path: Path) -> None:
    """The last training step and the last validation are those of the float model; the file is the quantized one."""
    enabled: dict[str, bool] = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            enabled["last batch"] = quantization_of(pl_module).enabled

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            enabled["last validation"] = quantization_of(pl_module).enabled

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            enabled["end"] = quantization_of(pl_module).enabled

    export = Export(["onnx"])
    callbacks = [export, Watch(), PostTrainingQuantization("int8", Phase(0.8, 1.0))]
    module, trainer = make_module("mlp"), make_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(module)
    assert enabled == {"last batch": False, "last validation": False, "end": True}
    assert not export.failures
    assert export.artifacts[0].integers == "uint8"
    assert_agrees(export.artifacts[0])
    plain = make_module("mlp")
    make_trainer(tmp_path, callbacks=[]).fit(plain)
    torch.manual_seed(0)
    assert differences(outputs(module), outputs(plain))


def test_what_calibrated_is_the_training_data(tmp_path: Path) -> None:
    """Ranges are those of the batches of the calibration, with the weights of then."""
    folder = tmp_path
    quantize = PostTrainingQuantization(Scheme(observer=Percentile(1.0)), Phase(0.5, 0.75))
    module = make_module("reused")
    make_trainer(folder, callbacks=[quantize, SaveAfter(folder, (12, 18))]).fit(module)
    saved = torch.load(folder / "18.ckpt", weights_only=True)["callbacks"]["PostTrainingQuantization"]
    assert not differences(saved["quantization"]["ranges"], quantization_of(module).state_dict()["ranges"])
    x = module.tensors()[0]
    state = saved["quantization"]["ranges"]["first:input"]
    assert state[:2].tolist() == [float(x.min()), float(x.max())]
    assert int(state[2:].sum()) == 5 * x.numel()  # six batches, the first of them only watched


def test_a_callback_without_training_learns_nothing(tmp_path: Path) -> None:
    module = make_module("mlp")
    trainer = make_trainer(tmp_path, callbacks=[PostTrainingQuantization("ternary", Phase(0.5, 0.75))])
    trainer.fit(module)
    assert not quantization_of(module).learned()
    assert "optimizer" not in callback_of(trainer, PostTrainingQuantization).state_dict()


OPTIONS = {"equalize": True, "correct_bias": True}


def with_options(folder: Path, scheme: Scheme | str = "int8", **options: Any) -> pl.Trainer:
    return make_trainer(folder, callbacks=[PostTrainingQuantization(scheme, **OPTIONS)], **options)


@pytest.mark.parametrize("name", list(MODULES), ids=lambda name: f"ptq-options-{name}")
def test_equalized_and_corrected(name: str, tmp_path: Path) -> None:
    """The weights that changed are saved and loaded, and a later validation leaves them alone."""
    plain = validate(make_trainer(tmp_path, callbacks=[]), make_module(name))
    module, trainer = make_module(name), with_options(tmp_path)
    assert validate(trainer, module) == pytest.approx(plain, rel=1e-4, abs=1e-5)  # of the float model still
    assert not any(hook for m in module.modules() for hook in m._forward_hooks.values() if "_see" in str(hook))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    second = validate(trainer, module)
    assert not differences(before, module.state_dict())
    trainer.save_checkpoint(tmp_path / "ptq.ckpt")
    assert_equal_outputs(lightning_compress.load_from_checkpoint(MODULES[name], tmp_path / "ptq.ckpt"), module)
    fresh = make_module(name)
    assert validate(with_options(tmp_path), fresh, ckpt_path=tmp_path / "ptq.ckpt") == second
    assert_equal_outputs(fresh, module)


@pytest.mark.parametrize("option", list(OPTIONS))
def test_options_that_change_weights_are_for_validation_alone(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"\.{option}=True: .*use PostTrainingQuantization\(scheme\)"):
        QuantizationAwareTraining(**{option: True})
    quantize: Any = PostTrainingQuantization(**{option: True})
    module = make_module("mlp")
    with pytest.raises(ValueError, match=rf"{option}=True with trainer.fit.*then validate with it"):
        make_trainer(tmp_path, callbacks=[quantize]).fit(module)
    assert quantization_of(module) is None


def test_correcting_on_the_watched_batch_alone_is_refused(tmp_path: Path) -> None:
    module = make_module("mlp")
    with pytest.raises(ValueError, match="calibrated on no batches"):
        with_options(tmp_path, "w8", limit_val_batches=1).validate(module, verbose=False)
    validate(with_options(tmp_path, "w8", limit_val_batches=2), module)
    assert quantization_of(module).enabled


def test_an_error_while_calibrating_leaves_no_hook(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if args[2] == 1:
                raise RuntimeError("stop")

    module = make_module("conv+bn+residual")
    callbacks = [Fail(), PostTrainingQuantization("int8", **OPTIONS)]
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(tmp_path, callbacks=callbacks).validate(module, verbose=False)
    assert not any("_see" in str(hook) for m in module.modules() for hook in m._forward_hooks.values())


def renamed(path: Path, old: str, new: str) -> Path:
    """A checkpoint in which another callback wrote the state."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"][new] = checkpoint["callbacks"].pop(old)
    torch.save(checkpoint, path.with_name("renamed.ckpt"))
    return path.with_name("renamed.ckpt")


def test_a_checkpoint_of_the_callback_that_did_both_loads_and_resumes(tmp_path: Path) -> None:
    """Before there were two callbacks, QuantizationAwareTraining(phase=None) wrote the same under its own name."""

    def callbacks() -> list[pl.Callback]:
        return [SeedEachBatch(), PostTrainingQuantization(Scheme(observer=Percentile(0.99)), Phase(0.5, 0.75))]

    module, again = make_module("mlp"), make_module("mlp")
    trainer = make_trainer(tmp_path, callbacks=[*callbacks(), SaveAfter(tmp_path, (15,))])
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    old = "QuantizationAwareTraining"
    path = renamed(tmp_path / "15.ckpt", "PostTrainingQuantization", old)
    make_trainer(tmp_path, callbacks=callbacks()).fit(again, ckpt_path=path, weights_only=True)
    assert not differences(quantization_of(again).state_dict(), quantization_of(module).state_dict())
    assert_equal_outputs(again, module)

    path = renamed(tmp_path / "end.ckpt", "PostTrainingQuantization", old)
    assert_equal_outputs(lightning_compress.load_from_checkpoint(MODULES["mlp"], path), module)
    looked = make_module("mlp")
    validate(make_trainer(tmp_path, callbacks=callbacks()), looked, ckpt_path=path)
    assert_equal_outputs(looked, module)


def test_each_of_the_two_callbacks_reads_what_the_other_wrote(tmp_path: Path) -> None:
    module, looked = make_module("mlp"), make_module("mlp")
    trainer = make(tmp_path)
    validate(trainer, module)
    trainer.save_checkpoint(tmp_path / "ptq.ckpt")
    validate(make_trainer(tmp_path, callbacks=[QuantizationAwareTraining()]), looked, ckpt_path=tmp_path / "ptq.ckpt")
    assert_equal_outputs(looked, module)


def test_bits_that_were_lowered_are_read_by_the_scheme_of_that_many(tmp_path: Path) -> None:
    """A checkpoint whose bits a guard has lowered: refused by the scheme it was trained with, taken by the lower."""
    module = make_module("mlp")
    trained = QuantizationAwareTraining("int8", calibrate=Phase(0.0, 0.2), phase=Phase(0.2, 1.0))
    trained.lower(4)
    trainer = make_trainer(tmp_path, callbacks=[trained])
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "lowered.ckpt")
    with pytest.raises(ValueError, match="scheme"):
        validate(
            make_trainer(tmp_path, callbacks=[PostTrainingQuantization("int8")]),
            make_module("mlp"),
            ckpt_path=tmp_path / "lowered.ckpt",
        )
    looked = make_module("mlp")
    of_four = PostTrainingQuantization(trained.scheme)
    validate(make_trainer(tmp_path, callbacks=[of_four]), looked, ckpt_path=tmp_path / "lowered.ckpt")
    assert_equal_outputs(looked, module)
