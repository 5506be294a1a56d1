"""RigL and N:M against every module of the zoo and every property; conftest prints a table a method."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning_compress.callbacks import Export, GradualPruning, QuantizationAwareTraining, RigL

import lightning_compress
from lightning_compress.analysis.inspect import sparsity
from lightning_compress.phase import Phase
from lightning_compress.pruning import NofM
from lightning_compress.quantization.prepare import prepared

from ..harness import (
    NOT_CAPTURED,
    SaveAfter,
    SeedEachBatch,
    accumulate_by_hand,
    assert_compiled_as_eager,
    assert_equal_outputs,
    compile_inner,
    differences,
    in_two_processes,
    make_module,
    make_trainer,
    snapshot,
    where_plain_can,
)
from ..zoo import BATCHES, MODULES

EPOCHS = 3
SAVED = (2, 5, 7, 10)  # before, inside (twice) and after the phase
PHASE = Phase(0.2, 0.7)
METHODS: dict[str, Callable[[], GradualPruning]] = {
    "rigl": lambda: RigL(0.8, phase=PHASE, every=2),
    "n:m": lambda: GradualPruning(pattern=NofM(2, 4), phase=PHASE, every=2),
}
each = pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(method, name, marks=pytest.mark.xdist_group(name), id=f"{method}-{name}")
        for method in METHODS
        for name in MODULES
    ],
)


def make(folder: Path, method: str, extra: list[pl.Callback] | None = None, **options: Any) -> pl.Trainer:
    callbacks = [SeedEachBatch(), METHODS[method](), *(extra or [])]
    return make_trainer(folder, **{"callbacks": callbacks, "max_epochs": EPOCHS, **options})


def pruning_of(trainer: pl.Trainer) -> GradualPruning:
    return next(callback for callback in trainer.callbacks if isinstance(callback, GradualPruning))


def assert_reached(trainer: pl.Trainer, method: str) -> None:
    """The sparsity, and for N:M the pattern in every four neighbours."""
    layers = pruning_of(trainer).masks.layers
    if method == "rigl":
        assert layers
        assert sparsity(layers) >= 0.8
    for layer in layers if method == "n:m" else []:
        weight = layer.weight.detach()
        weight = weight.transpose(0, 1) if layer.out_axis == 1 else weight
        assert (weight.movedim(1, -1).unflatten(-1, (-1, 4)) == 0).sum(-1).min() >= 2


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole run a method and module, with its checkpoints, trained once and only read."""
    made: dict[tuple[str, str], tuple[pl.Trainer, pl.LightningModule, Path]] = {}

    def run(method: str, name: str) -> tuple[pl.Trainer, pl.LightningModule, Path]:
        if (method, name) not in made:
            folder = tmp_path_factory.mktemp("methods")
            module = make_module(name)
            trainer = make(folder, method, [SaveAfter(folder, (*SAVED, BATCHES * EPOCHS))])
            trainer.fit(module)
            made[method, name] = trainer, module, folder
        return made[method, name]

    return run


@each
def test_inert(method: str, name: str, runs: Any, tmp_path: Path) -> None:
    plain = make_module(name)
    make_trainer(tmp_path, callbacks=[SeedEachBatch(), SaveAfter(tmp_path, (2,))], max_epochs=1).fit(plain)
    saved, ours = (torch.load(p / "2.ckpt", weights_only=True) for p in (tmp_path, runs(method, name)[2]))
    assert not differences(saved["state_dict"], ours["state_dict"])


@each
def test_target(method: str, name: str, runs: Any) -> None:
    trainer, _, _ = runs(method, name)
    assert_reached(trainer, method)
    pruning = pruning_of(trainer)
    refused = {layer for layer, reason in pruning.skipped.items() if "multiple of 4" in reason}
    for layer in refused:  # only what really has no such neighbours
        owner, _, parameter = layer.rpartition(".")
        modules = dict(trainer.lightning_module.named_modules())
        weight = modules[layer].weight if layer in modules else getattr(modules[owner], parameter)
        assert weight.shape[1] % 4 or modules.get(layer).transposed
    assert pruning.masks.layers or refused


@each
def test_resume(method: str, name: str, runs: Any, tmp_path: Path) -> None:
    trainer, module, folder = runs(method, name)
    for batches in SAVED:
        again, trainer_again = make_module(name), make(tmp_path, method)
        trainer_again.fit(again, ckpt_path=folder / f"{batches}.ckpt", weights_only=True)
        found = differences(snapshot(trainer, module), snapshot(trainer_again, again))
        assert not found, f"resumed after {batches} batches"


