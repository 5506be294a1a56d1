"""Few bits, powers of two, learned scales and post-training quantization against every module of the zoo.

Complete for ternary weights with learned scales and for post-training quantization; the others differ from them in the
quantizer alone. conftest prints a table a method; int8 is part of test_matrix.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning_compress.callbacks import ChannelPruning, GradualPruning, QuantizationAwareTraining

import lightning_compress
from lightning_compress.analysis.inspect import sparsity
from lightning_compress.phase import Phase
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.prepare import prepared

from ..harness import (
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
from ..zoo import BATCHES, MODULES

EPOCHS = 3
PRUNE, CALIBRATE, QUANTIZE = Phase(1 / 12, 1 / 4), Phase(1 / 4, 1 / 2), Phase(1 / 2, 1.0)
SAVED = (2, 4, 6, 8, 11)  # in pruning, in calibration, after it, in training, and after the ranges froze
END = "end.ckpt"
LEARNED = ("ternary", "w4a8", "int4")
IN_TWO_PROCESSES = [(method, name) for method in ("ternary", "ptq") for name in MODULES]
IN_TWO_PROCESSES += [(method, name) for method in ("int4", "options") for name in ("mlp", "conv+bn+residual")]


def quantization(method: str) -> QuantizationAwareTraining:
    if method == "ptq":
        return QuantizationAwareTraining("int8", CALIBRATE, None)
    return QuantizationAwareTraining(method, CALIBRATE, QUANTIZE, freeze=0.6, learning_rate=1e-2)


def each(*methods: str) -> Any:
    return pytest.mark.parametrize(
        ("method", "name"),
        [
            pytest.param(method, name, marks=pytest.mark.xdist_group(name), id=f"{method}-{name}")
            for method in methods
            for name in MODULES
        ],
    )


complete, every = each("ternary", "ptq"), each("ternary", "ptq", "log4", "w4a8", "int4")


def make(folder: Path, method: str, extra: Any = (), **options: Any) -> pl.Trainer:
    callbacks = [SeedEachBatch(), GradualPruning(0.5, phase=PRUNE, every=1), quantization(method), *extra]
    return make_trainer(folder, **{"callbacks": callbacks, "max_epochs": EPOCHS, **options})


def shown(module: pl.LightningModule) -> dict[str, tuple[torch.Tensor, torch.Tensor, int, int | None]]:
    """Of every quantized layer: the weight that is computed with, the stored one, the number of codes, the axis."""
    found = {}
    for layer in prepared(module).layers:
        quantizer = weights(layer.module)[layer.parameter]
        values = getattr(layer.module, layer.parameter).detach()
        found[layer.name] = values, layer.weight.detach(), quantizer.quantizer.num_codes, quantizer.axis
    return found


def assert_quantized(trainer: pl.Trainer, module: pl.LightningModule, method: str) -> None:
    """Every channel of the weights takes few values, every place few activations, and what was pruned stays 0."""
    found = prepared(module)
    assert found.enabled
    assert found.activations
    assert all(a.enabled and not a.observing for a in found.activations.values())
    for name, (values, stored, num_codes, axis) in shown(module).items():
        channels = [values] if axis is None else values.movedim(axis, 0)
        assert max(len(channel.unique()) for channel in channels) <= num_codes, name
        assert len(values.unique()) > 1, name
        assert torch.isfinite(values).all(), name
        assert not values[stored == 0].any(), name
        assert not torch.equal(values, stored), name
    for place, activation in found.activations.items():
        y = activation.quantize(torch.linspace(*activation.range.tolist(), 4001))
        assert 1 < len(y.unique()) <= activation.quantizer.num_codes, place
    masks = callback_of(trainer, GradualPruning).masks
    shrunk = any(isinstance(callback, ChannelPruning) for callback in trainer.callbacks)  # sparse channels went first
    assert sparsity(masks.layers) >= max(masks.sparsity - 1e-9, 0.1 if shrunk else 0.5)
    assert bool(found.learned()) == (method in LEARNED)
    assert all(torch.isfinite(log).all() for log in found.learned().values())


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole run a method and module, with its checkpoints, trained once and only read; "plain" is unquantized."""
    made: dict[tuple[str, str], tuple[pl.Trainer, pl.LightningModule, Path]] = {}

    def run(method: str, name: str) -> tuple[pl.Trainer, pl.LightningModule, Path]:
        if (method, name) not in made:
            folder = tmp_path_factory.mktemp("quantization")
            module, trainer = make_module(name), make(folder, "int8" if method == "plain" else method)
            if method == "plain":
                trainer.callbacks.remove(callback_of(trainer, QuantizationAwareTraining))
            trainer.callbacks.append(SaveAfter(folder, (*SAVED, BATCHES * EPOCHS)))
            trainer.fit(module)
            trainer.save_checkpoint(folder / END)
            made[method, name] = trainer, module, folder
        return made[method, name]

    return run


