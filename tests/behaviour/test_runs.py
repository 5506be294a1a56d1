"""Any run: a target is reached, refused before the first step, or reported as missed. There is no fourth kind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_compress import load_from_checkpoint
from lightning_compress.callbacks.verdict import targets_of

from .situations import CALLBACKS, SITUATIONS, run
from .small import Small, facts

# What a model is when a target is reached, whatever the callback says.
REACHED = {
    "GradualPruning": lambda found: found["sparsity"] >= 0.5,
    "RigL": lambda found: found["sparsity"] >= 0.45,
    "SET": lambda found: found["sparsity"] >= 0.45,
    "ChannelPruning": lambda found: found["parameters"] < found["most"],
    "LayerPruning": lambda found: found["blocks"] == 2,
    "QuantizationAwareTraining": lambda found: found["quantized"],
    "PostTrainingQuantization": lambda found: found["quantized"],
    "KnowledgeDistillation": lambda found: True,
}


class Steps(pl.Callback):
    """How many optimizer steps were begun."""

    num = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.num += 1


def outcome(name: str, situation: str, folder: Path) -> str:
    """How a run ended; raises where it ended in no known way."""
    trainer, module = run(name, SITUATIONS[situation], folder)
    trainer.callbacks.append(steps := Steps())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, **SITUATIONS[situation].data())
        except (ValueError, TypeError) as error:
            refused = str(error)
        except SystemExit:
            refused = ""
        else:
            refused = ""
    if refused:
        assert steps.num == 0, f"refused in the middle of the run: {refused}"
        assert name in refused or "Phase(" in refused
        assert any(word in refused.lower() for word in ("accepted", "set ", "train "))
        return "refused"
    most = SITUATIONS[situation].parameters
    found = judged(name, trainer, module, [str(warning.message) for warning in caught], most)
    if found == "reached":
        check_written(name, trainer, module, folder, most)
    return found


def check_written(name: str, trainer: pl.Trainer, module: Small, folder: Path, most: int) -> None:
    """What is written, and loaded without a Trainer, is the very same model."""
    trainer.save_checkpoint(folder / "end.ckpt")
    loaded = load_from_checkpoint(type(module), folder / "end.ckpt")
    assert REACHED[name](facts(loaded) | {"most": most})
    theirs = loaded.state_dict()
    for key, value in module.state_dict().items():
        assert torch.equal(value.float(), theirs[key].float()), f"{key} is another in the checkpoint"


def judged(name: str, trainer: pl.Trainer, module: Small, texts: list[str], most: int) -> str:
    rows = [row for row in targets_of(trainer) if row["callback"] == name]
    assert rows
    told = [text for text in texts if text.startswith(f"{name}: target not reached")]
    missed = [row for row in rows if row["missed"]]
    assert len(told) == len(missed)
    if missed:
        assert all(row["because"] for row in missed)
        return "missed"
    assert REACHED[name](facts(module) | {"most": most}), f"{name} says that it has reached its target: {facts(module)}"
    return "reached"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every kind of run with every callback; of what else holds the weights a part, unless ``--full`` is given."""
    if metafunc.function is test_run:
        full = metafunc.config.getoption("--full")
        cells = [(name, situation) for situation in SITUATIONS for name in CALLBACKS]
        metafunc.parametrize("name, situation", cells if full else thinned(cells))


def thinned(cells: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of the kinds that are thinned two callbacks each, others for the next kind."""
    kinds = [situation for situation, found in SITUATIONS.items() if found.thinned]
    chosen = {
        (name, kind)
        for i, kind in enumerate(kinds)
        for j, name in enumerate(CALLBACKS)
        # those that mask in one half, those that shrink or quantize in the other
        if j % 4 == i % 4
    }
    return [(name, kind) for name, kind in cells if kind not in kinds or (name, kind) in chosen]


def test_a_thinned_table_has_every_kind_and_every_callback() -> None:
    cells = [(name, situation) for situation in SITUATIONS for name in CALLBACKS]
    chosen = thinned(cells)
    assert {situation for _, situation in chosen} == set(SITUATIONS)
    for name in CALLBACKS:
        assert sum(SITUATIONS[situation].thinned for callback, situation in chosen if callback == name) >= 5
    assert len(chosen) < 0.7 * len(cells)


def test_run(name: str, situation: str, tmp_path: Path, record_property: Any) -> None:
    found = outcome(name, situation, tmp_path)
    record_property("run", (name, situation, found))
    assert found == SITUATIONS[situation].but.get(name, SITUATIONS[situation].ends)
