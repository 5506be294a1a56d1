"""GradualPruning with every criterion and turn; RigL and SET step by step; gated checkpoints; mistakes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_compress.analysis.inspect import sparsity
from lightning_compress.callbacks import SET, GradualPruning, RigL
from lightning_compress.layers import Layer, find_layers
from lightning_compress.phase import Phase
from lightning_compress.pruning import (
    LAMP,
    APoZ,
    BatchNormScale,
    Block,
    Channel,
    Criterion,
    Element,
    Linear,
    Magnitude,
    MeanActivation,
    Movement,
    NofM,
    Pattern,
    Random,
    Rounds,
    Taylor,
    Wanda,
)
from lightning_compress.pruning.scopes import erdos_renyi_kernel

from ..harness import SaveAfter, SeedEachBatch, differences, make_module, make_trainer, snapshot
from ..zoo import BATCHES, MLP
from .test_errors import NoTraining

EPOCHS = 3
NUM = EPOCHS * BATCHES
PHASE = Phase(0.25, 0.75)
CRITERIA: dict[str, tuple[Criterion, Pattern]] = {
    "magnitude": (Magnitude(), Element()),
    "lamp": (LAMP(), Element()),
    "random": (Random(), Block(4, 1)),
    "mean activation": (MeanActivation(), Channel()),
    "apoz": (APoZ(), Channel()),
    "wanda": (Wanda(), Element()),
    "taylor": (Taylor(), Element()),
    "movement": (Movement(), Channel(1)),
    "norm": (BatchNormScale(), Channel()),
}
NAMES = ("conv+bn+residual", "mlp", "gan")


def fit(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    options = {"max_epochs": EPOCHS, "limit_val_batches": 0, **options}
    trainer = make_trainer(folder, callbacks=[SeedEachBatch(), *callbacks], **options)
    trainer.fit(module)
    return trainer


def resume(path: Path, folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    options = {"max_epochs": EPOCHS, "limit_val_batches": 0, **options}
    trainer = make_trainer(folder, callbacks=[SeedEachBatch(), *callbacks], **options)
    trainer.fit(module, ckpt_path=path, weights_only=True)
    return trainer


def make(criterion: str, **options: Any) -> GradualPruning:
    return GradualPruning(0.6, *CRITERIA[criterion], **{"phase": PHASE, "every": 2, **options})


def assert_reached(pruning: GradualPruning, target: float = 0.6) -> None:
    """The share among the layers that the criterion could score; the floor of a layer of few channels may cost some."""
    assert pruning.reached
    scored = [layer for layer in pruning.masks.layers if layer.name not in pruning.skipped]
    assert scored
    assert sparsity(scored) >= target
    assert all(0 < float((layer.weight != 0).float().mean()) <= 1 for layer in scored)
    for layer in pruning.masks.layers:
        if layer.name in pruning.skipped:
            assert bool((layer.weight != 0).all())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """The weights of a run without pruning, right before the phase begins."""
    found: dict[str, dict[str, Tensor]] = {}

    def train(name: str) -> dict[str, Tensor]:
        if name not in found:
            folder = tmp_path_factory.mktemp("plain")
            fit(folder, make_module(name), SaveAfter(folder, (3,)), max_epochs=1)
            found[name] = torch.load(folder / "3.ckpt", weights_only=True)["state_dict"]
        return found[name]

    return train


each = pytest.mark.parametrize(
    ("criterion", "name"),
    [(c, name) for c in CRITERIA for name in NAMES if (c, name) != ("norm", "mlp")],
    ids=lambda value: value,
)


@each
def test_a_criterion_is_inert_reaches_its_target_and_resumes(
    criterion: str, name: str, plain: Callable[[str], dict[str, Tensor]], tmp_path: Path
) -> None:
    module, pruning, saver = make_module(name), make(criterion), SaveAfter(tmp_path, (3, 6))
    trainer = fit(tmp_path, module, saver, pruning)  # it saves before the pruning has ended the batch
    assert_reached(pruning)
    assert not differences(torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"], plain(name))
    again = make_module(name)
    trainer_again = resume(tmp_path / "6.ckpt", tmp_path, again, SaveAfter(tmp_path, ()), make(criterion))
    assert not differences(snapshot(trainer, module), snapshot(trainer_again, again))


@each
def test_a_criterion_reaches_its_target_in_bf16_with_accumulation(criterion: str, name: str, tmp_path: Path) -> None:
    module, pruning = make_module(name), make(criterion, every=1)
    accumulate = {"accumulate_grad_batches": 3} if module.automatic_optimization else {}
    fit(tmp_path, module, pruning, precision="bf16-mixed", **accumulate)
    assert_reached(pruning)


def test_a_phase_that_begins_with_the_run_waits_for_what_is_observed(tmp_path: Path) -> None:
    for criterion in ("wanda", "taylor", "norm"):
        pruning, seen = make(criterion, phase=Phase(0.0, 0.5), every=1), []

        class Watch(pl.Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                seen.append(pruning.masks.sparsity)  # noqa: B023

        fit(tmp_path, make_module("conv+bn+residual"), pruning, Watch())
        assert_reached(pruning)
        assert not seen[0]
        assert 0 < seen[3] < 0.6 <= seen[5] + 1e-6


def shares(pruning: GradualPruning) -> dict[str, float]:
    return {layer.name: float((layer.weight == 0).float().mean()) for layer in pruning.masks.layers}


@pytest.mark.parametrize("sparsity_", [0.6, 0.0, Linear(0.0), Linear(0.6, initial=0.2)], ids=str)
def test_targets_by_name_pattern_rise_along_the_schedule(sparsity_: Any, tmp_path: Path) -> None:
    pruning, seen = GradualPruning(sparsity_, phase=PHASE, every=1, targets={"net.0": 0.3, "*.5": 0.9}), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(shares(pruning))

    fit(tmp_path, make_module("mlp"), pruning, Watch())
    final = pruning.schedule.final
    expected = {"net.0": math.ceil(0.3 * 512) / 512, "net.3": math.ceil(final * 1024) / 1024, "net.5": 116 / 128}
    assert seen[-1] == pytest.approx(expected)
    assert not any(seen[0].values())
    assert 0 < seen[4]["net.0"] < seen[6]["net.0"] < 0.3


@pytest.mark.parametrize("scope", ["layer", "erk"])
def test_each_layer_gets_its_share(scope: str, tmp_path: Path) -> None:
    pruning = GradualPruning(0.7, scope=scope, phase=PHASE, every=2, floor=0.0)
    fit(tmp_path, make_module("conv+bn+residual"), pruning)
    layers = pruning.masks.layers
    expected = erdos_renyi_kernel(layers, 0.7) if scope == "erk" else {layer.name: 0.7 for layer in layers}
    for layer in layers:
        assert 0 <= shares(pruning)[layer.name] - expected[layer.name] < 1 / layer.weight.numel()


def test_a_floor_keeps_every_layer_alive(tmp_path: Path) -> None:
    for floor, alive in ((0.5, True), (0.0, False)):
        module, pruning = make_module("mlp"), GradualPruning(0.9, floor=floor, phase=PHASE, every=2)
        with torch.no_grad():
            module.net[3].weight.mul_(1e-6)
        fit(tmp_path, module, pruning, max_epochs=3, gradient_clip_val=1e-9)
        assert (1 - shares(pruning)["net.3"] >= 0.05) == alive
        assert sparsity(pruning.masks.layers) == pytest.approx(0.9, abs=1e-3)


def test_first_and_last_stay_dense(tmp_path: Path) -> None:
    for first, last in ((True, False), (False, True), (True, True)):
        pruning = GradualPruning(0.6, phase=PHASE, every=2, keep_first=first, keep_last=last)
        fit(tmp_path, make_module("mlp"), pruning)
        assert set(shares(pruning)) == {"net.3", *([] if first else ["net.0"]), *([] if last else ["net.5"])}
        assert sparsity(pruning.masks.layers) >= 0.6
        assert set(pruning.skipped) == {*(["net.0"] if first else []), *(["net.5"] if last else [])}
        assert all("stays dense (keep_" in reason for reason in pruning.skipped.values())


class Rewinds(pl.Callback):
    """What stands when a batch begins, behind the pruning, and the masks' sparsity."""

    def __init__(self, pruning: GradualPruning) -> None:
        self.pruning, self.seen = pruning, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        states = [len(optimizer.state) for optimizer in trainer.optimizers]
        self.seen.append((self.pruning.masks.sparsity, weights, states))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"on {name}")