@complete
def test_inert(method: str, name: str, runs: Any) -> None:
    """Until quantized values are trained with, the run is bit for bit the one without; after it no more."""
    last = BATCHES * EPOCHS
    for batches in (2, 4, 6, last) if method == "ptq" else (2, 4, 6):
        ours, plain = (torch.load(runs(m, name)[2] / f"{batches}.ckpt", weights_only=True) for m in (method, "plain"))
        assert not differences(ours["state_dict"], plain["state_dict"]), batches
        assert not differences(ours["optimizer_states"], plain["optimizer_states"]), batches
    trained, plain = runs(method, name)[1], runs("plain", name)[1]
    assert differences(trained.state_dict(), plain.state_dict()) or method == "ptq"
    assert differences(outputs(trained), outputs(plain))


@every
def test_target(method: str, name: str, runs: Any) -> None:
    """Few levels, zeros that stay; and learned scales that moved, with an optimizer of their own."""
    trainer, module, folder = runs(method, name)
    assert_quantized(trainer, module, method)
    learned = prepared(module).learned()
    if method not in LEARNED:
        return
    early = torch.load(folder / "8.ckpt", weights_only=True)["callbacks"]
    (state,) = (v for k, v in early.items() if k.startswith("QuantizationAwareTraining"))
    before = {f"{place}:scale": held["log_scale"] for place, held in state["quantization"]["learned"].items()}
    assert before.keys() == learned.keys()
    assert any(not torch.equal(before[key], log) for key, log in learned.items())
    optimizer = callback_of(trainer, QuantizationAwareTraining)._optimizer
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in learned.values()]
    theirs = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    assert theirs.isdisjoint(id(p) for p in learned.values())


@every
def test_resume(method: str, name: str, runs: Any, tmp_path: Path) -> None:
    """Resumed in every phase a run ends bit-identically: weights, optimizers, ranges, learned scales, their moments."""
    trainer, module, folder = runs(method, name)
    expected = snapshot(trainer, module)
    for batches in SAVED:
        again, trainer_again = make_module(name), make(tmp_path, method)
        trainer_again.fit(again, ckpt_path=folder / f"{batches}.ckpt", weights_only=True)
        assert not differences(expected, snapshot(trainer_again, again)), f"resumed after {batches} batches"


