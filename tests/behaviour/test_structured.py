"""What ChannelPruning and LayerPruning keep beyond the matrix, and what they refuse."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_compress.analysis.inspect import count_macs
from lightning_compress.callbacks import ChannelPruning, LayerPruning
from lightning_compress.forward import Inputs
from lightning_compress.phase import Phase
from lightning_compress.pruning import MeanActivation, Taylor

from ..harness import (
    SaveAfter,
    SeedEachBatch,
    accumulate_by_hand,
    differences,
    inputs_of,
    make_module,
    make_trainer,
    snapshot,
)
from ..zoo import MODULES
from .methods import BLOCKS, METHODS, assert_smaller


def make(method: str, folder: Path, *extra: pl.Callback, **options: Any) -> pl.Trainer:
    return make_trainer(folder, callbacks=[SeedEachBatch(), *METHODS[method].callbacks("mlp"), *extra], **options)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", ["conv+bn+residual", "mlp", "gan"])
def test_nothing_is_removed_inside_a_window_of_accumulated_gradients(name: str, tmp_path: Path) -> None:
    module = make_module(name)
    by_hand = not module.automatic_optimization
    options = {} if by_hand else {"accumulate_grad_batches": 2}
    seen: list[int] = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(sum(p.numel() for p in pl_module.parameters()))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            assert by_hand or seen[-1] == sum(p.numel() for p in pl_module.parameters())

    callback = ChannelPruning(0.5, phase=Phase(5 / 24, 11 / 24), steps=2)
    trainer = make_trainer(tmp_path, callbacks=[SeedEachBatch(), callback, Watch()], **options)
    if by_hand:
        accumulate_by_hand(module, trainer)
    trainer.fit(module)
    assert_smaller(trainer, module)
    assert callback.shrinks == 2


def test_a_module_without_a_block_is_refused_before_training(tmp_path: Path) -> None:
    """A block gives back the shape it reads; the message says what there is."""
    for name in sorted(set(MODULES) - set(BLOCKS)):
        module = make_module(name)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=r"LayerPruning.num_layers=1: only 0 blocks"):
            make("layers", tmp_path).fit(module)
        assert not differences(before, module.state_dict()), name


@pytest.mark.parametrize("name", ["conv+bn+residual", "attention"])
def test_averages_lose_the_block_too(name: str, tmp_path: Path) -> None:
    """Blocks that go while masks and averages live, and integers after them."""
    callbacks = [SeedEachBatch(), EMAWeightAveraging(decay=0.8), *METHODS["prune+layers+int8"].callbacks(name)]
    module, trainer = make_module(name), make_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(module)
    METHODS["prune+layers+int8"].reached(trainer, module, name)


@pytest.mark.parametrize("target", ["parameters", "macs", "latency"])
def test_what_the_share_is_of(target: str, tmp_path: Path) -> None:
    module, dense = make_module("conv+bn+residual"), make_module("conv+bn+residual")
    pruning = ChannelPruning(0.6, target=target, steps=2, phase=Phase(0.2, 0.5), floor=0.0)
    make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    counts = []
    for each in (module, dense):
        each.eval()
        macs = count_macs(each, Inputs(inputs_of(each), {}))[""]
        counts.append({"parameters": sum(p.numel() for p in each.parameters()), "macs": macs})
    if target != "latency":
        assert 0.2 < counts[0][target] / counts[1][target] <= 0.4
    assert pruning.shrinks == 2


@pytest.mark.parametrize("criterion", [Taylor(), MeanActivation()])
def test_criteria_that_look_at_data(criterion: Any, tmp_path: Path) -> None:
    def make() -> pl.Trainer:
        pruning = ChannelPruning(0.5, criterion, phase=Phase(0.1, 0.5), steps=2, scope="local", round_to=2)
        return make_trainer(tmp_path, callbacks=[SeedEachBatch(), pruning, SaveAfter(tmp_path, (5, 9))])

    module, trainer = make_module("mlp"), make()
    trainer.fit(module)
    assert module.net[0].weight.shape == (16, 16)
    assert module.net[3].weight.shape == (16, 16)
    for batches in (5, 9):
        again, trainer_again = make_module("mlp"), make()
        trainer_again.fit(again, ckpt_path=tmp_path / f"{batches}.ckpt", weights_only=True)
        assert not differences(snapshot(trainer, module), snapshot(trainer_again, again))


def test_each_layer_can_have_a_share_of_its_own(tmp_path: Path) -> None:
    module = make_module("mlp")
    pruning = ChannelPruning(0.25, phase=Phase(0.2, 0.5), steps=2, scope="local", targets={"net.0": 0.75})
    make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    assert [module.net[i].out_features for i in (0, 3, 5)] == [8, 24, 4]
    assert (module.net[3].in_features, module.net[5].in_features) == (8, 24)


@pytest.mark.parametrize(("round_to", "said"), [(1, True), (8, False)])
def test_widths_that_kernels_are_not_made_for_are_named(
    round_to: int, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pruning = ChannelPruning(0.35, phase=Phase(0.2, 0.5), scope="local", round_to=round_to)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    make_trainer(tmp_path, callbacks=[pruning]).fit(make_module("mlp"))
    logger.removeHandler(caplog.handler)
    assert "channels left" in caplog.text
    assert (re.search(r"Widths such as \d+(, \d+)* may run no faster", caplog.text) is not None) == said


def test_a_share_of_a_layer_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    module = make_module("mlp")
    pruning = ChannelPruning(0.5, scope="local", targets={"tail": 0.5})
    with pytest.raises(ValueError, match=r"targets\['tail'\] matches no layer.*net.0, net.3"):
        make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    assert module.trainer.global_step == 0


def test_a_phase_that_ends_with_the_run_reaches_its_target(tmp_path: Path) -> None:
    pruning = ChannelPruning(0.5, phase=Phase(0.5, 1.0), steps=3)
    module = make_module("mlp")
    make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    assert pruning.shrinks == 3
    assert sum(pruning.progress.left.values()) == 32


def test_the_best_checkpoint_is_a_small_one(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    module = make_module("mlp")
    make("channels", tmp_path, best, enable_checkpointing=True).fit(module)
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert {name: tuple(value.shape) for name, value in saved.items()} == shapes(module)
    assert "check_monitor_top_k" not in best.__dict__


def test_a_second_fit_keeps_what_was_removed(tmp_path: Path) -> None:
    module, trainer = make_module("mlp"), make("channels", tmp_path)
    trainer.fit(module)
    before = shapes(module)
    trainer.fit_loop.max_epochs += 2
    trainer.fit(module)
    assert shapes(module) == before


def test_optimizers_that_cannot_follow_are_refused(tmp_path: Path) -> None:
    module = make_module("mlp")
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    with pytest.raises(ValueError, match="keeps state that cannot shrink with its parameters"):
        make_trainer(tmp_path, callbacks=[ChannelPruning()]).fit(module)


def test_an_example_input_array_stands_in_for_validation_data(tmp_path: Path) -> None:
    module = make_module("mlp")
    module.example_input_array = module.tensors()[0]
    module.val_dataloader = None
    pruning = ChannelPruning(0.5, phase=Phase(0.2, 0.5))
    make_trainer(tmp_path, callbacks=[pruning]).fit(module)
    assert pruning.shrinks == 1
    bare = make_module("mlp")
    bare.val_dataloader = None
    found_in_training = ChannelPruning(0.5, phase=Phase(0.2, 0.5))
    make_trainer(tmp_path, callbacks=[found_in_training]).fit(bare)
    assert found_in_training.stands() == pruning.stands()


def test_more_blocks_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only 1 blocks can be removed together.*net\.3"):
        make_trainer(tmp_path, callbacks=[LayerPruning(2, max_share=1.0)]).fit(make_module("mlp"))
    with pytest.raises(ValueError, match="are: none"):
        make_trainer(tmp_path, callbacks=[LayerPruning()]).fit(make_module("lstm"))


def test_a_checkpoint_of_another_model_is_still_refused(tmp_path: Path) -> None:
    make("channels", tmp_path, SaveAfter(tmp_path, (2, 24))).fit(make_module("mlp"))
    wide = make_module("mlp")
    wide.net[0], wide.net[3] = nn.Linear(16, 48), nn.Linear(48, 32)
    for batches in (2, 24):
        with pytest.raises(ValueError, match="of another structure"):
            make("channels", tmp_path).test(wide, ckpt_path=tmp_path / f"{batches}.ckpt")


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sparsity": (lambda: ChannelPruning(1.0), ValueError, "sparsity=1.0: accepted is a share in 0..1"),
    "steps": (lambda: ChannelPruning(steps=0), ValueError, "steps=0: accepted is a whole number"),
    "targets": (lambda: ChannelPruning(scope="local", targets={"a": 1.0}), ValueError, "accepted is a share in 0..1"),
    "targets of all": (lambda: ChannelPruning(targets={"a": 0.5}), ValueError, "Accepted are target='channels' and"),
    "target": (lambda: ChannelPruning(target="flops"), ValueError, "target='flops': accepted are 'channels'"),
    "scope": (lambda: ChannelPruning(scope="layer"), ValueError, "scope='layer': accepted are 'balanced'"),
    "criterion": (lambda: ChannelPruning(criterion="l1"), TypeError, "criterion='l1': accepted is a Criterion"),
    "num_layers": (lambda: LayerPruning(0), ValueError, "num_layers=0: accepted is a whole number"),
    "max_share": (lambda: LayerPruning(max_share=0.0), ValueError, "max_share=0.0: accepted is a share above 0"),
}


@pytest.mark.parametrize("given", list(REFUSED))
def test_refused(given: str) -> None:
    call, kind, message = REFUSED[given]
    with pytest.raises(kind, match=message):
        call()


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    for callback in (ChannelPruning(include=["x.*"]), ChannelPruning(num_heads={"x": 2}), LayerPruning(exclude=["x"])):
        with pytest.raises(ValueError, match="matches no"):
            make_trainer(tmp_path, callbacks=[callback]).fit(make_module("mlp"))