def test_every_round_starts_from_the_weights_of_the_early_step(name: str, tmp_path: Path) -> None:
    def rounds() -> GradualPruning:
        return GradualPruning(Rounds(0.75, num=2), phase=Phase(0.25, 0.75), every=1, rewind=2 / NUM)

    module, pruning = make_module(name), rounds()
    saver = SaveAfter(tmp_path, (1, 2, 4, 7, 11))
    trainer = fit(tmp_path, module, pruning, watch := Rewinds(pruning), saver)
    early = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    rises = [i for i in range(1, NUM) if watch.seen[i][0] > watch.seen[i - 1][0]]
    assert rises == [6, 9]
    assert [watch.seen[i][0] for i in rises] == pytest.approx([0.5, 0.75], abs=0.01)
    for i in rises:
        _, weights, states = watch.seen[i]
        assert not any(states)
        masked = {key: value * (weights[key] != 0) for key, value in early.items()}
        assert all(torch.equal(weights[key], masked[key]) for key in early if key.endswith("weight"))
        assert all(torch.equal(weights[key], early[key]) for key in early if not key.endswith("weight"))
        assert all(watch.seen[i + 1][2])
    for batches in saver.batches:
        again = make_module(name)
        trainer_again = resume(tmp_path / f"{batches}.ckpt", tmp_path, again, rounds())
        assert not differences(snapshot(trainer, module), snapshot(trainer_again, again)), batches