@pytest.mark.parametrize("method", ["ternary", "int4"])
def test_a_run_resumed_from_an_earlier_checkpoint_forgets_the_later_one(method: str, runs: Any, tmp_path: Path) -> None:
    """The same module and callbacks go on from batch 11, then from 2, as a fresh one does."""
    trainer, module, folder = runs(method, "mlp")
    again, first = make_module("mlp"), make(tmp_path, method)
    for batches in (11, 2, 8):
        second = make_trainer(tmp_path, callbacks=first.callbacks, max_epochs=EPOCHS)
        second.fit(again, ckpt_path=folder / f"{batches}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, module), snapshot(second, again)), batches


@complete
def test_test(method: str, name: str, runs: Any, tmp_path: Path) -> None:
    """One trainer and one module test checkpoints of any phase, forth and back."""
    _, trained, folder = runs(method, name)
    trainer, module, found = make(tmp_path, method), make_module(name), {}
    for path in (END, "8.ckpt", "2.ckpt", END, "8.ckpt", "2.ckpt"):
        result = trainer.test(module, ckpt_path=folder / path, verbose=False)
        assert found.setdefault(path, result) == result
        assert prepared(module).enabled == (path == END or (path == "8.ckpt" and method != "ptq"))
    assert found[END] == make(tmp_path, method).test(copy.deepcopy(trained), verbose=False)
    assert found["2.ckpt"] == make_trainer(tmp_path, callbacks=[]).test(
        make_module(name), ckpt_path=folder / "2.ckpt", verbose=False
    )


@complete
def test_load(method: str, name: str, runs: Any) -> None:
    _, trained, folder = runs(method, name)
    loaded = lightning_compress.load_from_checkpoint(MODULES[name], folder / END)
    assert_equal_outputs(loaded, trained)
    plain = MODULES[name].load_from_checkpoint(folder / END)
    assert not differences(plain.state_dict(), trained.state_dict())
    assert differences(outputs(plain), outputs(trained))


@every
def test_copy(method: str, name: str, runs: Any) -> None:
    """A deepcopy and a pickled module compute the same and share nothing, learned scales included."""
    _, trained, _ = runs(method, name)
    copies = [copy.deepcopy(trained)]
    if name != "foreign":  # torch itself pickles no parametrized module
        copies.append(pickle.loads(pickle.dumps(trained)))
    before = [y.clone() for y in outputs(trained)]
    for copied in copies:
        assert_equal_outputs(copied, trained)
        assert prepared(copied).learned().keys() == prepared(trained).learned().keys()
        with torch.no_grad():
            for log in prepared(copied).learned().values():
                log += 1
        assert bool(differences(outputs(copied), before)) == (method in LEARNED)
        prepared(copied).enable(False)
        assert differences(outputs(copied), before)
        assert not differences(outputs(trained), before)


@complete
def test_accumulate(method: str, name: str, tmp_path: Path) -> None:
    module = make_module(name)
    trainer = make(tmp_path, method, **({"accumulate_grad_batches": 2} if module.automatic_optimization else {}))
    if not module.automatic_optimization:
        accumulate_by_hand(module, trainer)
    trainer.fit(module)
    assert_quantized(trainer, module, method)
    if method == "ternary":  # as often as the user's optimizers
        steps = {int(s["step"]) for s in callback_of(trainer, QuantizationAwareTraining)._optimizer.state.values()}
        assert max(steps) == 3 * (2 if name == "gan" else 1)


@complete
def test_bf16(method: str, name: str, tmp_path: Path) -> None:
    module, trainer = make_module(name), make(tmp_path, method, precision="bf16-mixed")
    with where_plain_can(name, tmp_path, precision="bf16-mixed"):
        trainer.fit(module)
    assert_quantized(trainer, module, method)
    assert all(log.dtype == torch.float32 for log in prepared(module).learned().values())
    assert all(torch.isfinite(p).all() for p in module.parameters())


@complete
def test_ema(method: str, name: str, tmp_path: Path) -> None:
    """The averaged weights are quantized in validation and in the checkpoint; the run resumes bit-identically."""

    def make_averaging(folder: Path) -> pl.Trainer:
        return make(folder, method, [EMAWeightAveraging(decay=0.8), SaveAfter(folder, (4, 8))])

    module, trainer = make_module(name), make_averaging(tmp_path)
    trainer.fit(module)
    assert_quantized(trainer, module, method)
    for batches in (4, 8):
        again, trainer_again = make_module(name), make_averaging(tmp_path / "again")
        trainer_again.fit(again, ckpt_path=tmp_path / f"{batches}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, module), snapshot(trainer_again, again)), batches


@each("ternary", "ptq", "log4", "w4a8")
def test_compile(method: str, name: str, tmp_path: Path) -> None:
    compiled(method, name, tmp_path, "aot_eager" if method == "ternary" else "eager")


@pytest.mark.parametrize("name", ["mlp", "conv+bn+residual"])
def test_learned_steps_of_activations_compile(name: str, tmp_path: Path) -> None:
    compiled("int4", name, tmp_path)


def compiled(method: str, name: str, folder: Path, backend: str = "eager") -> None:
    module = compile_inner(make_module(name), backend)
    trainer = make(folder, method, limit_val_batches=0)
    trainer.fit(module)
    assert_quantized(trainer, module, method)
    assert_compiled_as_eager(module)


def make_shrinking(folder: Path, order: str, extra: Any = ()) -> pl.Trainer:
    """Prune, quantize and shrink in 24 batches; shrink in the beginning or, twice, when scales are learned already."""
    first, second, third, fourth = (Phase(i / 4, (i + 1) / 4) for i in range(4))
    shrink, prune, calibrate, quantize = (
        (first, second, third, fourth) if order == "first" else (fourth, first, second, third)
    )
    callbacks = [
        SeedEachBatch(),
        ChannelPruning(0.5, phase=shrink, steps=2),
        GradualPruning(0.5, phase=prune, every=1),
        QuantizationAwareTraining("ternary", calibrate, quantize, freeze=0.6, learning_rate=1e-2),
        *extra,
    ]
    return make_trainer(folder, callbacks=callbacks, max_epochs=2 * EPOCHS)


def shrink(order: str, name: str, folder: Path) -> None:
    """All three in one fit: masks hold, scales follow the channels; resumed in every phase it ends bit-identically."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            learned = prepared(pl_module).learned()
            seen.append({key: log.detach().clone() for key, log in learned.items()})

    saved = (3, 9, 15, 21)  # one a phase
    module, trainer = make_module(name), make_shrinking(folder, order, [Watch(), SaveAfter(folder, saved)])
    trainer.fit(module)
    assert_quantized(trainer, module, "ternary")
    learned = prepared(module).learned()
    for layer in prepared(module).layers:
        log = learned.get(f"{layer.name}:scale")
        assert log.shape == (layer.weight.shape[layer.out_axis],)
    dense = make_module(name)
    dense.configure_model()
    smaller = sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in dense.parameters())
    assert smaller == (name not in NOT_SHRINKING)
    if order == "late":
        narrow = [k for k in learned if seen[17][k].shape != seen[-1][k].shape]
        assert bool(narrow) == smaller
        for key in narrow:  # after the learning rate has come to 0, those kept are among those before, to the bit
            assert set(seen[-1][key].tolist()) <= set(seen[18][key].tolist())
    for batches in saved:
        again, trainer_again = make_module(name), make_shrinking(folder / "again", order)
        trainer_again.fit(again, ckpt_path=folder / f"{batches}.ckpt", weights_only=True)
        found = differences(snapshot(trainer, module), snapshot(trainer_again, again))
        assert not found, f"resumed after {batches} batches"
    trainer.save_checkpoint(folder / END)
    assert_equal_outputs(lightning_compress.load_from_checkpoint(MODULES[name], folder / END), module)


NOT_SHRINKING = ("lstm", "gru", "boring", "manual-boring", "tied")


@each("ternary")
def test_shrunk_first(method: str, name: str, tmp_path: Path) -> None:
    shrink("first", name, tmp_path)


@each("ternary")
def test_shrunk_late(method: str, name: str, tmp_path: Path) -> None:
    shrink("late", name, tmp_path)


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize(("method", "name"), IN_TWO_PROCESSES, ids=lambda value: value)
def test_ddp(method: str, name: str, ddp: dict[str, Any]) -> None:
    """Two processes agree on ranges, histograms and learned scales to the bit; every value is counted once."""
    assert ddp[f"{method}-{name}"] == "ok"


@pytest.fixture(scope="session")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All methods and modules, one after the other, in one group of two processes."""
    return in_two_processes("ddp_quantization", tmp_path_factory.mktemp("ddp"))
