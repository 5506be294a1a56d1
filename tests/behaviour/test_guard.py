"""AccuracyGuard: how far it goes, what it rolls back, and that a run killed anywhere goes on as if nothing had been.

The metric of the modules here says exactly what a compression costs, so that what must come out is known.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_compress.analysis.inspect import sparsity, weight_layers
from lightning_compress.callbacks import (
    AccuracyGuard,
    ChannelPruning,
    CompressionReport,
    GradualPruning,
    KnowledgeDistillation,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.phase import Phase
from lightning_compress.quantization.schemes import fp8

from ..harness import SeedEachBatch, callback_of, differences, in_two_processes, make_trainer, snapshot
from ..zoo import BATCHES, MLP

EPOCHS = 14
ALLOWED = 0.8  # sparsity from which on the metric falls


class Priced(MLP):
    """Trains as it does, and logs what the sparsity, or the bits, of its weights cost."""

    allowed_sparsity, allowed_bits = ALLOWED, 2

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        cost = 10 * max(0.0, sparsity(weight_layers(self)) - self.allowed_sparsity)
        for layer in weight_layers(self):
            shown = getattr(layer.module, layer.parameter).detach()
            if shown is not layer.weight and max(len(c.unique()) for c in shown) <= 2 ** (self.allowed_bits - 1):
                cost += 1.0  # so few values a channel that the bits are too few
        self.log("val_acc", 0.9 - cost)
        self.log("val_loss", 0.1 + cost)


class Record(pl.Callback):
    """All there is to a run after each validation, behind the guard."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            found = copy.deepcopy(snapshot(trainer, pl_module))
            found["callbacks"] = {k: v for k, v in found["callbacks"].items() if k.startswith(("Grad", "Quant"))}
            for callback in found["callbacks"].values():
                callback.pop("goal", None)  # what is asked for next is another step
            found["optimizers"] = [optimizer["state"] for optimizer in found["optimizers"]]  # rates follow the clock
            self.states[trainer.global_step] = found