class Watched(pl.Callback):
    """Placed before and behind the sparse trainer: what an optimizer step begins with, and what becomes of it."""

    def __init__(self, pruning: RigL) -> None:
        self.pruning, self.seen = pruning, []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = {}
        for layer in self.pruning.masks.layers:
            if id(layer.weight) in theirs:
                state = optimizer.state.get(layer.weight, {})
                moments = [v.clone() for v in state.values() if v is not None and v.shape == layer.weight.shape]
                mask = self.pruning.masks._masks[layer.name].bool()
                found[layer.name] = (mask.clone(), layer.weight.detach().clone(), layer.weight.grad.clone(), moments)
        self.seen.append((trainer.global_step, found))


@pytest.mark.parametrize("kind", [RigL, SET])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"on {name}")
def test_sparse_training_step_by_step(kind: type[RigL], name: str, tmp_path: Path) -> None:
    phase, every = Phase(0.1, 0.8), 4 if name == "gan" else 2
    rigl = kind(0.7, phase=phase, every=every, share=0.5)
    before, behind = Watched(rigl), Watched(rigl)
    fit(tmp_path, make_module(name), before, rigl, behind)
    assert len(before.seen) == len(behind.seen) == (2 * NUM if name == "gan" else NUM)
    exchanges: dict[frozenset[str], list[int]] = {}
    for i, ((step, old), (_, new)) in enumerate(zip(before.seen, behind.seen, strict=True)):
        progress = ((i // 2 if name == "gan" else i) / NUM - phase.begin) / (phase.end - phase.begin)
        exchanged = any(not torch.equal(old[key][0], new[key][0]) for key in old)
        if exchanged:
            exchanges.setdefault(frozenset(old), []).append(step)
        for key, (mask, weight, gradient, moments) in old.items():
            mask_after, weight_after, _, moments_after = new[key]
            assert int(mask_after.sum()) == int(mask.sum())
            if not exchanged:
                assert torch.equal(weight, weight_after)
                continue
            k = int(0.25 * (1 + math.cos(math.pi * progress)) * int(mask.sum()))
            order = sorted(torch.where(mask.flatten())[0].tolist(), key=lambda j: float(weight.flatten()[j].abs()))
            kept = mask.flatten().clone()
            kept[order[:k]] = False
            grown = mask_after.flatten() & ~kept
            assert bool((mask_after.flatten()[kept]).all())
            assert int(grown.sum()) == k
            if kind is RigL:
                size = gradient.abs().flatten()
                left = size[~kept & ~grown]
                assert not left.numel() or bool(size[grown].min() >= left.max())
            fresh = (mask_after & ~mask).flatten()
            assert not weight_after.flatten()[fresh].any()
            assert torch.equal(weight_after, weight * mask_after)
            for moment, moment_after in zip(moments, moments_after, strict=True):
                assert torch.equal(moment_after.flatten(), moment.flatten() * ~fresh)
                assert not moment_after.flatten()[fresh].any()
    assert len(exchanges) == (2 if name == "gan" else 1)
    for steps in exchanges.values():
        assert len(steps) >= 2
        assert all(b - a >= every for a, b in pairwise(steps))
        assert max(steps) < 0.8 * len(before.seen)
    assert sparsity(rigl.masks.layers) >= 0.7


def test_set_is_reproducible_and_resumes(tmp_path: Path) -> None:
    def train(path: Path | None = None) -> dict[str, Any]:
        module, callback = make_module("mlp"), SET(0.7, phase=Phase(0.1, 0.8), every=2)
        if path is None:
            return snapshot(fit(tmp_path, module, callback, SaveAfter(tmp_path, (2, 5, 6))), module)
        return snapshot(resume(path, tmp_path, module, callback), module)

    whole = train()
    assert not differences(whole, train())
    for batches in (2, 5, 6):
        assert not differences(whole, train(tmp_path / f"{batches}.ckpt")), batches


class Counted(RigL):
    exchanges = 0

    def _exchange(self, *args: Any) -> None:
        self.exchanges += 1
        super()._exchange(*args)


@pytest.mark.parametrize("same", [True, False], ids=["same model", "another model"])
def test_a_second_fit_exchanges_as_often_as_the_first(same: bool, tmp_path: Path) -> None:
    rigl, module = Counted(0.7, phase=Phase(0.0, 1.0), every=3), make_module("mlp")
    fit(tmp_path, module, rigl)
    first, rigl.exchanges = rigl.exchanges, 0
    fit(tmp_path, module if same else make_module("mlp"), rigl)
    assert rigl.exchanges == first == 3


def test_a_second_model_is_rewound_to_its_own_weights(tmp_path: Path) -> None:
    pruning = GradualPruning(0.5, phase=Phase(0.5, 0.5), rewind=0.0)
    for seed in range(2):
        torch.manual_seed(seed)
        module = MLP()
        start = module.net[3].bias.detach().clone()
        fit(tmp_path, module, pruning, max_epochs=2, limit_train_batches=1)  # the second batch begins with the rewind
        rewound = pruning._rewound["net.3.bias"]
        assert torch.equal(rewound, start)


def test_a_second_fit_goes_on_with_what_was_observed(tmp_path: Path) -> None:
    module, pruning = make_module("mlp"), make("movement", phase=Phase(8, 12, "step"))
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, module, pruning, Stop(5))
    seen = {name: value.clone() for name, value in pruning._observation.seen.items()}
    fit(tmp_path, module, pruning, first := First(pruning))
    assert seen
    assert not differences(first.seen, seen)


class Stop(pl.Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= self.after:
            raise RuntimeError("stop here")


class First(pl.Callback):
    """What was observed when training starts."""

    def __init__(self, pruning: GradualPruning) -> None:
        self.pruning = pruning

    def on_train_start(self, *_: Any) -> None:
        self.seen = {name: value.clone() for name, value in self.pruning._observation.seen.items()}


class Functional(MLP):
    """Reads the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.linear(x, self.other.weight))


def test_a_layer_that_turns_out_not_to_be_scored_is_left_dense_and_named(tmp_path: Path) -> None:
    pruning = make("wanda")
    with pytest.warns(UserWarning, match="leaves alone other: it was never called as a module"):
        fit(tmp_path, Functional(), pruning)
    assert_reached(pruning)
    assert shares(pruning)["other"] == 0


def test_a_criterion_that_waited_in_vain_says_so(tmp_path: Path) -> None:
    pruning = make("taylor", include=["other"])
    module = Functional()
    module.other.requires_grad_(False)
    with pytest.warns(UserWarning, match="GradualPruning: target not reached: .* because Taylor.* had seen nothing"):
        fit(tmp_path, module, pruning)
    assert not pruning.reached


class Rising(MLP):
    """The earlier, the better: the best model by its validation loss is the dense one."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


def checkpointed(
    folder: Path, pruning: GradualPruning, path: Path | None = None, **options: Any
) -> tuple[ModelCheckpoint, pl.LightningModule]:
    torch.manual_seed(0)
    checkpoint, module = ModelCheckpoint(folder, monitor="val_loss", **{"save_top_k": 1, **options}), Rising()
    settings: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 1, "max_epochs": 6}
    if path is None:
        fit(folder, module, checkpoint, pruning, **settings)
    else:
        resume(path, folder, module, checkpoint, pruning, **settings)
    return checkpoint, module


def saved_sparsity(path: str | Path) -> float:
    state = torch.load(path, weights_only=True)["state_dict"]
    weights = [value for key, value in state.items() if key.endswith("weight")]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def gated(**options: Any) -> GradualPruning:
    return GradualPruning(0.6, phase=Phase(0.2, 0.5), every=2, **options)


@pytest.mark.parametrize("top", [1, 3])
def test_no_dense_model_is_saved_as_best(top: int, tmp_path: Path) -> None:
    checkpoint, _ = checkpointed(tmp_path, gated(), save_top_k=top)
    assert len(checkpoint.best_k_models) == top
    assert float(checkpoint.best_model_score) == 2  # the epoch at whose end the target is reached
    assert all(saved_sparsity(path) >= 0.6 for path in checkpoint.best_k_models)
    assert "check_monitor_top_k" not in checkpoint.__dict__
    assert float(checkpointed(tmp_path / "off", gated(gate_checkpoints=False), save_top_k=top)[0].best_model_score) == 0


@pytest.mark.parametrize("kind", [RigL, SET])
def test_a_model_that_is_sparse_from_the_start_is_saved_from_the_start(kind: type[RigL], tmp_path: Path) -> None:
    checkpoint, _ = checkpointed(tmp_path, kind(0.6, phase=Phase(0.0, 0.5), every=2))
    assert float(checkpoint.best_model_score) == 0
    assert saved_sparsity(checkpoint.best_model_path) >= 0.6


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_last_model_is_saved_while_the_best_waits(save_last: Any, tmp_path: Path) -> None:
    """A run that is cut off while it is dense goes on from its last checkpoint, and gates as if it had not been."""
    whole, trained = checkpointed(tmp_path / "whole", gated(), save_last=save_last)
    with pytest.raises(RuntimeError, match="stop here"):
        checkpointed_until(tmp_path, 6, save_last)
    last = tmp_path / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == BATCHES
    assert not list(tmp_path.glob("epoch*.ckpt"))
    resumed, again = checkpointed(tmp_path, gated(), last, save_last=save_last)
    assert not differences(trained.state_dict(), again.state_dict())
    assert float(resumed.best_model_score) == float(whole.best_model_score) == 2
    assert saved_sparsity(resumed.best_model_path) >= 0.6


def checkpointed_until(folder: Path, step: int, save_last: Any) -> None:
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(folder, monitor="val_loss", save_last=save_last)
    options: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 1, "max_epochs": 6}
    try:
        fit(folder, Rising(), checkpoint, gated(), Stop(step), **options)
    finally:
        assert "check_monitor_top_k" not in checkpoint.__dict__


