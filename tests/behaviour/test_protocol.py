"""What the callbacks expect of each other: who is told of what, and what is found without knowing who wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_compress
from lightning_compress.analysis.inspect import sparsity, weight_layers
from lightning_compress.callbacks import (
    SET,
    AccuracyGuard,
    ChannelPruning,
    CompressionReport,
    FineTuning,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.phase import Phase
from lightning_compress.pruning import MeanActivation
from lightning_compress.quantization.fake_quant import activations
from lightning_compress.quantization.model import quantization_of

from ..harness import assert_equal_outputs, differences
from .small import BATCHES, EPOCHS, Small, facts, fit, make

OTHERS: dict[str, Any] = {
    "GradualPruning": lambda: GradualPruning(0.5, phase=Phase(0.1, 0.3), every=2),
    "RigL": lambda: RigL(0.5, phase=Phase(0.1, 0.3), every=2),
    "SET": lambda: SET(0.5, phase=Phase(0.1, 0.3), every=2),
    "ChannelPruning": lambda: ChannelPruning(0.5, phase=Phase(0.1, 0.3)),
    "LayerPruning": lambda: LayerPruning(1, max_share=1.0, phase=Phase(0.1, 0.3)),
    "FineTuning": lambda: FineTuning(Phase(0.1, 0.3), "constant"),
    "KnowledgeDistillation": lambda: KnowledgeDistillation(alpha=0.5, phase=Phase(0.1, 0.3)),
    "AccuracyGuard": lambda: AccuracyGuard(100.0, bits=(6, 4)),
}


def quantizing(**options: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining("int8", Phase(0.4, 0.5), Phase(0.5, 1.0), **options)


# ---- the best checkpoint


@pytest.mark.parametrize("other", [None, *OTHERS])
def test_the_best_checkpoint_is_a_quantized_one(other: str | None, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    beside = [] if other is None else [OTHERS[other]()]
    fit(tmp_path, make(), checkpoint, *beside, quantizing())
    assert float(checkpoint.best_model_score) == 5  # the first epoch whose batches were quantized
    best = lightning_compress.load_from_checkpoint(Small, checkpoint.best_model_path)
    assert facts(best)["quantized"]


def test_a_checkpoint_does_not_wait_where_that_is_turned_off(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    fit(tmp_path, make(), checkpoint, quantizing(gate_checkpoints=False))
    assert float(checkpoint.best_model_score) == 0


def test_no_checkpoint_waits_for_what_comes_after_the_last_one(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    fit(tmp_path, make(), checkpoint, PostTrainingQuantization("int8", Phase(0.4, 0.5)))
    assert float(checkpoint.best_model_score) == 0
    assert "check_monitor_top_k" not in checkpoint.__dict__


class ZeroBias(pl.Callback):
    """A compressing callback of a user's own."""

    compresses = gate_checkpoints = True
    reached = False

    def phases(self) -> list[tuple[str, Phase]]:
        return [("zero the biases", Phase(0.6, 0.6))]

    def asked(self) -> dict[str, float]:
        return {"biases": 0}

    def stands(self) -> dict[str, float]:
        return {"biases": 0 if self.reached else 1}

    def follow(self, pl_module: Any, record: Any) -> None:
        pass

    def keep(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def go_back(self, pl_module: Any, kept: Any) -> None:
        self.reached = kept["reached"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.reached = trainer.global_step >= 0.6 * EPOCHS * BATCHES
        for name, p in pl_module.named_parameters() if self.reached else ():
            p.data *= not name.endswith("bias")


def test_a_checkpoint_waits_for_a_callback_of_ones_own(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    fit(tmp_path, make(), checkpoint, ZeroBias(), GradualPruning(0.5, phase=Phase(0.1, 0.3)))
    assert float(checkpoint.best_model_score) == 5  # at whose end 0.6 of the run are over
    with pytest.raises(ValueError, match=r"prune.*and zero the biases.*overlap"):
        fit(tmp_path, make(), ZeroBias(), GradualPruning(0.5, phase=Phase(0.1, 0.7)))


def test_a_callback_that_says_half_is_refused(tmp_path: Path) -> None:
    class Half(pl.Callback):
        compresses = True

        def phases(self) -> list[tuple[str, Phase]]:
            return []

    with pytest.raises(
        TypeError, match=r"Half.compresses=True, but it has no follow, asked, .*, gate_checkpoints\. Acc"
    ):
        fit(tmp_path, make(), Half(), GradualPruning(0.5))


# ---- a change of shape


def widths(module: Small) -> list[int]:
    """Channels that can be removed, by the group they are in."""
    inside = [block.a.out_features for block in module.blocks if hasattr(block, "a")]
    return [module.stem[0].out_features, *inside]


@pytest.mark.parametrize("target", ["channels", "parameters", "macs"])
@pytest.mark.parametrize("steps", [1, 3])
def test_half_is_half_of_what_is_there_when_it_begins(target: Any, steps: int, tmp_path: Path) -> None:
    pruning = ChannelPruning(0.5, phase=Phase(0.4, 0.8), target=target, steps=steps, floor=0.0)
    module = make()
    fit(tmp_path, module, LayerPruning(1, max_share=1.0, phase=Phase(0.1, 0.3)), pruning)
    assert facts(module)["blocks"] == 2
    assert pruning.stands() == {target: pytest.approx(0.5, abs=0.06)}
    assert pruning.stands()[target] >= 0.5
    if target == "channels":
        assert sum(widths(module)) == (12 + 2 * 16) // 2
    if target == "parameters":  # of 1,304: a third of the blocks has gone before
        dense = make()
        dense.blocks[0] = torch.nn.Identity()
        whole = sum(p.numel() for p in dense.parameters())
        assert 0.44 * whole < facts(module)["parameters"] <= 0.5 * whole


def test_layers_of_their_own_target_lose_it_of_what_is_there(tmp_path: Path) -> None:
    """Two callbacks shrink the same layers in turn, the second one in several steps: each share is of what it found."""
    first = ChannelPruning(0.5, phase=Phase(0.1, 0.3), scope="local")
    second = ChannelPruning(0.5, phase=Phase(0.4, 0.8), scope="local", steps=2, targets={"stem": 0.0})
    module = make()
    fit(tmp_path, module, first, second)
    assert widths(module) == [6, 4, 4, 4]
    assert second.asked() == {"channels": 0.5, "channels of stem": 0.0} == second.stands()


def test_a_block_that_is_gone_is_not_removed_again(tmp_path: Path) -> None:
    module, second = make(), LayerPruning(1, max_share=1.0, phase=Phase(0.4, 0.6))
    fit(tmp_path, module, LayerPruning(1, max_share=1.0, phase=Phase(0.1, 0.3)), second)
    assert facts(module)["blocks"] == 1
    assert second.stands() == {"layers": 1} == second.asked()


def test_where_no_block_is_left_that_is_said(tmp_path: Path) -> None:
    second = LayerPruning(2, max_share=1.0, phase=Phase(0.4, 0.6))
    with pytest.warns(UserWarning, match="LayerPruning.num_layers=2: 1 are removed, because other callbacks"):
        fit(tmp_path, make(), LayerPruning(2, max_share=1.0, phase=Phase(0.1, 0.3)), second)
    assert second.stands() == {"layers": 1}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shrink", ["LayerPruning", "ChannelPruning"])
@pytest.mark.parametrize("criterion", [None, MeanActivation()])
def test_a_sparsity_is_one_of_the_model_as_it_stands(first: bool, shrink: str, criterion: Any, tmp_path: Path) -> None:
    """The masks are cut with the weights, and what went sparser than the rest is made up for; wherever it stands."""
    module = make()
    pruning = GradualPruning(0.5, criterion, phase=Phase(0.4, 0.6), every=2)
    shrinking = OTHERS[shrink]()
    shrinking.phase = Phase(0.7, 0.8)
    fit(tmp_path, module, *((pruning, shrinking) if first else (shrinking, pruning)))
    assert pruning.reached
    assert pruning.stands()["sparsity"] == sparsity(weight_layers(module))
    assert 0.5 <= pruning.stands()["sparsity"] < 0.56


class Logged(pl.Callback):
    """What is logged and shown after every batch, and what the model is then."""

    def __init__(self, report: CompressionReport) -> None:
        self.report, self.seen = report, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        shown = float(self.report._items()["sparsity"])
        self.seen.append((shown, round(sparsity(weight_layers(pl_module)), 3)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shrink", ["LayerPruning", "ChannelPruning"])
def test_what_is_shown_is_the_model_as_it_stands(shrink: str, first: bool, tmp_path: Path) -> None:
    report, pruning = CompressionReport(tmp_path, show=False), GradualPruning(0.5, phase=Phase(0.4, 0.6), every=2)
    shrinking, again, logged = OTHERS[shrink](), OTHERS[shrink](), Logged(report)
    again.phase, module = Phase(0.7, 0.8), make()
    others = (shrinking, pruning, again)
    trainer = fit(tmp_path, module, *((report, *others) if first else (*others, report)), logged)
    at_changes = [logged.seen[i] for i in (11, 31)]
    assert at_changes[1][0] == at_changes[1][1] > 0.49
    assert all(shown == found for shown, found in logged.seen[32:])
    final = json.loads((tmp_path / "report.json").read_text())
    live = float(trainer.callback_metrics["compress/sparsity"])
    history = report._history
    there = {layer.name: sparsity([layer]) for layer in weight_layers(module)}
    assert live == pytest.approx(final["compressed"]["sparsity"]) == pytest.approx(sparsity(weight_layers(module)))
    assert {name: values[-1] for name, values in history.sparsity.items() if values[-1] is not None} == there
    assert {row["name"]: row["sparsity"] for row in final["layers"]} == there
    assert {len(values) for values in history.sparsity.values()} == {len(history.steps)}
    gone = [name for name, values in history.sparsity.items() if None in values]
    assert len(gone) == (4 if shrink == "LayerPruning" else 0)
    assert all(row[2] is not None for row in history.rows)
    assert (tmp_path / "report.html").exists()


# ---- found whoever wrote it


class Mine(QuantizationAwareTraining):
    """A user's subclass."""


class Further(Mine):
    """A subclass of that."""


class Named(QuantizationAwareTraining):
    """One with a name of its own in the checkpoint."""

    @property
    def state_key(self) -> str:
        return "my quantization"


@pytest.mark.parametrize("kind", [Mine, Further, Named])
def test_a_subclass_of_ones_own_is_found_when_a_checkpoint_loads(kind: Any, tmp_path: Path) -> None:
    module = make()
    fit(tmp_path, module, kind("w4a8", Phase(0.4, 0.5), Phase(0.5, 1.0)), saved=(40,))
    loaded = lightning_compress.load_from_checkpoint(Small, tmp_path / "40.ckpt")
    assert facts(loaded)["quantized"]
    assert quantization_of(loaded).scheme.weight.bits == 4
    assert_equal_outputs(loaded, module)


def subclassed(kind: Any) -> Any:
    return type("Further", (type("Mine", (kind,), {"state_key": property(lambda self: "my own")}),), {})


@pytest.mark.parametrize("name", list(OTHERS))
def test_subclasses_of_every_callback_save_load_and_resume(name: str, tmp_path: Path) -> None:
    def callback() -> Any:
        plain = OTHERS[name]()
        plain.__class__ = subclassed(type(plain))
        return plain

    module, again = make(), make()
    fit(tmp_path, module, callback(), saved=(9,)).save_checkpoint(tmp_path / "end.ckpt")
    fit(tmp_path, again, callback(), ckpt_path=tmp_path / "9.ckpt")
    assert not differences(module.state_dict(), again.state_dict())
    loaded = lightning_compress.load_from_checkpoint(Small, tmp_path / "end.ckpt")
    assert facts(loaded) == facts(module)
    assert_equal_outputs(loaded, module)


# ---- a phase that does not compress


class Before(pl.Callback):
    """After which batch something first holds."""

    def __init__(self, holds: Any) -> None:
        self.holds, self.batch = holds, None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.batch is None and self.holds():
            self.batch = trainer.global_step


@pytest.mark.parametrize("extra", [[], [FineTuning(Phase(0.1, 0.2), "constant")]])
def test_fine_tuning_before_the_first_phase_is_not_compression(extra: list[Any], tmp_path: Path) -> None:
    report, teacher = CompressionReport(tmp_path, show=False), KnowledgeDistillation(alpha=0.5)
    guard, pruning = AccuracyGuard(100.0), GradualPruning(0.5, phase=Phase(0.5, 0.8))
    measured = Before(lambda: report.state_dict()["dense"] is not None)
    taught = Before(lambda: bool(teacher.state_dict()))
    referred = Before(lambda: guard.reference is not None)
    fit(tmp_path, make(), *extra, pruning, guard, teacher, report, measured, taught, referred)
    assert (measured.batch, taught.batch) == (20, 20)
    assert referred.batch == 21  # when the batch begins that compresses


def test_a_teacher_that_is_the_model_itself_needs_something_that_compresses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no callback compresses"):
        fit(tmp_path, make(), FineTuning(Phase(0.1, 0.2), "constant"), KnowledgeDistillation())


# ---- a second run of the same model


@pytest.mark.parametrize("words", [("int8", "w4a8"), ("w4a8", "int8"), ("int8", "int4"), ("ternary", "w8")])
def test_a_second_fit_takes_its_own_scheme(words: tuple[str, str], tmp_path: Path) -> None:
    """The same as if the first run had left plain weights behind: bit for bit, hooks and learned scales included."""
    module, plain = make(), make()
    fit(tmp_path, module, QuantizationAwareTraining(words[0], Phase(0.4, 0.5), Phase(0.5, 1.0)))
    plain.load_state_dict(module.state_dict())
    for each in (module, plain):
        fit(tmp_path, each, QuantizationAwareTraining(words[1], Phase(0.4, 0.5), Phase(0.5, 1.0)), saved=(40,))
    assert not differences(module.state_dict(), plain.state_dict())
    assert not differences(quantization_of(module).state_dict(), quantization_of(plain).state_dict())
    assert_equal_outputs(module, plain)
    for ours, theirs in zip(module.modules(), plain.modules(), strict=True):
        assert len(activations(ours)) == len(activations(theirs))
    assert_equal_outputs(lightning_compress.load_from_checkpoint(Small, tmp_path / "40.ckpt"), module)


def test_a_second_fit_with_the_same_scheme_keeps_what_it_knows(tmp_path: Path) -> None:
    module = make()
    fit(tmp_path, module, quantizing())
    before = quantization_of(module)
    fit(tmp_path, module, quantizing())
    assert quantization_of(module) is before


def test_looking_at_a_model_of_another_scheme_is_refused(tmp_path: Path) -> None:
    module = make()
    trainer = fit(tmp_path, module, quantizing())
    trainer.callbacks[:] = [QuantizationAwareTraining("w4a8")]
    for look in (trainer.validate, trainer.test):
        with pytest.raises(ValueError, match=r"QuantizationAwareTraining.scheme=.*quantized by another one.*Accepted"):
            look(module, verbose=False)
    trainer.callbacks[:] = [quantizing()]
    trainer.validate(module, verbose=False)


def test_post_training_quantization_takes_its_own_scheme(tmp_path: Path) -> None:
    module = make()
    trainer = fit(tmp_path, module, quantizing(), limit_val_batches=2)
    trainer.callbacks[:] = [PostTrainingQuantization("w4a8")]
    trainer.validate(module, verbose=False)
    assert quantization_of(module).scheme.weight.bits == 4
    assert facts(module)["quantized"]


def test_a_second_fit_prunes_as_it_is_asked(tmp_path: Path) -> None:
    """Of the same object, by other callbacks: each target is one of the model as the fit before left it."""
    module = make()
    for share, left in ((0.5, [6, 8, 8, 8]), (0.5, [3, 4, 4, 4])):
        pruning = ChannelPruning(share, phase=Phase(0.1, 0.3), scope="local")
        fit(tmp_path, module, pruning, saved=(40,))
        assert widths(module) == left
        assert facts(lightning_compress.load_from_checkpoint(Small, tmp_path / "40.ckpt")) == facts(module)
    for share in (0.8, 0.5):
        fit(tmp_path, module, GradualPruning(share, phase=Phase(0.1, 0.3)))
        assert sparsity(weight_layers(module)) == pytest.approx(share, abs=0.01)
