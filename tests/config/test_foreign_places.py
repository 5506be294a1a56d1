"""Hydra applications that keep their callbacks elsewhere than at ``callbacks``: ``+compression=`` works there, too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ..processes import in_a_process

APPLICATION = """
import hydra
import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.demos.boring_classes import BoringModel


class Net(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))


@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    callbacks = PLACE
    callbacks = list(callbacks.values()) if hasattr(callbacks, "values") else list(callbacks)
    trainer = pl.Trainer(max_steps=20, limit_val_batches=2, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, default_root_dir="runs", accelerator="cpu",
                         callbacks=[instantiate(callback) for callback in callbacks if callback])
    module = Net()
    trainer.fit(module)
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    print("zeros", int((module.layer.weight == 0).sum()), "pruned by", kinds.count("GradualPruning"))


main()
"""
SUMMARY = "{_target_: lightning.pytorch.callbacks.ModelSummary}"
PRUNE = ["callbacks.prune.sparsity=.5", "callbacks.prune.phase.begin=0", "~callbacks.export"]


def call(folder: Path, config: str, place: str, *words: str) -> tuple[str, int]:
    (folder / "app.yaml").write_text(config)
    (folder / "app.py").write_text(APPLICATION.replace("PLACE", place))
    return in_a_process(["app.py", *words, "hydra.run.dir=."], folder, dict(os.environ))


@pytest.mark.parametrize(
    ("config", "place", "choice"),
    [
        (f"trainer: {{callbacks: {{summary: {SUMMARY}}}}}", "cfg.trainer.callbacks", "+compression=magnitude"),
        (f"trainer: {{callbacks: [{SUMMARY}]}}", "cfg.trainer.callbacks", "+compression=[magnitude,finetune]"),
        ("trainer: {}", "[]", "+compression=magnitude"),
        ("callbacks: null", "cfg.callbacks", "+compression=magnitude"),
        ("callbacks: {}", "cfg.callbacks", "+compression=[magnitude,finetune]"),
    ],
    ids=["mapping of the Trainer", "list of the Trainer", "none", "null", "callbacks"],
)
def test_a_recipe_reaches_the_trainer(tmp_path: Path, config: str, place: str, choice: str) -> None:
    text, code = call(tmp_path, config, place, choice, *PRUNE)
    assert code == 0, text[-3000:]
    assert "zeros 32 pruned by 1" in text  # of 64 weights


def test_a_place_of_its_own(tmp_path: Path) -> None:
    config, place = f"trainer: {{callbacks: {{summary: {SUMMARY}}}}}", "cfg.trainer.callbacks"
    words = [word.replace("callbacks.", "trainer.callbacks.") for word in PRUNE]
    text, code = call(tmp_path, config, place, "+compression@trainer.callbacks=magnitude", *words)
    assert code == 0, text[-3000:]
    assert "zeros 32 pruned by 1" in text


def test_callbacks_in_a_list_are_refused(tmp_path: Path) -> None:
    """Hydra merges no mapping into a list: the variable needs no place."""
    text, code = call(tmp_path, f"callbacks: [{SUMMARY}]", "cfg.callbacks", "+compression=magnitude")
    assert code == 1
    assert "Cannot merge DictConfig with ListConfig" in text
    assert "zeros" not in text


def test_nothing_is_added_without_a_choice(tmp_path: Path) -> None:
    text, code = call(tmp_path, "callbacks: {}", "cfg.callbacks")
    assert code == 0, text[-3000:]
    assert "pruned by 0" in text