def test_a_resume_behind_the_target_saves_better_models_only(tmp_path: Path) -> None:
    """The best of before the resume stands; a second fit saves as it pleases."""
    checkpointed(tmp_path, gated(), save_last=True)
    checkpoint, _ = checkpointed(tmp_path, gated(), next(tmp_path.glob("epoch=2*.ckpt")), save_last=True)
    assert float(checkpoint.best_model_score) == 2
    pruning, module = gated(), make_module("mlp")
    for _ in range(2):
        checkpoint = ModelCheckpoint(tmp_path / "second", monitor="val_acc", save_top_k=-1)
        fit(tmp_path, module, checkpoint, pruning, enable_checkpointing=True, limit_val_batches=1)
        assert len(list((tmp_path / "second").glob("*.ckpt"))) >= EPOCHS


def test_two_callbacks_gate_one_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    first = GradualPruning(0.5, phase=Phase(0.0, 0.3), every=2, include=["net.0"])
    second = GradualPruning(0.5, phase=Phase(0.4, 0.8), every=2, exclude=["net.0"])
    options: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 1, "max_epochs": 6}
    fit(tmp_path, Rising(), checkpoint, first, second, **options)
    assert float(checkpoint.best_model_score) == 4
    assert saved_sparsity(checkpoint.best_model_path) >= 0.5


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor", "norm"])
def test_trainer_and_callback_can_be_copied_and_pickled(criterion: str, tmp_path: Path) -> None:
    name = "conv+bn+residual"
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        pruning = copied(make(criterion))
        trainer = fit(tmp_path, make_module(name), pruning, enable_checkpointing=True)
        other = copied(pruning)
        assert not differences(other.state_dict(), pruning.state_dict())
        assert_reached(other)
        trained = copy.deepcopy(trainer)
        assert not differences(trained.lightning_module.state_dict(), trainer.lightning_module.state_dict())


