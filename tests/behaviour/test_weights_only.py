"""Checkpoints of weights alone, as ``ModelCheckpoint(save_weights_only=True)`` writes them, and those with objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import nn

from lightning_compress import Phase, load_from_checkpoint
from lightning_compress.callbacks import (
    ChannelPruning,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lightning_compress.quantization.model import quantization_of
from lightning_compress.tasks.compose import start

from ..harness import assert_equal_outputs, make_trainer
from .small import Small

EARLY, LATE = Phase(0.1, 0.3), Phase(0.6, 1.0)


def quantization() -> pl.Callback:
    return QuantizationAwareTraining(calibrate=Phase(0.3, 0.6), phase=LATE)


CALLBACKS: dict[str, Callable[[], list[pl.Callback]]] = {
    "channels": lambda: [ChannelPruning(0.5, phase=EARLY)],
    "zeros, and quantized": lambda: [GradualPruning(0.5, phase=EARLY), quantization()],
    "channels, quantized, taught": lambda: [
        ChannelPruning(0.5, phase=EARLY),
        quantization(),
        KnowledgeDistillation(),
    ],
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_checkpoint_of_weights_alone_loads_as_it_was_trained(kind: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_weights_only=True, save_last=True)
    module = Small()
    make_trainer(tmp_path, callbacks=[*CALLBACKS[kind](), checkpoint], enable_checkpointing=True).fit(module)
    saved = torch.load(checkpoint.last_model_path, weights_only=True)
    assert "optimizer_states" not in saved
    loaded = load_from_checkpoint(Small, checkpoint.last_model_path)
    assert_equal_outputs(loaded, module)
    assert (quantization_of(loaded) is not None) == ("quantized" in kind)
    # Lightning's own way: any model, the same callbacks
    again = Small()
    make_trainer(tmp_path, callbacks=CALLBACKS[kind]()).validate(again, ckpt_path=checkpoint.last_model_path)
    assert_equal_outputs(again, module)


def test_quantized_after_training_and_without_a_block(tmp_path: Path) -> None:
    module = Small()
    trainer = make_trainer(
        tmp_path, callbacks=[LayerPruning(1, max_share=1.0, phase=EARLY), PostTrainingQuantization()]
    )
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    loaded = load_from_checkpoint(Small, tmp_path / "x.ckpt")
    assert_equal_outputs(loaded, module)
    assert quantization_of(loaded).enabled


def test_resume_is_refused_by_lightning_in_its_own_words(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[ChannelPruning(0.5, phase=EARLY)])
    trainer.fit(Small())
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="contains only the model"):
        make_trainer(tmp_path, callbacks=[ChannelPruning(0.5, phase=EARLY)]).fit(Small(), ckpt_path=tmp_path / "x.ckpt")


def test_a_checkpoint_that_says_nothing_of_its_shape_is_refused_with_the_reason(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[ChannelPruning(0.5, phase=EARLY)])
    trainer.fit(Small())
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del saved["callbacks"]
    torch.save(saved, tmp_path / "y.ckpt")
    with pytest.raises(ValueError, match=r"y.ckpt' does not fit Small: it holds weights alone.*Save it anew"):
        load_from_checkpoint(Small, tmp_path / "y.ckpt")


class Odd:
    """A loss, a metric, an encoder ..."""


class WithObjects(Small):
    def __init__(self, odd: object = None, act: Any = nn.ReLU) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("odd")
    module = WithObjects(Odd(), nn.GELU)
    trainer = make_trainer(folder, callbacks=[ChannelPruning(0.5, phase=EARLY)])
    trainer.fit(module)
    trainer.save_checkpoint(folder / "odd.ckpt")
    return folder / "odd.ckpt", module


def test_objects_are_loaded_where_the_caller_says_so(odd: Any, tmp_path: Path) -> None:
    path, module = odd
    loaded = load_from_checkpoint(WithObjects, path, weights_only=False, map_location="cpu", strict=True)
    assert_equal_outputs(loaded, module)
    assert isinstance(loaded.hparams.odd, Odd)
    trainer = make_trainer(tmp_path, callbacks=[ChannelPruning(0.5, phase=EARLY)])
    trainer.validate(WithObjects(), ckpt_path=path, weights_only=False)
    teacher = KnowledgeDistillation(path, weights_only=False)
    make_trainer(tmp_path, callbacks=[teacher], max_steps=2).fit(WithObjects())
    assert teacher.reached


def make() -> Small:
    return WithObjects()


def test_the_command_starts_from_such_a_file_where_the_configuration_says_so(odd: Any, tmp_path: Path) -> None:
    path, module = odd
    fields = {"seed": 0, "init_from": str(path), "init_strict": True, "data": None, "trainer": {"_target_": TRAINER}}
    cfg = OmegaConf.create({**fields, "weights_only": False, "model": {"_target_": f"{__name__}.make"}})
    _, model, _ = start(cfg, [], False)
    assert_equal_outputs(model, module)
    cfg.weights_only = None
    with pytest.raises(ValueError, match=r"init_from='.*odd.ckpt' holds more than plain values: .*\['odd'\].*Odd"):
        start(cfg, [], False)


TRAINER = "lightning.pytorch.Trainer"


@pytest.mark.parametrize("call", ["load", "teacher", "resume"])
def test_objects_are_refused_by_name_where_nobody_says_so(call: str, odd: Any, tmp_path: Path) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: load_from_checkpoint(WithObjects, odd[0]),
        "teacher": lambda: make_trainer(tmp_path, callbacks=[KnowledgeDistillation(odd[0])]).fit(WithObjects()),
        "resume": lambda: make_trainer(tmp_path, callbacks=[ChannelPruning(0.5)]).fit(WithObjects(), ckpt_path=odd[0]),
    }
    with pytest.raises(ValueError, match=r"hyper_parameters\['odd'\] is a .*Odd; .*weights_only=False, if you trust"):
        calls[call]()


def test_a_record_that_no_callback_wrote_is_refused_with_the_files_name(odd: Any, tmp_path: Path) -> None:
    saved = torch.load(odd[0], weights_only=False)
    del saved["hyper_parameters"]
    (state,) = (state for state in saved["callbacks"].values() if "structure" in state)
    for damage in ({"attributes": {"head": {"forward": 3}}}, {"shapes": {"a": 3}}, {"removed": [None]}, {"other": {}}):
        state["structure"] = damage
        torch.save(saved, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=r"x.ckpt': the record of its callbacks cannot be used"):
            load_from_checkpoint(WithObjects, tmp_path / "x.ckpt")