class SaveAtValidation(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def steered(bits: bool) -> list[pl.Callback]:
    prune = GradualPruning(0.5 if bits else 0.99, phase=Phase(0.0, 0.5 if bits else 1.0))
    return [prune, *([QuantizationAwareTraining("int8", Phase(0.5, 0.55), Phase(0.55, 1.0))] if bits else [])]


def make(folder: Path, guard: AccuracyGuard, *others: pl.Callback, **options: Any) -> pl.Trainer:
    # twice an epoch: once inside, where a resume goes on in the middle, and once at the end
    settings = {"max_epochs": EPOCHS, "val_check_interval": 0.5, **options}
    return make_trainer(folder, callbacks=[SeedEachBatch(), guard, *others], **settings)


def priced(seed: int = 0) -> Priced:
    torch.manual_seed(seed)
    return Priced()


def test_alone_it_prunes_to_the_edge(tmp_path: Path) -> None:
    guard, module = AccuracyGuard(0.01), priced()
    trainer = make(tmp_path, guard)
    trainer.fit(module)
    reached = sparsity(weight_layers(module))
    # the drop of .01 is reached at .801; from there on, a step of a tenth of the weights left is worth trying
    assert ALLOWED + 0.001 - 0.1 * 0.2 - 0.005 <= reached <= ALLOWED + 0.001
    assert guard.level == {"sparsity": pytest.approx(reached, abs=2e-3)}
    assert any("rolled back" in entry["outcome"] for entry in guard.history)
    assert [entry["sparsity"] for entry in guard.history[:2]] == [0.5, 0.75]
    assert trainer.callback_metrics["val_acc"] == pytest.approx(0.9, abs=0.011)


def test_what_is_rolled_back_is_bit_identical(tmp_path: Path) -> None:
    guard, record, module = AccuracyGuard(0.01, patience=0), Record(), priced()
    trainer = make(tmp_path, guard, GradualPruning(0.99, phase=Phase(0.0, 1.0), every=1), record)
    trainer.fit(module)
    steps = [entry["step"] for entry in guard.history]
    backs = [i for i, entry in enumerate(guard.history) if "rolled back" in entry["outcome"]]
    assert backs
    for i in backs:
        good = next(s for s, e in zip(steps[i::-1], guard.history[i::-1], strict=True) if e["outcome"] == "holds")
        now, then = record.states[steps[i]], record.states[good]
        assert not differences(now, then)
    assert differences(record.states[steps[0]]["weights"], record.states[steps[1]]["weights"])  # it trains between


@pytest.mark.parametrize("bits", [False, True], ids=["sparsity", "bits"])
def test_killed_anywhere_it_resumes_bit_identically(tmp_path: Path, bits: bool) -> None:
    Priced.allowed_bits = 3
    whole, module = make(tmp_path, AccuracyGuard(0.01), *steered(bits), SaveAtValidation(tmp_path)), priced()
    whole.fit(module)
    expected = copy.deepcopy(snapshot(whole, module))
    history = callback_of(whole, AccuracyGuard).history
    outcomes = [entry["outcome"] for entry in history]
    assert {"holds", "misses, may recover", "misses, is rolled back"} <= set(outcomes)
    chosen = {outcomes.index("misses, may recover"), outcomes.index("misses, is rolled back"), len(outcomes) - 3}
    for i in sorted(chosen):
        trainer, module = make(tmp_path, AccuracyGuard(0.01), *steered(bits)), priced(seed=1)
        trainer.fit(module, ckpt_path=tmp_path / f"{history[i]['step']}.ckpt", weights_only=True)
        found = snapshot(trainer, module)
        for state in (found, expected):
            state["callbacks"].pop("SaveAtValidation", None)
        assert not differences(found, expected), (i, outcomes[i])


def test_it_judges_what_lightning_leaves_out_of_a_run_that_is_resumed(tmp_path: Path) -> None:
    """A step checkpoint on a validation is saved before it."""
    step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, auto_insert_metric_name=False)
    whole, module = make(tmp_path, AccuracyGuard(0.01), step, enable_checkpointing=True), priced()
    whole.fit(module)
    expected = callback_of(whole, AccuracyGuard).history
    outcomes = [entry["outcome"] for entry in expected]
    chosen = {outcomes.index("misses, is rolled back"), outcomes.index("holds"), len(outcomes) - 1}
    for i in sorted(chosen):
        seen: list[int] = []
        trainer, again = make(tmp_path, AccuracyGuard(0.01), Validations(seen)), priced(seed=1)
        trainer.fit(again, ckpt_path=tmp_path / f"{expected[i]['step']}.ckpt", weights_only=True)
        assert expected[i]["step"] not in seen  # if Lightning validates here one day, the guard need not
        assert callback_of(trainer, AccuracyGuard).history == expected
        assert not differences(dict(again.state_dict()), dict(module.state_dict()))


class Validations(pl.Callback):
    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(trainer.global_step)


