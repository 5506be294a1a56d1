"""One batch is not the model: every other way still runs behind a cut, and what is left alone is named."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

from lightning_compress import load_from_checkpoint
from lightning_compress.callbacks import (
    SET,
    ChannelPruning,
    Export,
    GradualPruning,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.callbacks.examples import example_calls
from lightning_compress.phase import Phase
from lightning_compress.quantization.convert import convert

from . import branching
from .branching import Branching, pairs

MODULES: dict[str, type[Branching]] = {
    name: kind
    for name, kind in vars(branching).items()
    if isinstance(kind, type) and issubclass(kind, Branching) and kind is not Branching
}

# Layers that must be left alone, and words of the reason; all others that are no output shrink.
LEFT_ALONE = {
    "AuxiliaryStep": {"trunk.2": "training_step fails"},
    "TestHead": {"trunk.2": "test_step fails"},
    "PredictHead": {"trunk.2": "predict_step fails"},
    "TestData": {"trunk.2": "other, which no step ran, may read its channels"},
    "MultiTask": {"trunk.2": "training_step fails"},
    "TargetNetwork": {"trunk.0": "training_step fails", "trunk.2": "training_step fails", "target.0": "frozen"},
    "FrozenTeacher": {"teacher.0": "frozen"},
    "SharedWeights": {"trunk.0": "coupled with the output layer"},
    "RareBranch": {"trunk.0": "rare, which no step ran, may read", "trunk.2": "rare, which no step ran, may feed"},
    "UnusedHead": {"trunk.2": "unused, which no step ran, may read its channels"},
    "Packed": {"trunk.2": "leads to gru", "gru": "left whole"},
}
# Layers that must lose channels.
SHRINKS = {
    "DeepSupervision": ["trunk.0", "trunk.2"],
    "AuxiliaryStep": ["trunk.0"],
    "TestHead": ["trunk.0"],
    "PredictHead": ["trunk.0", "other.0"],
    "TestData": ["trunk.0"],
    "Tasks": ["trunk.0", "trunk.2"],
    "ByLoader": ["stems.0", "stems.1", "trunk.0", "trunk.2"],
    "MultiTask": ["trunk.0"],
    "Chance": ["trunk.0", "trunk.2", "blocks.0", "blocks.1", "blocks.2"],
    "Gan": ["trunk.0", "critic.0"],
    "TargetNetwork": [],
    "FrozenTeacher": ["trunk.0", "trunk.2"],
    "SelfSupervised": ["trunk.0", "projector.0"],
    "SharedWeights": ["trunk.2"],
    "LooksAtData": ["trunk.0", "trunk.2", "positive", "negative"],
    "RareBranch": [],
    "EarlyExit": ["trunk.0", "trunk.2"],
    "Experts": ["trunk.0", "trunk.2", *(f"experts.{i}.{j}" for i in range(4) for j in (0, 2))],
    "UnusedHead": ["trunk.0"],
    "Graph": ["trunk.0", "trunk.1"],
    "Images": ["trunk.0", "trunk.2"],
    "Packed": ["trunk.0"],
    "Adjacent": ["trunk.0", "trunk.2"],
    "Nested": ["trunk.0", "trunk.2"],
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Lightning's logger says."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def make(name: str) -> Branching:
    torch.manual_seed(0)
    return MODULES[name]()


def trainer_of(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**settings, **options})


def go_all_ways(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    """Train, validate, test and predict; gives what prediction gives."""
    trainer.fit(module)
    trainer.validate(module, verbose=False)
    trainer.test(module, verbose=False)
    return trainer.predict(module)


def outputs_of(module: nn.Module) -> dict[str, int]:
    """Outputs of each layer, counted from its weight."""
    return {
        name: m.weight.shape[0]  # type: ignore[union-attr,index]
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_way_still_runs_without_some_channels(name: str, tmp_path: Path) -> None:
    module = make(name)
    dense = outputs_of(module)
    callback = ChannelPruning(0.5, phase=Phase(0.25, 0.5), scope="local")
    trainer = trainer_of(tmp_path, callback)
    go_all_ways(trainer, module)
    left = outputs_of(module)
    assert {n for n in dense if left[n] < dense[n]} == set(SHRINKS[name])
    assert all(left[n] <= dense[n] // 2 + 1 for n in SHRINKS[name])
    for layer, why in LEFT_ALONE.get(name, {}).items():
        assert why in callback.skipped[layer]
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    loaded = load_from_checkpoint(MODULES[name], tmp_path / "model.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))
    trainer_of(tmp_path).predict(loaded)


@pytest.mark.parametrize("name", ["Tasks", "Experts"])
def test_a_run_goes_on_from_before_and_behind_the_cut(name: str, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def callback() -> ChannelPruning:
        return ChannelPruning(0.5, phase=Phase(0.4, 0.6))

    module = make(name)
    trainer_of(tmp_path, callback(), Save(), max_epochs=3).fit(module)
    for epoch in (0, 2):
        again = make(name)
        trainer = trainer_of(tmp_path, callback(), max_epochs=3)
        trainer.fit(again, ckpt_path=tmp_path / f"{epoch}.ckpt", weights_only=False)
        trainer.test(again, verbose=False)
        assert outputs_of(again) == outputs_of(module)


@pytest.mark.parametrize("name", ["Chance", "Experts"])
def test_every_way_still_runs_without_a_block(name: str, tmp_path: Path) -> None:
    module = make(name)
    names = set(dict(module.named_parameters()))
    go_all_ways(trainer_of(tmp_path, LayerPruning(1, max_share=1.0, phase=Phase(0.25, 0.5))), module)
    gone = names - set(dict(module.named_parameters()))
    assert {n.rsplit(".", 1)[0].split(".")[0] for n in gone} <= {"blocks", "experts"}
    assert gone


@pytest.mark.parametrize("name", ["DeepSupervision", "Tasks", "TestHead", "Experts", "UnusedHead"])
def test_masks_apply_to_every_part(name: str, tmp_path: Path) -> None:
    module = make(name)
    go_all_ways(trainer_of(tmp_path, GradualPruning(0.5, phase=Phase(0.25, 0.5), scope="layer")), module)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def float_layers(module: nn.Module) -> set[str]:
    """Layers that compute with the weights that they store."""
    return {n for n, m in module.named_modules() if isinstance(m, nn.Linear) and torch.equal(m.weight, stored(m))}


def stored(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


@pytest.mark.parametrize("callback", [QuantizationAwareTraining, PostTrainingQuantization])
@pytest.mark.parametrize(
    ("name", "unseen"),
    [
        ("DeepSupervision", set()),
        ("Tasks", set()),
        ("TestHead", {"other"}),
        ("PredictHead", {"other.0", "other.2"}),
        ("RareBranch", {"rare"}),
        ("UnusedHead", {"unused"}),
        ("ByLoader", set()),
    ],
)
def test_what_no_data_reached_stays_in_float(
    name: str, unseen: set[str], callback: type[pl.Callback], tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    module = make(name)
    first = (
        QuantizationAwareTraining("int8", Phase(0.0, 0.5), Phase(0.5, 1.0))
        if callback is QuantizationAwareTraining
        else PostTrainingQuantization("int8", Phase(0.0, 1.0))
    )
    trainer = trainer_of(tmp_path, first)
    go_all_ways(trainer, module)
    assert float_layers(module) == unseen
    assert all(f"{layer}: no batch of the calibration ran it" in said.text for layer in unseen)
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    loaded = load_from_checkpoint(MODULES[name], tmp_path / "model.ckpt").eval()
    assert float_layers(loaded) == unseen
    if name == "TestHead":  # a file has it in float, too
        x = torch.randn(8, 16)
        assert torch.equal(convert(loaded).other(x[:, :8].repeat(1, 3)), loaded.other(x[:, :8].repeat(1, 3)))


def test_post_training_by_validation_sees_each_dataloader(tmp_path: Path) -> None:
    module = make("ByLoader")
    trainer_of(tmp_path, PostTrainingQuantization("int8")).validate(module, verbose=False)
    assert float_layers(module) == set()


def test_scales_do_not_move_into_what_an_unseen_head_reads(tmp_path: Path) -> None:
    """Equalized, the values that a head of test_step reads would be others."""
    module = make("TestHead").eval()
    module.trunk[2].weight.data[:12] *= 50
    x = torch.randn(8, 16)
    before = module.other(module.trunk(x))
    quantize = PostTrainingQuantization("int8", equalize=True)
    trainer_of(tmp_path, quantize).validate(module, verbose=False)
    assert quantize.quantization is not None
    quantize.quantization.enable(False)
    assert torch.allclose(module.other(module.trunk(x)), before, rtol=1e-4, atol=1e-5)


class Exchanged(pl.Callback):
    """Which layers have other zeros than when they became sparse."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.changed: set[str] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, layer in pl_module.named_modules():
            if isinstance(layer, nn.Linear):
                zeros = layer.weight.detach() == 0
                if not torch.equal(self.first.setdefault(name, zeros), zeros):
                    self.changed.add(name)


