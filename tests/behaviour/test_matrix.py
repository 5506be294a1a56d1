"""Every LightningModule of the zoo against every property that training must keep; conftest prints the table."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning_compress.callbacks import Export, GradualPruning

import lightning_compress
from lightning_compress.analysis.inspect import sparsity
from lightning_compress.quantization.prepare import prepared

from ..harness import (
    NOT_CAPTURED,
    NUM_BATCHES,
    SAVED,
    SPARSITY,
    SaveAfter,
    SeedEachBatch,
    accumulate_by_hand,
    assert_compiled_as_eager,
    assert_equal_outputs,
    callback_of,
    compile_inner,
    differences,
    in_two_processes,
    make_module,
    make_trainer,
    outputs,
    snapshot,
    where_plain_can,
)
from ..zoo import MODULES

# one process a module, where tests run in several
each_module = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MODULES]
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole run a module, with its checkpoints, trained once and only read."""
    made: dict[str, tuple[pl.Trainer, pl.LightningModule, Path]] = {}

    def run(name: str) -> tuple[pl.Trainer, pl.LightningModule, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace("+", "-"))
            module, trainer = make_module(name), make_trainer(folder, [SaveAfter(folder, (*SAVED, NUM_BATCHES))])
            trainer.fit(module)
            made[name] = trainer, module, folder
        return made[name]

    return run


