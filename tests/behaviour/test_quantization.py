"""What learned scales and post-training quantization keep beyond the matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

import lightning_compress
from lightning_compress.callbacks import (
    ChannelPruning,
    GradualPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lightning_compress.phase import Phase
from lightning_compress.quantization import Affine, Percentile, Scheme
from lightning_compress.quantization.model import quantization_of

from ..harness import (
    SaveAfter,
    SeedEachBatch,
    accumulate_by_hand,
    assert_equal_outputs,
    callback_of,
    differences,
    in_two_processes,
    make_module,
    make_trainer,
    snapshot,
)
from ..nightly import some
from ..zoo import MODULES
from .methods import METHODS, NOTHING, assert_quantized

EPOCHS = 3
NAMES = ("conv+bn+residual", "mlp", "gan")


def make(folder: Path, method: str, *extra: pl.Callback, **options: Any) -> pl.Trainer:
    callbacks = [SeedEachBatch(), *METHODS[method].callbacks("mlp"), *extra]
    return make_trainer(folder, **{"callbacks": callbacks, "max_epochs": EPOCHS, **options})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["ternary", "int4"])
def test_scales_are_learned_by_an_optimizer_of_their_own(method: str, name: str, tmp_path: Path) -> None:
    module, trainer = make_module(name), make(tmp_path, method, SaveAfter(tmp_path, (8,)))
    trainer.fit(module)
    learned = quantization_of(module).learned()
    early = torch.load(tmp_path / "8.ckpt", weights_only=True)["callbacks"]
    (state,) = (value for key, value in early.items() if key.startswith("QuantizationAwareTraining"))
    before = {f"{place}:scale": held["log_scale"] for place, held in state["quantization"]["learned"].items()}
    assert before.keys() == learned.keys()
    assert any(not torch.equal(before[key], log) for key, log in learned.items())
    optimizer = callback_of(trainer, QuantizationAwareTraining).learning.optimizer
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in learned.values()]
    theirs = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    assert theirs.isdisjoint(id(p) for p in learned.values())


@pytest.mark.parametrize("name", NAMES)
def test_scales_step_as_often_as_the_users_optimizers(name: str, tmp_path: Path) -> None:
    module = make_module(name)
    accumulate = {"accumulate_grad_batches": 2} if module.automatic_optimization else {}
    trainer = make(tmp_path, "ternary", **accumulate)
    if not module.automatic_optimization:
        accumulate_by_hand(module, trainer)
    trainer.fit(module)
    steps = {int(s["step"]) for s in callback_of(trainer, QuantizationAwareTraining).learning.optimizer.state.values()}
    assert max(steps) == 3 * len(trainer.optimizers)


@pytest.mark.parametrize("method", ["ternary", "int4"])
def test_a_run_resumed_from_an_earlier_checkpoint_forgets_the_later_one(method: str, tmp_path: Path) -> None:
    """The same module and callbacks go on from batch 11, then from 2, as a fresh one does."""
    module, trainer = make_module("mlp"), make(tmp_path, method, SaveAfter(tmp_path, (2, 8, 11)))
    trainer.fit(module)
    again, first = make_module("mlp"), make(tmp_path / "again", method)
    for batches in (11, 2, 8):
        second = make_trainer(tmp_path / "again", callbacks=first.callbacks, max_epochs=EPOCHS)
        second.fit(again, ckpt_path=tmp_path / f"{batches}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, module), snapshot(second, again)), batches


def make_shrinking(folder: Path, order: str, *extra: pl.Callback) -> pl.Trainer:
    """Prune, quantize and shrink in 24 batches; shrink in the beginning or, twice, when scales are learned already."""
    first, second, third, fourth = (Phase(i / 4, (i + 1) / 4) for i in range(4))
    phases = {"first": (first, second, third, fourth), "late": (fourth, first, second, third)}
    shrink, prune, calibrate, quantize = phases[order]
    callbacks = [
        SeedEachBatch(),
        ChannelPruning(0.5, phase=shrink, steps=2),
        GradualPruning(0.5, phase=prune, every=1),
        QuantizationAwareTraining("ternary", calibrate, quantize, freeze=0.6, learning_rate=1e-2),
        *extra,
    ]
    return make_trainer(folder, callbacks=callbacks, max_epochs=6)


class Scales(pl.Callback):
    """The learned scales before each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        learned = quantization_of(pl_module).learned()
        self.seen.append({key: log.detach().clone() for key, log in learned.items()})