@pytest.mark.parametrize(
    ("name", "never"), [("UnusedHead", {"unused"}), ("TestHead", {"other"}), ("Tasks", set()), ("Experts", {"router"})]
)
def test_each_layer_exchanges_weights_when_it_has_a_gradient(
    name: str, never: set[str], tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    for kind, left in ((RigL, never), (SET, set())):
        module = make(name)
        watch = Exchanged()
        trainer_of(tmp_path, kind(0.5, scope="layer", every=2, phase=Phase(0.0, 1.0)), watch).fit(module)
        layers = {n for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        assert layers - watch.changed <= left | {f"experts.{i}.{j}" for i in range(4) for j in (0, 2)}
        assert kind is SET or not left & watch.changed
        assert all(f"{layer}: no gradient arrived" in said.text for layer in left)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Graph", r"tensor \(21, 16\), tensor \(2, 60\).*fails on one sample"),
        ("Images", r"list of tensor \(3, 8, 10\).*fails on one sample"),
        ("Packed", r"PackedSequence.*sequences are packed"),
        ("Adjacent", r"sparse tensor \(9, 9\).*fails on one sample"),
        ("Nested", r"features=Features.*an object holds tensors"),
    ],
)
def test_what_has_no_batch_axis_is_refused_for_a_file_before_training(name: str, words: str, tmp_path: Path) -> None:
    module = make(name)
    trainer = trainer_of(tmp_path, Export(["torch"], tmp_path))
    with pytest.raises(ValueError, match=words):
        trainer.fit(module)
    assert trainer.global_step == 0


