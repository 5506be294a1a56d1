"""What the behaviour matrix excuses, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from .. import harness
from ..harness import NotOnThisCPU, assert_fails_alike, make_module, make_trainer
from ..zoo import MLP


class NoBf16(MLP):
    """Fails in bf16 as an LSTM does where oneDNN has no kernel for it."""

    words = "could not create a primitive descriptor"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.precision == "bf16-mixed":
            raise RuntimeError(f"{self.words}\nfor the LSTM")
        return super().training_step(batch, batch_idx)


class Fails(pl.Callback):
    """A callback with a fault of its own."""

    def __init__(self, words: str) -> None:
        self.words = words

    def on_train_start(self, *_: Any) -> None:
        raise RuntimeError(self.words)


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(harness.MODULES, "no-bf16", NoBf16)


def fit(folder: Path, *callbacks: pl.Callback, **options: Any) -> None:
    def train(*given: pl.Callback) -> None:
        make_trainer(folder, callbacks=list(given), **options).fit(make_module("no-bf16"))

    try:
        train(*callbacks)
    except RuntimeError as error:
        assert_fails_alike(error, train)


def test_what_the_plain_module_cannot_do_is_not_on_this_cpu(tmp_path: Path) -> None:
    with pytest.raises(NotOnThisCPU, match="without callbacks too: RuntimeError: could not create a primitive desc"):
        fit(tmp_path, precision="bf16-mixed")


@pytest.mark.parametrize("words", [NoBf16.words, "a fault of ours"])
def test_a_fault_of_a_callback_is_not_excused(words: str, tmp_path: Path) -> None:
    """Neither where the plain module trains, in whatever words, nor where it fails in other words."""
    with pytest.raises(RuntimeError, match=words):
        fit(tmp_path, Fails(words))
    with pytest.raises(RuntimeError, match=f"^{words}$"):
        fit(tmp_path, Fails(words), precision="bf16-mixed")