@pytest.mark.parametrize("name", ["conv+bn+residual", "attention", "lstm"])
@pytest.mark.parametrize("order", some(["first", "late"], "late"))
def test_scales_follow_the_channels(order: str, name: str, tmp_path: Path) -> None:
    """All three in one fit: masks hold, scales follow; resumed in every phase it ends bit-identically."""
    saved = (3, 9, 15, 21)  # one in each phase
    module = make_module(name)
    trainer = make_shrinking(tmp_path, order, scales := Scales(), SaveAfter(tmp_path, saved))
    trainer.fit(module)
    assert_quantized(module, learned=True)
    learned = quantization_of(module).learned()
    for layer in quantization_of(module).layers:
        assert learned[f"{layer.name}:scale"].shape == (layer.weight.shape[layer.out_axis],)
    if order == "late":
        narrow = [key for key in learned if scales.seen[17][key].shape != scales.seen[-1][key].shape]
        assert bool(narrow) == (name not in NOTHING)
        for key in narrow:  # after the learning rate has come to 0, those kept are among those before, to the bit
            assert set(scales.seen[-1][key].tolist()) <= set(scales.seen[18][key].tolist())
    for batches in saved:
        again, trainer_again = make_module(name), make_shrinking(tmp_path / "again", order)
        trainer_again.fit(again, ckpt_path=tmp_path / f"{batches}.ckpt", weights_only=True)
        found = differences(snapshot(trainer, module), snapshot(trainer_again, again))
        assert not found, f"resumed after {batches} batches"
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_equal_outputs(lightning_compress.load_from_checkpoint(MODULES[name], tmp_path / "end.ckpt"), module)


class Counted(Percentile):
    """Remembers how many values this process showed it."""

    num_values = 0

    def update(self, state: Tensor, values: Tensor) -> Tensor:
        Counted.num_values += values.numel()
        return super().update(state, values)


def count(name: str, folder: Path) -> None:
    """What each of two processes does: every value that either of them saw is in the histograms of both, once."""
    Counted.num_values = 0
    scheme = Scheme(Affine(8, symmetric=True), observer=Counted(0.999))
    callbacks = [SeedEachBatch(), PostTrainingQuantization(scheme, Phase(1 / 3, 1.0))]
    options = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    module = make_module(name)
    make_trainer(folder, callbacks=callbacks, max_epochs=EPOCHS, **options).fit(module)
    states = {place: activation.state for place, activation in quantization_of(module).activations.items()}
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, (states, Counted.num_values))
    assert not differences(both[0][0], both[1][0])
    shown = both[0][1] + both[1][1]
    assert shown > 0
    assert sum(int(state[2:].sum()) for state in states.values()) == shown


def equalize(name: str, folder: Path) -> None:
    """What each of two processes does: both equalize and correct alike by what both saw in validation."""
    callback = PostTrainingQuantization(equalize=True, correct_bias=True)
    module = make_module(name)
    make_trainer(folder, callbacks=[callback], devices=2, strategy="ddp").validate(module, verbose=False)
    mine = {
        "weights": {n: p.detach() for n, p in module.named_parameters()},
        "ranges": quantization_of(module).state_dict(),
    }
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, mine)
    assert not differences(*both)
    assert quantization_of(module).enabled


@pytest.mark.xdist_group("ddp")
def test_two_processes_see_the_values_of_both(tmp_path: Path) -> None:
    names = ("mlp", "conv+bn+residual", "gan", "lstm")
    calls = [(__name__, "count", [name]) for name in names]
    calls += [(__name__, "equalize", [name]) for name in names[:2]]
    found = in_two_processes(calls, tmp_path)
    assert found == ["ok"] * len(calls), "\n".join(found)