def refuse(folder: Path, callback: pl.Callback, name: str = "mlp", compiled: bool = False) -> None:
    module = make_module(name)
    if compiled:
        module.net = torch.compile(module.net, backend="eager")
    fit(folder, module, callback, NoTraining())


Case = tuple[Callable[[Path], Any], type[Exception], str]
CASES: dict[str, Case] = {
    "sparsity='0.5'": (
        lambda _: GradualPruning("0.5"),
        ValueError,
        "GradualPruning.sparsity='0.5': accepted is a share",
    ),
    "sparsity=nan": (lambda _: GradualPruning(math.nan), ValueError, "sparsity=nan: accepted is a share"),
    "too sparse for N:M": (
        lambda _: GradualPruning(0.6, pattern=NofM(2, 4)),
        ValueError,
        "drops a share of 0.5 at most. Lower the",
    ),
    "schedule too sparse": (lambda _: GradualPruning(Linear(0.6), pattern=NofM()), ValueError, "0.5 at most"),
    "N:M with erk": (
        lambda _: GradualPruning(pattern=NofM(), scope="erk"),
        ValueError,
        "scope='erk': with NofM.* Accepted are 'global' and 'layer'",
    ),
    "scope=None": (lambda _: GradualPruning(scope=None), ValueError, "scope=None: accepted are 'global'"),
    "every=2.5": (lambda _: GradualPruning(every=2.5), ValueError, "every=2.5: accepted is a whole number"),
    "every=True": (lambda _: GradualPruning(every=True), ValueError, "every=True: accepted is a whole number"),
    "floor=2": (lambda _: GradualPruning(floor=2), ValueError, "floor=2: accepted is a share in 0..1"),
    "floor='x'": (lambda _: GradualPruning(floor="x"), ValueError, "floor='x': accepted is a share in 0..1"),
    "targets=0.5": (lambda _: GradualPruning(targets=0.5), TypeError, "targets=0.5: accepted is a dict"),
    "target of 50": (
        lambda _: GradualPruning(targets={"a": 50}),
        ValueError,
        r"targets\['a'\]=50: accepted is a share",
    ),
    "target in words": (lambda _: GradualPruning(targets={"a": "b"}), ValueError, r"targets\['a'\]='b': accepted"),
    "target beyond N:M": (
        lambda _: GradualPruning(pattern=NofM(), targets={"a": 0.6}),
        ValueError,
        r"targets\['a'\]=0.6: accepted is a share in 0..0.5 of the",
    ),
    "late rewind": (
        lambda _: GradualPruning(rewind=0.3),
        ValueError,
        r"rewind=0.3: accepted is a point in 0..0.2",
    ),
    "rewind='start'": (lambda _: GradualPruning(rewind="start"), ValueError, "rewind='start': accepted is a point"),
    "pattern='2:4'": (lambda _: GradualPruning(pattern="2:4"), TypeError, "pattern='2:4': accepted is a Pattern"),
    "pattern class": (lambda _: GradualPruning(pattern=NofM), TypeError, "accepted is a Pattern, an object"),
    "phase=0.5": (lambda _: GradualPruning(phase=0.5), TypeError, "phase=0.5: accepted is a Phase"),
    "RigL of all": (lambda _: RigL(1.0), ValueError, "RigL.sparsity=1.0: accepted is a share in 0..1, below 1"),
    "RigL by schedule": (lambda _: RigL(Linear(0.5)), ValueError, "RigL.sparsity=Linear.*: accepted is a share"),
    "SET share": (lambda _: SET(share=0), ValueError, "SET.share=0: accepted is a share above 0 and up to 1"),
    "SET share='x'": (lambda _: SET(share="x"), ValueError, "SET.share='x': accepted is a share above 0"),
    "RigL criterion": (lambda _: RigL(criterion="l1"), TypeError, "RigL.criterion='l1': accepted is a Criterion"),
    "RigL every": (lambda _: RigL(every=0), ValueError, "RigL.every=0: accepted is a whole number"),
    "target matches nothing": (
        lambda f: refuse(f, GradualPruning(targets={"head.*": 0.5})),
        ValueError,
        r"GradualPruning.targets\['head.\*'\] matches no layer that is pruned. They are: net.0, net.3, net.5",
    ),
    "target of an excluded layer": (
        lambda f: refuse(f, GradualPruning(exclude=["net.0"], targets={"net.0": 0.5})),
        ValueError,
        r"targets\['net.0'\] matches no layer that is pruned. They are: net.3, net.5",
    ),
    "no batch norm": (lambda f: refuse(f, make("norm")), ValueError, "the model has no batch norm. Take another crit"),
    "compiled": (
        lambda f: refuse(f, make("wanda"), "conv+bn+residual", True),
        ValueError,
        "observes activations by hooks, which torch.compile overlooks in net. Prune uncompiled, or take",
    ),
}


@pytest.mark.parametrize("given", CASES)
def test_refused_before_training(given: str, tmp_path: Path) -> None:
    call, kind, message = CASES[given]
    with pytest.raises(kind, match=message) as caught:
        call(tmp_path)
    assert len(str(caught.value).split()) >= 8


def test_taylor_prunes_a_compiled_model(tmp_path: Path) -> None:
    torch.compiler.reset()
    module, pruning = make_module("mlp"), make("taylor")
    module.net = torch.compile(module.net, backend="eager")
    fit(tmp_path, module, pruning)
    assert_reached(pruning)


def test_layers_are_those_of_the_engine(tmp_path: Path) -> None:
    """What a pattern or a criterion refuses is named beside what was left alone anyway."""
    pruning = GradualPruning(0.5, pattern=Block(16, 4), phase=PHASE)
    module = make_module("mlp")
    fit(tmp_path, module, pruning)
    known: list[Layer] = find_layers(module)[0]
    assert {layer.name for layer in known} == {*shares(pruning), *pruning.skipped} == {"net.0", "net.3", "net.5"}
    assert pruning.skipped == {"net.5": "blocks of 16 x 4 do not fill 4 x 32 channels"}