@pytest.mark.parametrize("name", ["Gan", "TargetNetwork", "Chance", "ByLoader"])
def test_looking_for_ways_leaves_the_run_as_it_is(name: str, tmp_path: Path) -> None:
    """Weights after training are bitwise those without the look, whatever the steps draw and change."""

    class Look(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            before = copy.deepcopy(pl_module.state_dict())
            calls = example_calls(trainer, pl_module, "Look")
            assert "fit" in calls.batches
            assert all(torch.equal(value, before[key]) for key, value in pl_module.state_dict().items())

    states = []
    for callbacks in ((), (Look(),)):
        pl.seed_everything(1, verbose=False)
        module = make(name)
        pl.seed_everything(2, verbose=False)
        trainer = trainer_of(tmp_path, *callbacks)
        trainer.fit(module)
        states.append((module.state_dict(), dict(trainer.callback_metrics)))
    assert all(torch.equal(a, b) for a, b in zip(states[0][0].values(), states[1][0].values(), strict=True))
    assert states[0][1] == states[1][1]


def test_looking_for_ways_takes_no_batch_of_an_iterator(tmp_path: Path) -> None:
    module = make("TestHead")
    seen: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0])

    callback = ChannelPruning(0.5, phase=Phase(1, 2, "step"))
    trainer = trainer_of(tmp_path, callback, Watch(), max_epochs=1, max_steps=4)
    trainer.fit(module, iter(list(pairs())), pairs())
    assert torch.equal(torch.cat(seen), torch.cat([x for x, _ in pairs()]))
    assert outputs_of(module)["trunk.0"] == 16


class Here(TensorDataset):
    """Counts what this process reads, and not a worker."""

    num = 0

    def __getitem__(self, index: int) -> Any:
        self.num += get_worker_info() is None
        return super().__getitem__(index)


def test_looking_for_ways_starts_no_worker(tmp_path: Path) -> None:
    data = Here(torch.randn(32, 16), torch.arange(32) % 4)
    loader = DataLoader(data, batch_size=8, num_workers=1, timeout=60)
    trainer_of(tmp_path, ChannelPruning(0.5), max_epochs=1).fit(make("TestHead"), loader, pairs())
    assert data.num >= 8