@pytest.mark.parametrize("begin", [1, 2])
@pytest.mark.parametrize("first", ["guard", "pruning"])
def test_what_is_judged_is_what_stands(first: str, begin: int, tmp_path: Path) -> None:
    """Whoever comes first, and also where the phase begins with the last batch before a validation."""
    stood: dict[int, float] = {}

    class Stands(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            stood[trainer.global_step] = sparsity(weight_layers(pl_module))

    guard = AccuracyGuard(0.01)
    pruning = GradualPruning(0.99, phase=Phase(begin / (EPOCHS * BATCHES), 1.0))
    pair = [guard, pruning] if first == "guard" else [pruning, guard]
    trainer = make_trainer(
        tmp_path, callbacks=[Stands(), SeedEachBatch(), *pair], max_epochs=EPOCHS, val_check_interval=0.5
    )
    trainer.fit(priced())
    assert len(guard.history) >= 2 * EPOCHS - 2
    for entry in guard.history:
        assert stood[entry["step"]] == pytest.approx(entry["sparsity"], abs=2e-3), entry


def test_after_ctrl_c_the_run_is_where_it_last_held_and_reported(tmp_path: Path) -> None:
    class Interrupts(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if guard.history and "miss" in guard.history[-1]["outcome"]:
                raise KeyboardInterrupt

    guard, report, record, module = AccuracyGuard(0.01), CompressionReport(show=False), Record(), priced()
    with pytest.raises(SystemExit):
        make(tmp_path, guard, report, record, Interrupts()).fit(module)
    held = next(entry for entry in reversed(guard.history) if entry["outcome"] == "holds")
    assert not differences(dict(module.state_dict()), record.states[held["step"]]["weights"])
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["compressed"]["sparsity"] == pytest.approx(held["sparsity"], abs=2e-3)
    assert {row["callback"] for row in found["targets"]} == {"AccuracyGuard", "GradualPruning"}


def test_bits_are_lowered_until_the_metric_falls(tmp_path: Path) -> None:
    Priced.allowed_bits = 3  # two bits show three values, three bits seven
    guard, module = AccuracyGuard(0.01), priced()
    make(tmp_path, guard, *steered(True)).fit(module)
    assert guard.level == {"bits": 3}
    for layer in weight_layers(module):
        shown = getattr(layer.module, layer.parameter).detach()
        assert max(len(channel.unique()) for channel in shown) <= 7
        assert max(len(channel.unique()) for channel in shown) > 3
    assert sparsity(weight_layers(module)) > 0.49  # the masks of the phase before hold


def test_the_schedule_beside_it_is_the_most_it_prunes(tmp_path: Path) -> None:
    guard, module = AccuracyGuard(0.01), priced()
    make(tmp_path, guard, GradualPruning(0.6, phase=Phase(0.0, 0.5), every=1)).fit(module)
    assert sparsity(weight_layers(module)) == pytest.approx(0.6, abs=2e-3)
    assert guard.level == {"sparsity": 0.6}


def test_averages_return_too_and_the_last_checkpoint_is_the_end(tmp_path: Path) -> None:
    guard, module = AccuracyGuard(0.01), priced()
    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer = make(tmp_path, guard, EMAWeightAveraging(decay=0.5), last, enable_checkpointing=True)
    trainer.fit(module)
    assert sparsity(weight_layers(module)) <= ALLOWED + 0.001
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not differences(saved["state_dict"], dict(module.state_dict()))


def test_a_teacher_beside_it(tmp_path: Path) -> None:
    guard, module = AccuracyGuard(0.01), priced()
    make(tmp_path, guard, KnowledgeDistillation()).fit(module)
    assert 0.75 < sparsity(weight_layers(module)) <= ALLOWED + 0.001


def test_less_is_better_and_a_reference_of_ones_own(tmp_path: Path) -> None:
    guard, module = AccuracyGuard(0.5, monitor="val_loss", reference=0.1), priced()
    make(tmp_path, guard).fit(module)
    assert ALLOWED + 0.02 < sparsity(weight_layers(module)) <= ALLOWED + 0.05


def test_what_misses_from_the_start_is_said(tmp_path: Path) -> None:
    guard, module = AccuracyGuard(0.01, reference=2.0), priced()
    before = copy.deepcopy(module.state_dict())
    make(tmp_path, guard, QuantizationAwareTraining("int8", Phase(0.0, 0.1), Phase(0.1, 1.0))).fit(module)
    assert guard.level == {}
    assert all(entry["outcome"] == "misses" for entry in guard.history)
    assert differences(dict(module.state_dict()), dict(before))  # it trained on


@pytest.mark.parametrize(("num", "room"), [(None, 0.005), (90_000, 0.009)], ids=["few examples", "many"])
def test_the_fewer_examples_the_more_is_left_to_chance(tmp_path: Path, num: int | None, room: float) -> None:
    guard, module = AccuracyGuard(0.01, resolution=0.01), priced()
    if num is not None:  # the standard error of .9 is .001 then
        guard.on_validation_batch_end = lambda *args: setattr(guard, "_num_samples", num)  # type: ignore[method-assign]
    make(tmp_path, guard).fit(module)
    held = [entry["value"] for entry in guard.history if entry["outcome"] == "holds"]
    missed = [entry["value"] for entry in guard.history if entry["outcome"] != "holds"]
    assert min(held) >= 0.9 - room - 1e-5
    assert max(missed) < 0.9 - room + 1e-5


def test_nan_never_holds(tmp_path: Path) -> None:
    class Broken(Priced):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", math.nan if sparsity(weight_layers(self)) > 0.6 else 0.9)

    torch.manual_seed(0)
    guard, module = AccuracyGuard(0.01), Broken()
    make(tmp_path, guard).fit(module)
    assert 0.4 < sparsity(weight_layers(module)) <= 0.6


def guard_both(kind: str, folder: Path) -> None:
    """What each of two processes does."""
    Priced.allowed_bits = 3
    guard, module = AccuracyGuard(0.01), priced()
    make(folder, guard, *steered(kind == "bits"), devices=2, strategy="ddp").fit(module)
    mine = {name: p.detach() for name, p in module.named_parameters()}
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, (mine, guard.history))
    assert not differences(*both)
    assert (0.49 if kind == "bits" else 0.7) < sparsity(weight_layers(module)) <= ALLOWED + 0.001
    if kind == "bits":
        assert guard.level == {"bits": 3}


@pytest.mark.xdist_group("ddp")
def test_two_processes_decide_alike(tmp_path: Path) -> None:
    found = in_two_processes([(__name__, "guard_both", [kind]) for kind in ("sparsity", "bits")], tmp_path)
    assert found == ["ok", "ok"], "\n".join(found)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_drop": -0.1}, "max_drop"),
        ({"max_drop": "1%"}, "max_drop"),
        ({"mode": "higher"}, "mode"),
        ({"reference": math.nan}, "reference"),
        ({"step": 1.0}, "step"),
        ({"resolution": 0}, "resolution"),
        ({"bits": (2, 4)}, "bits"),
        ({"bits": (16, 4)}, "bits"),
        ({"patience": -1}, "patience"),
        ({"margin": 0.02}, "margin"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"AccuracyGuard\.{field}.*=.*accepted"):
        AccuracyGuard(**options)


@pytest.mark.parametrize(
    ("others", "options", "message"),
    [
        ([ChannelPruning(0.5)], {}, "ChannelPruning.*Accepted are GradualPruning"),
        ([RigL(0.5)], {}, "RigL.*Accepted are GradualPruning"),
        (
            [PostTrainingQuantization()],
            {},
            "PostTrainingQuantization: it cannot take back.*Accepted are",
        ),
        ([QuantizationAwareTraining(fp8())], {}, "bits=.*Accepted are bits"),
        ([GradualPruning(0.5, include=["net.0"]), GradualPruning(0.5, include=["net.2"])], {}, "2 GradualPruning"),
        ([], {"limit_val_batches": 0}, "judges by validation data"),
    ],
)
def test_what_cannot_be_guarded_is_refused_before_training(
    tmp_path: Path, others: list[pl.Callback], options: dict[str, Any], message: str
) -> None:
    module = priced()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        make(tmp_path, AccuracyGuard(), *others, **options).fit(module)
    assert not differences(dict(module.state_dict()), dict(before))


def test_a_metric_that_is_not_logged_is_refused_before_training(tmp_path: Path) -> None:
    module = priced()
    with pytest.raises(ValueError, match=r"monitor='val_f1'.*Accepted are: val_acc, val_loss"):
        make(tmp_path, AccuracyGuard(monitor="val_f1"), num_sanity_val_steps=1).fit(module)
    assert module.trainer.global_step == 0


def test_the_history_is_plain(tmp_path: Path) -> None:
    guard = AccuracyGuard(0.01)
    make(tmp_path, guard, max_epochs=2).fit(priced())
    assert json.loads(json.dumps(guard.history)) == guard.history
    assert [entry["step"] for entry in guard.history] == [BATCHES // 2 * i for i in range(1, 5)]