@each
def test_test(method: str, name: str, runs: Any, tmp_path: Path) -> None:
    _, trained, folder = runs(method, name)
    found = make(tmp_path, method).test(make_module(name), ckpt_path=folder / "12.ckpt", verbose=False)
    assert found == make(tmp_path, method).test(copy.deepcopy(trained), verbose=False)


@each
def test_load(method: str, name: str, runs: Any) -> None:
    _, trained, folder = runs(method, name)
    assert_equal_outputs(lightning_compress.load_from_checkpoint(MODULES[name], folder / "12.ckpt"), trained)
    assert_equal_outputs(MODULES[name].load_from_checkpoint(folder / "12.ckpt"), trained)


@each
def test_copy(method: str, name: str, runs: Any) -> None:
    _, trained, _ = runs(method, name)
    assert_equal_outputs(copy.deepcopy(trained), trained)
    if name != "foreign":  # torch itself pickles no parametrized module
        assert_equal_outputs(pickle.loads(pickle.dumps(trained)), trained)


@each
def test_accumulate(method: str, name: str, tmp_path: Path) -> None:
    module = make_module(name)
    trainer = make(tmp_path, method, **({"accumulate_grad_batches": 2} if module.automatic_optimization else {}))
    if not module.automatic_optimization:
        accumulate_by_hand(module, trainer)
    trainer.fit(module)
    assert_reached(trainer, method)


@each
def test_bf16(method: str, name: str, tmp_path: Path) -> None:
    module, trainer = make_module(name), make(tmp_path, method, precision="bf16-mixed")
    with where_plain_can(name, tmp_path, precision="bf16-mixed"):
        trainer.fit(module)
    assert_reached(trainer, method)
    assert all(torch.isfinite(p).all() for p in module.parameters())


@each
def test_ema(method: str, name: str, tmp_path: Path) -> None:
    """Averaged weights are sparse where the weights were dropped for good; the run resumes bit-identically."""

    def trainer_with_average(folder: Path) -> pl.Trainer:
        return make(folder, method, [EMAWeightAveraging(decay=0.8), SaveAfter(folder, (5, 12))])

    module, trainer = make_module(name), trainer_with_average(tmp_path)
    trainer.fit(module)
    assert_reached(trainer, method)
    if method == "n:m":
        averaged = torch.load(tmp_path / "12.ckpt", weights_only=True)["state_dict"]
        names = {id(p): key for key, p in module.named_parameters()}
        for layer in pruning_of(trainer).masks.layers:
            assert not averaged[names[id(layer.weight)]][layer.weight == 0].any()
    again, trainer_again = make_module(name), trainer_with_average(tmp_path / "again")
    trainer_again.fit(again, ckpt_path=tmp_path / "5.ckpt", weights_only=True)
    assert not differences(snapshot(trainer, module), snapshot(trainer_again, again))


@each
def test_compile(method: str, name: str, tmp_path: Path) -> None:
    module = compile_inner(make_module(name), "eager")
    trainer = make(tmp_path, method)
    trainer.fit(module)
    assert_reached(trainer, method)
    assert_compiled_as_eager(module)


@each
def test_quantized(method: str, name: str, tmp_path: Path) -> None:
    """Zeros stay where they are under quantization-aware training, and in the exported file's model."""
    module = make_module(name)
    extra = [QuantizationAwareTraining(calibrate=Phase(0.8, 0.9), phase=Phase(0.9, 1.0))]
    trainer = make(tmp_path, method, extra)
    trainer.fit(module)
    assert_reached(trainer, method)
    assert prepared(module).enabled
    for layer in pruning_of(trainer).masks.layers:
        assert not getattr(layer.module, layer.parameter)[layer.weight == 0].any()


@each
def test_export(method: str, name: str, tmp_path: Path) -> None:
    module = make_module(name)
    trainer = make(tmp_path, method, [export := Export(["onnx"], rehearse=False)])
    if name in NOT_CAPTURED:
        with pytest.warns(UserWarning, match="Export to onnx failed"):
            trainer.fit(module)
        assert "onnx" in export.failures
        return
    trainer.fit(module)
    assert not export.failures
    assert export.artifacts[0].agreement >= 0.99


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize(("method", "name"), [(m, n) for m in METHODS for n in MODULES], ids=lambda v: v)
def test_ddp(method: str, name: str, ddp: dict[str, Any]) -> None:
    assert ddp[f"{method}-{name}"] == "ok"


@pytest.fixture(scope="session")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All methods and modules, one after the other, in one group of two processes."""
    return in_two_processes("ddp_methods", tmp_path_factory.mktemp("ddp"))