def assert_compressed(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    pruning = callback_of(trainer, GradualPruning)
    assert pruning.masks.layers
    assert sparsity(pruning.masks.layers) >= SPARSITY
    quantization = prepared(module)
    assert quantization is not None
    assert quantization.enabled
    assert quantization.activations
    assert all(a.enabled for a in quantization.activations.values())
    for layer in pruning.masks.layers:  # zeros stay zero when quantized
        shown = getattr(layer.module, layer.parameter)
        assert not shown[layer.weight == 0].any()


@each_module
def test_inert(name: str, tmp_path: Path) -> None:
    """Until the first phase begins, the run is bit for bit the one without callbacks."""
    plain, callbacks = make_module(name), [SeedEachBatch()]
    make_trainer(tmp_path, callbacks=callbacks, limit_train_batches=1, max_steps=1 + hasattr(plain, "generator")).fit(
        plain
    )
    module = make_module(name)
    trainer = make_trainer(tmp_path, [SaveAfter(tmp_path, (1,))])
    trainer.fit(module)
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    assert not differences(saved["state_dict"], plain.state_dict())


@each_module
def test_target(name: str, runs: Any) -> None:
    """The sparsity and the quantization that were asked for are reached; what was left alone is named."""
    trainer, module, _ = runs(name)
    assert_compressed(trainer, module)
    named = {*callback_of(trainer, GradualPruning).skipped, *prepared(module).skipped}
    expected = {"foreign": {"raw", "normed"}, "frozen": {"backbone.0"}, "tied": {"embed"}, "attention": {"embed"}}
    assert expected.get(name, set()) <= named


@each_module
def test_resume(name: str, runs: Any, tmp_path: Path) -> None:
    """Resumed before, inside and after each phase, a run ends bit-identically: weights, optimizers, callbacks."""
    expected = snapshot(*runs(name)[:2])
    for batches in SAVED:
        module, trainer = make_module(name), make_trainer(tmp_path)
        trainer.fit(module, ckpt_path=runs(name)[2] / f"{batches}.ckpt", weights_only=True)
        assert not differences(expected, snapshot(trainer, module)), f"resumed after {batches} batches"


@each_module
def test_test(name: str, runs: Any, tmp_path: Path) -> None:
    """trainer.test(ckpt_path=...) into a fresh module gives the trained model's metrics."""
    _, trained, folder = runs(name)
    fresh = make_module(name)
    found = make_trainer(tmp_path).test(fresh, ckpt_path=folder / f"{NUM_BATCHES}.ckpt", verbose=False)
    assert found == make_trainer(tmp_path).test(copy.deepcopy(trained), verbose=False)
    assert prepared(fresh).enabled
    half = make_trainer(tmp_path).test(make_module(name), ckpt_path=folder / "7.ckpt", verbose=False)
    assert half != found


@each_module
def test_load(name: str, runs: Any) -> None:
    """load_from_checkpoint needs no Trainer, and plain Lightning loads the same file."""
    _, trained, folder = runs(name)
    path = folder / f"{NUM_BATCHES}.ckpt"
    loaded = lightning_compress.load_from_checkpoint(MODULES[name], path)
    assert_equal_outputs(loaded, trained)
    plain = MODULES[name].load_from_checkpoint(path).state_dict()
    assert plain.keys() == trained.state_dict().keys()
    assert all(torch.equal(plain[key], value) for key, value in trained.state_dict().items())


@each_module
def test_copy(name: str, runs: Any) -> None:
    """A deepcopy and a pickled module compute the same and share nothing."""
    _, trained, _ = runs(name)
    copied = copy.deepcopy(trained)
    assert_equal_outputs(copied, trained)
    if name == "foreign":  # torch itself pickles no parametrized module
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
            pickle.dumps(make_module(name))
    else:
        assert_equal_outputs(pickle.loads(pickle.dumps(trained)), trained)
    prepared(copied).enable(False)
    assert prepared(trained).enabled
    assert differences(outputs(copied), outputs(trained))


@each_module
def test_accumulate(name: str, tmp_path: Path) -> None:
    """Gradient accumulation; where optimization is manual, Lightning leaves it to the module."""
    module = make_module(name)
    options = {"accumulate_grad_batches": 2} if module.automatic_optimization else {}
    trainer = make_trainer(tmp_path, **options)
    if not module.automatic_optimization:
        accumulate_by_hand(module, trainer)
    trainer.fit(module)
    assert trainer.global_step in (NUM_BATCHES // 2, NUM_BATCHES)
    assert_compressed(trainer, module)


@each_module
def test_bf16(name: str, tmp_path: Path) -> None:
    """Mixed precision."""
    module, trainer = make_module(name), make_trainer(tmp_path, precision="bf16-mixed")
    with where_plain_can(name, tmp_path, precision="bf16-mixed"):
        trainer.fit(module)
    assert_compressed(trainer, module)
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("first", [True, False])
@each_module
def test_ema(name: str, first: bool, tmp_path: Path) -> None:
    """Averaged weights are sparse too, in training and in the checkpoint; the run resumes bit-identically."""

    def make(folder: Path) -> pl.Trainer:
        trainer = make_trainer(folder, [SaveAfter(folder, (7, 20, NUM_BATCHES))])
        trainer.callbacks.insert(0 if first else len(trainer.callbacks) - 1, EMAWeightAveraging(decay=0.8))
        return trainer

    module, trainer = make_module(name), make(tmp_path)
    trainer.fit(module)
    assert_compressed(trainer, module)
    averaged = torch.load(tmp_path / f"{NUM_BATCHES}.ckpt", weights_only=True)["state_dict"]
    masks = callback_of(trainer, GradualPruning).masks
    names = {id(p): key for key, p in module.named_parameters()}
    layers = [averaged[names[id(layer.weight)]] for layer in masks.layers]
    assert sum(int((w == 0).sum()) for w in layers) >= SPARSITY * sum(w.numel() for w in layers)
    for batches in (7, 20):
        again, trainer_again = make_module(name), make(tmp_path / "again")
        trainer_again.fit(again, ckpt_path=tmp_path / f"{batches}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, module), snapshot(trainer_again, again))


@each_module
def test_compile(name: str, tmp_path: Path) -> None:
    """An inner part under torch.compile."""
    module = compile_inner(make_module(name))
    trainer = make_trainer(tmp_path)
    trainer.fit(module)
    assert_compressed(trainer, module)
    assert_compiled_as_eager(module)


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("name", list(MODULES))
def test_ddp(name: str, ddp: dict[str, Any]) -> None:
    """Two processes train, prune and quantize alike."""
    assert ddp[name] == "ok"


@pytest.fixture(scope="session")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All modules, one after the other, in one group of two processes."""
    return in_two_processes("ddp", tmp_path_factory.mktemp("ddp"))


@each_module
def test_export(name: str, tmp_path: Path) -> None:
    """The file runs and agrees; a model that cannot be captured is refused, or ends its run with the reason."""
    module = make_module(name)
    if name in NOT_CAPTURED:
        refused = make_trainer(tmp_path, [Export(["onnx"])])
        with pytest.raises(ValueError, match=r"Export.formats='onnx' cannot take \w+: .*rehearse=False"):
            refused.fit(module)
        assert refused.global_step == 0
    trainer = make_trainer(tmp_path, [export := Export(["onnx"], rehearse=name not in NOT_CAPTURED)])
    if name in NOT_CAPTURED:
        with pytest.warns(UserWarning, match="Export to onnx failed"):
            trainer.fit(module)
        assert "onnx" in export.failures
        return
    trainer.fit(module)
    assert not export.failures
    plain, unrehearsed = make_module(name), make_trainer(tmp_path)
    unrehearsed.fit(plain)
    rehearsed, expected = snapshot(trainer, module), snapshot(unrehearsed, plain)
    assert not [d for key in ("weights", "optimizers") for d in differences(rehearsed[key], expected[key])]
    assert export.artifacts[0].agreement >= 0.99
    assert (tmp_path / "report.json").exists()
