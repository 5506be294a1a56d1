"""The levels of a guarded run: which is asked for, which has held, and the way back to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning.pytorch as pl

from lightning_compress.guard_steps import StepPolicy

from .rollback import HeldState, go_back, keep
from .steering import next_level, steered

__all__ = ["Levels"]

_RECOVER = 0.25  # fraction of the run, its last, in which no further step is taken


@dataclass
class Levels:
    """How far a run is compressed, step by step, and the last state that held.

    Args:
        policy: How large the next step is.
        bits: Bits of the weights to try in turn.
        patience: Consecutive judgements that may miss before the way back.
        lever: What is steered in the phase that the run is in, ``"sparsity"`` or ``"bits"``; None before the first.
        asked: The level that is judged next.
        judged: Whether it was, since it is asked for.
        good: The last state that held; None before any.
        num_missed: Consecutive judgements that missed.
    """

    policy: StepPolicy
    bits: Sequence[int]
    patience: int
    lever: str | None = None
    asked: float = 0.0
    judged: bool = True
    good: HeldState | None = field(default=None, repr=False)
    num_missed: int = 0

    def begin_bits(self, bits: float, least: float) -> None:
        """Lower bits from now on; whether those of the user's own scheme hold is not known."""
        self.lever = "bits"
        self.asked = bits
        self.judged = False
        self.good = None
        self.num_missed = 0
        self.policy = StepPolicy(least, least)  # bits have no half steps

    def begin_sparsity(self, trainer: pl.Trainer) -> None:
        """Prune from now on, from the dense model, which was judged."""
        self.lever = "sparsity"
        self.ask(trainer, 0.0)

    def judge(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        value: float,
        drop: Callable[[float], float],
        allowed: float,
        share: float,
    ) -> str:
        """Keep the state or restore the last good one, ask for the next step, and say what became of this one.

        Args:
            trainer: The Trainer of the run.
            pl_module: Its model.
            value: The metric.
            drop: How much worse a value is than the reference.
            allowed: How much worse it may be.
            share: Share of the run that is over; from 1 on nothing is trained any more at this level.
        """
        self.judged = True
        last = share >= 1
        if drop(value) <= allowed:
            self.num_missed = 0
            further = self.good is None or self.good["level"] != self.asked
            if further:
                self.policy.held()
            if further or drop(value) <= drop(self.good["value"]):  # type: ignore[index]
                self.hold(trainer, pl_module, value)
            if not last:
                self.go_on(trainer, share)
            return "holds"
        if self.good is None:  # what the user's own scheme gives: there is nothing to go back to
            return "misses"
        self.num_missed += 1
        if self.num_missed <= self.patience and not last:
            return "misses, may recover"
        if self.good["level"] != self.asked:
            self.policy.missed()
        self.back(trainer, pl_module)
        if not last:
            self.go_on(trainer, share)
        return "misses, is rolled back"

    def hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float) -> None:
        """Keep the state as it is now, at the level that is asked for."""
        state = keep(trainer, pl_module)
        self.good = {"value": value, "level": self.asked, "step": trainer.global_step, "state": state}

    def is_held(self, trainer: pl.Trainer) -> bool:
        """Whether the run is where the last good state was kept, or has none to go back to."""
        return self.good is None or self.good["step"] == trainer.global_step

    def back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return to the last state that held."""
        assert self.good is not None
        go_back(trainer, pl_module, self.good["state"])
        self.num_missed = 0
        self.ask(trainer, self.good["level"])

    def go_on(self, trainer: pl.Trainer, share: float) -> None:
        """Ask for the next step, if the last one holds and another is worth it after this share of the run."""
        assert self.good is not None
        level = self.good["level"]
        further: float | None = None
        if share <= 1 - _RECOVER and self.policy.ready():
            further = next_level(trainer, self.lever, level, self.policy.step, self.bits)
        self.ask(trainer, level if further is None else further)

    def ask(self, trainer: pl.Trainer, level: float) -> None:
        """Steer to a level, which is then judged."""
        self.judged = self.judged and level == self.asked
        self.asked = level
        callback = None if self.lever is None else steered(trainer, self.lever)
        if callback is not None:
            callback.steer(level)

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "kind": self.lever,
            "asked": self.asked,
            "judged": self.judged,
            "good": self.good,
            "num_missed": self.num_missed,
            "pace": asdict(self.policy),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.lever = state_dict["kind"]
        self.asked = state_dict["asked"]
        # A checkpoint of an earlier version lacks it.
        self.judged = state_dict.get("judged", True)
        self.good = state_dict["good"]
        self.num_missed = state_dict["num_missed"]
        self.policy = StepPolicy(**state_dict["pace"])
