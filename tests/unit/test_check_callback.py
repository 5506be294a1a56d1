"""The contract check of compressing callbacks: passes what keeps the contract, names what breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_compress.callbacks import (
    SET,
    ChannelPruning,
    Compressing,
    GradualPruning,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.phase import Phase
from lightning_compress.pruning import MeanActivation
from lightning_compress.testing import check_callback
from lightning_compress.testing.callback import _MEMBERS

OURS: dict[str, Callable[[], Any]] = {
    "GradualPruning": lambda: GradualPruning(0.5, phase=Phase(0.2, 0.8), every=2),
    "goes back over the end of its phase": lambda: GradualPruning(0.5, phase=Phase(0.2, 0.6), every=2),
    "observing": lambda: GradualPruning(0.5, MeanActivation(), phase=Phase(0.2, 0.5), every=2),
    "observing for long": lambda: GradualPruning(0.5, MeanActivation(), phase=Phase(0.2, 0.8), every=2),
    "RigL": lambda: RigL(0.5, every=2),
    "SET": lambda: SET(0.5, every=2),
    "ChannelPruning": lambda: ChannelPruning(0.4, phase=Phase(0.2, 0.8), steps=3),
    "LayerPruning": lambda: LayerPruning(1, max_share=1.0, phase=Phase(0.2, 0.8)),
    "PostTrainingQuantization": lambda: PostTrainingQuantization("int8", Phase(0.2, 0.8)),
    "QuantizationAwareTraining": lambda: QuantizationAwareTraining("int4", Phase(0.2, 0.4), Phase(0.4, 1.0)),
}


@pytest.mark.parametrize("name", list(OURS))
def test_ours_keep_the_contract(name: str) -> None:
    check_callback(OURS[name]())


class Faint(pl.Callback):
    """A user's own: it halves the weights of the head once, and remembers each channel's mean."""

    compresses = gate_checkpoints = True

    def __init__(self) -> None:
        self.reached = False
        self.means: torch.Tensor | None = None

    def phases(self) -> list[tuple[str, Phase]]:
        return [("halve", Phase(0.8, 0.8))]

    def asked(self) -> dict[str, Any]:
        return {"size": 0.5}

    def stands(self) -> dict[str, Any]:
        return {"size": 0.5 if self.reached else 1.0}

    def follow(self, pl_module: Any, record: Any) -> None:
        self.means = None

    def keep(self) -> dict[str, Any] | None:
        return self.state_dict()

    def go_back(self, pl_module: Any, kept: dict[str, Any]) -> None:
        self.load_state_dict(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached, "means": self.means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reached, self.means = state_dict["reached"], state_dict["means"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        means = pl_module.blocks[0].a.weight.detach().mean(1)
        self.means = means if self.means is None else (self.means + means) / 2
        if trainer.global_step == 16:
            self.reached = True
            with torch.no_grad():
                pl_module.head.weight.mul_(1 - self.means.abs().mean())


def test_a_callback_of_ones_own_keeps_the_contract() -> None:
    assert isinstance(Faint(), Compressing)
    check_callback(Faint())


class Turned(Faint):
    """What it keeps is the same, under names in another order after a resume."""

    turned = False

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return dict(reversed(state.items())) if self.turned else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.turned = True


def test_the_order_of_what_is_kept_is_of_no_account() -> None:
    check_callback(Turned())


def broken(**members: Any) -> Any:
    return type("Broken", (Faint,), members)()


def forgets(self: Any, state_dict: Any) -> None:
    self.means = None


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"compresses": False}, r"Broken.compresses is False, not True"),
        ({"gate_checkpoints": None}, r"Broken.gate_checkpoints is None, neither True nor False"),
        ({"phases": lambda self: ["halve"]}, r"Broken.phases gives \['halve'\], no pairs"),
        ({"phases": lambda self: []}, r"Broken.phases gives \[\], no pairs"),
        ({"phases": lambda self: [("a", Phase(0, 90, "step"))]}, r"beyond a run of 5 epochs of 4 steps"),
        ({"asked": lambda self: {}}, r"Broken.asked gives nothing before a run"),
        ({"asked": lambda self: {"size": torch.ones(1)}}, r"Broken.asked gives .* no plain values by name"),
        ({"stands": lambda self: {"bits": 8}}, r"Broken.stands names \['bits'\] .* where asked names \['size'\]"),
        ({"stands": lambda self: 1 / 0}, r"stands and .reached before a run raised ZeroDivisionError"),
        ({"on_train_batch_end": lambda self, *_: None}, r"Broken.reached is False when the run is over"),
        ({"load_state_dict": forgets}, r"a resumed run ends with other weights"),
        ({"follow": lambda self, *_: None}, r"in which the model loses channels raised RuntimeError"),
        ({"go_back": lambda self, *_: None}, r"Broken.go_back: it then keeps something else"),
        ({"state_dict": lambda self: {"reached": self.reached, "means": nn.Linear}}, r"Broken.* raised .*"),
    ],
)
def test_what_breaks_the_contract_is_named(members: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_callback(broken(**members))


@pytest.mark.parametrize("member", _MEMBERS)
def test_each_member_of_the_protocol_is_asked_for(member: str) -> None:
    """The check spells the members out; the protocol is what they are."""
    lacking = type("Lacking", (pl.Callback,), {n: getattr(Faint, n, False) for n in _MEMBERS if n != member})()
    assert not isinstance(lacking, Compressing)
    with pytest.raises(AssertionError, match=f"Lacking has no {member}"):
        check_callback(lacking)
