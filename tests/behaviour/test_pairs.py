"""All ordered pairs of callbacks on one small net: the first acts, then the second. Printed as a table."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import load_from_checkpoint
from lightning_compress.callbacks import (
    SET,
    AccuracyGuard,
    ChannelPruning,
    Compressing,
    FineTuning,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.phase import Phase

from ..harness import assert_equal_outputs, differences
from ..nightly import nightly
from .small import Small, facts, fit, make

FIRST, SECOND = Phase(0.1, 0.4), Phase(0.5, 0.8)
SAVED = (5, 9, 13)  # of 20 steps: in the first phase, between the two, in the second; none ends an epoch


def quantize(phase: Phase) -> QuantizationAwareTraining:
    middle = phase.begin + (phase.end - phase.begin) / 3
    return QuantizationAwareTraining("w4a8", Phase(phase.begin, middle), Phase(middle, phase.end), freeze=0.5)


CALLBACKS: dict[str, Callable[[Phase], Any]] = {
    "GradualPruning": lambda phase: GradualPruning(0.5, phase=phase, every=2),
    "RigL": lambda phase: RigL(0.5, phase=phase, every=2),
    "SET": lambda phase: SET(0.5, phase=phase, every=2),
    "ChannelPruning": lambda phase: ChannelPruning(0.4, phase=phase, steps=2),
    "LayerPruning": lambda phase: LayerPruning(1, max_share=1.0, phase=phase),
    "QuantizationAwareTraining": quantize,
    "PostTrainingQuantization": lambda phase: PostTrainingQuantization("w4a8", phase),
    "FineTuning": lambda phase: FineTuning(phase, 0.5),
    "KnowledgeDistillation": lambda phase: KnowledgeDistillation(alpha=0.5, phase=phase),
    "AccuracyGuard": lambda phase: AccuracyGuard(100.0, bits=(3, 2)),
}
PRUNE, REGROW = ("GradualPruning", "RigL", "SET"), ("RigL", "SET")
NO_WAY_BACK = ("RigL", "SET", "ChannelPruning", "LayerPruning", "PostTrainingQuantization")
QUANTIZE = ("QuantizationAwareTraining", "PostTrainingQuantization")
# only one of each can be in a Trainer, in Lightning's own words
ONCE = (*QUANTIZE, "KnowledgeDistillation", "AccuracyGuard")


def why_not(pair: tuple[str, str]) -> str | None:
    """What two callbacks are refused with, if they are."""
    if pair[0] == pair[1] and pair[0] in ONCE:
        return f"Found more than one stateful callback of type `{pair[0]}`"
    if set(pair) == set(QUANTIZE):
        return "both quantize the same layers"
    if "AccuracyGuard" in pair and set(pair) & set(NO_WAY_BACK):
        return "it cannot take back what that does"
    if set(pair) == {"AccuracyGuard", "FineTuning"}:  # alone, it prunes all along
        return "prune .* and fine-tune .* overlap"
    if all(name in PRUNE for name in pair) and set(pair) & set(REGROW):
        return "prunes the same layers"
    return None


def assert_reached(module: Small, callbacks: list[Any]) -> None:
    """Each target is one of the model as it stands; asked of the model itself, too."""
    found = facts(module)
    guard = next((c for c in callbacks if isinstance(c, AccuracyGuard)), None)
    # a weight that was let grow stays at zero where no gradient reaches it
    tolerance = 0.01 if any(isinstance(c, SET | RigL) for c in callbacks) else 1e-6
    for callback in callbacks:
        if not isinstance(callback, Compressing):
            continue
        assert callback.reached
        assert callback.stands().keys() == callback.asked().keys()
        for key, asked in callback.asked().items():
            stands = callback.stands()[key]
            if guard is not None:  # as far as it lets it
                assert stands == pytest.approx(guard.level[key], abs=0.001)
                assert 0 < stands <= asked
            elif key == "bits":
                assert stands == asked
            elif key == "exchanged weights":
                assert stands >= asked
            else:  # or, of 60 channels and 1,300 weights, a little more
                assert asked <= stands < asked + 0.06
            if key == "sparsity":
                assert stands - 1e-6 < found["sparsity"] < stands + tolerance
    assert found["blocks"] == 3 - sum(isinstance(c, LayerPruning) for c in callbacks)
    assert found["quantized"] == any(
        isinstance(c, QuantizationAwareTraining | PostTrainingQuantization) for c in callbacks
    )


def pairs() -> list[Any]:
    """All ordered pairs; of two callbacks that are not refused, ``make test`` tries one order, either one as often."""
    names = list(CALLBACKS)
    found = []
    for (i, first), (j, second) in product(enumerate(names), repeat=2):
        is_left = (i + j) % 2 == (i < j) and why_not((first, second)) is None and i != j
        found.append(pytest.param(first, second, marks=[nightly] if is_left else []))
    return found


@pytest.mark.parametrize(("first", "second"), pairs())
def test_pair(first: str, second: str, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    """Targets of both, the best checkpoint, a load, and bit-identical resumes; or a refusal before training."""

    def callbacks() -> list[Any]:
        return [CALLBACKS[first](FIRST), CALLBACKS[second](SECOND)]

    record_property("pair", [first, second])
    refused = why_not((first, second))
    if refused is not None:
        record_property("refused", refused)
        with pytest.raises((ValueError, RuntimeError), match=refused) as error:
            fit(tmp_path, make(), *callbacks(), saved=(1,), max_epochs=5)
        assert re.search(r"Accepted|follow each other|more than one", str(error.value))
        assert not (tmp_path / "1.ckpt").exists()  # it was refused before the first step
        return

    module, both = make(), callbacks()
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    trainer = fit(tmp_path, module, *both, checkpoint, saved=SAVED, max_epochs=5)
    assert_reached(module, both)

    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = load_from_checkpoint(Small, tmp_path / "end.ckpt")
    assert facts(loaded) == facts(module)
    assert_equal_outputs(loaded, module)

    best = facts(load_from_checkpoint(Small, checkpoint.best_model_path))
    if "PostTrainingQuantization" in (first, second):  # it quantizes when the last checkpoint has been saved
        assert not best["quantized"]
        best["quantized"] = True
    assert {**best, "sparsity": None} == {**facts(module), "sparsity": None}
    pruned = [c.asked()["sparsity"] for c in both if isinstance(c, GradualPruning)]
    assert best["sparsity"] >= max(pruned, default=0.0) or "AccuracyGuard" in (first, second)

    def left(trainer: Any, module: Small, callbacks: list[Any]) -> Any:
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        return module.state_dict(), optimizers, [callback.state_dict() for callback in callbacks]

    for step in SAVED:
        resumed, again = make(), callbacks()
        best_again = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
        run = fit(tmp_path, resumed, *again, best_again, ckpt_path=tmp_path / f"{step}.ckpt", max_epochs=5)
        assert not differences(left(trainer, module, both), left(run, resumed, again)), step


@pytest.mark.parametrize("pair", [("ChannelPruning", "GradualPruning"), ("LayerPruning", "ChannelPruning")])
def test_the_order_in_the_list_is_of_no_account(pair: tuple[str, str], tmp_path: Path) -> None:
    modules = []
    for turn in (1, -1):
        both = [CALLBACKS[pair[0]](FIRST), CALLBACKS[pair[1]](SECOND)]
        modules.append(make())
        fit(tmp_path, modules[-1], *both[::turn], max_epochs=5)
        assert_reached(modules[-1], both)
    assert facts(modules[0]) == facts(modules[1])
