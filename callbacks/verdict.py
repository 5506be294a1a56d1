"""How a run ends: what was asked of each callback, what stands, and why it is less; and what waits until all stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_compress.analysis.report import Target, describe_missed
from lightning_compress.phase import Clock

from .gates import hold_back, let_go
from .protocol import Concluding, Explaining, Exporting, Phased, Steerable, Targeted, all_callbacks, targeted
from .report_sinks import send_targets
from .run import is_launched, read_clock

__all__ = ["TargetMissed", "Verdict", "end_with_verdict", "targets_of"]


class TargetMissed(Exception):
    """A target that was not reached, of a callback with ``strict=True``; raised when ``fit`` ends."""


def end_with_verdict(trainer: pl.Trainer) -> None:
    """Let a run end with a verdict; to call in ``setup``, by every callback with a target."""
    callbacks = all_callbacks(trainer)
    if not any(isinstance(callback, Verdict) for callback in callbacks):
        # Last of all: what others do when training ends counts, and an error comes when all has been saved.
        callbacks.append(Verdict())


def targets_of(trainer: pl.Trainer) -> list[Target]:
    """The targets of the run that is over, as they were judged."""
    return [row for callback in all_callbacks(trainer) if isinstance(callback, Verdict) for row in callback.targets]


class Verdict(pl.Callback):
    """Judges all targets when ``fit`` ends, however it ends; a run gets one from the callbacks that have targets.

    A target that was not reached is a warning, a row of the report, the metric ``compress/targets_missed`` in every
    logger, and an error if its callback is strict. Until all targets are reached, ModelCheckpoint and EarlyStopping
    wait.

    Raises:
        TargetMissed: Out of ``Trainer.fit``, after all checkpoints and files are written.
    """

    leaves = ("targets", "_broken")

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self._broken: list[str] = []  # what strict callbacks missed
        self._judged: set[int] = set()  # those that were, by id
        self._names: set[str] = set()  # of the weights, as the process that launched this one has them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See the model before its own hooks do."""
        self._names = set(pl_module.state_dict())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew, and let what would keep or end a run too early wait."""
        if is_launched(trainer):
            _check_names(pl_module, self._names)
        self.targets = []
        self._broken = []
        self._judged = set()
        hold_back(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge, while those that steer others still do; what writes files has yet to do so."""
        self._judge(trainer, None, written=False)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge files, and a run that took no step; tell the loggers."""
        let_go(trainer)
        self._judge(trainer, None)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                send_targets(logger, self.targets, trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Judge what a user or a cluster interrupted; after Ctrl-C also conclude, for Lightning tears nothing down."""
        let_go(trainer)
        if isinstance(exception, KeyboardInterrupt | SIGTERMException):
            self._judge(trainer, exception)
        # A cluster gives a process seconds; a user waits.
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step:
            for callback in all_callbacks(trainer):
                if isinstance(callback, Concluding):
                    callback.conclude(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise for those that are strict; judge a run that another callback has ended in its own way.

        What writes files has done so by now in ``trainer.validate``, too.
        """
        if stage == "validate":
            self.targets = []
            self._broken = []
            self._judged = {id(c) for c in targeted(trainer) if not isinstance(c, Exporting)}
            self._judge(trainer, None)
            self.raise_missed()
        if stage == "fit":
            self._judge(trainer, None)
            if not is_launched(trainer):
                self.raise_missed()

    def raise_missed(self) -> None:
        """Raise for those that are strict; of a launched run in the process that launched it, which has the model then.

        Raises:
            TargetMissed: If one of them has missed its target.
        """
        if self._broken:
            raise TargetMissed(" ".join(self._broken))

    def _judge(self, trainer: pl.Trainer, exception: BaseException | None, written: bool = True) -> None:
        clock = read_clock(trainer, 0)
        ending = _ending(trainer, clock, exception)
        for callback in targeted(trainer):
            if id(callback) in self._judged or (isinstance(callback, Exporting) and not written):
                continue
            self._judged.add(id(callback))
            rows = _judge(callback, clock, ending)
            missed = [describe_missed(row) for row in rows if row["missed"]]
            self.targets += rows
            for text in missed:
                rank_zero_warn(text)
            if getattr(callback, "strict", False):
                self._broken += missed


def _check_names(pl_module: pl.LightningModule, names: set[str]) -> None:
    """Refuse weights that the process which launched this one lacks, and could not take back."""
    made = sorted(pl_module.state_dict().keys() - names)
    if made and not is_overridden("configure_model", pl_module):
        raise ValueError(
            f"strategy='ddp_spawn', 'ddp_fork' or 'ddp_notebook': {type(pl_module).__name__}.setup makes "
            f"{', '.join(made[:5])} in the processes that the Trainer launches, and the model of the process in which "
            "fit was called would lack them. Accepted are layers that are made in __init__ or configure_model. Make "
            "them there, or train with Trainer(strategy='ddp') from a script."
        )


def _judge(callback: Targeted, clock: Clock, ending: str) -> list[Target]:
    """What was asked of a callback, what stands, and why that is less."""
    asked = dict(callback.asked())
    stands = callback.stands()
    missed = _shortfalls(callback, asked)
    if isinstance(callback, Steerable) and callback.goal is not None:
        # What another asks of it, such as a guard, takes the place of what its user did.
        asked[callback.lever] = callback.goal
    return [
        Target(
            callback=type(callback).__name__,
            target=name,
            asked=value,
            reached=stands[name],
            missed=name in missed,
            because=missed.get(name, "") or (_unfinished(callback, clock, ending) if name in missed else ""),
        )
        for name, value in asked.items()
    ]


def _shortfalls(callback: Targeted, asked: Mapping[str, float | str]) -> Mapping[str, str]:
    if isinstance(callback, Explaining):
        return callback.shortfalls()
    return {} if callback.reached else dict.fromkeys(asked, "")


def _ending(trainer: pl.Trainer, clock: Clock, exception: BaseException | None) -> str:
    """How the run ended, in words."""
    step = f"at step {clock.step}"
    if clock.step < clock.total_steps < float("inf"):
        step = f"{step} of {clock.total_steps:g}"
    if exception is not None:
        return f"the run was interrupted {step}"
    if trainer.should_stop:
        return f"{_stopper(all_callbacks(trainer))} ended the run {step}"
    return f"the run ended {step}"


def _stopper(callbacks: Sequence[pl.Callback]) -> str:
    """What told the Trainer to stop."""
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return type(callback).__name__
        if isinstance(callback, Timer) and (callback.time_remaining() or 0.0) <= 0:
            return "max_time"
    return "trainer.should_stop"


def _unfinished(callback: Targeted, clock: Clock, ending: str) -> str:
    """Why a callback did not come to its end: the run was over before its phases were."""
    phases = callback.phases() if isinstance(callback, Phased) else []
    for name, phase in phases:
        progress = phase.progress(clock)
        if progress < 0:
            return f"{ending}, before {name!r} began ({phase})"
        if progress < 1:
            return f"{ending}, {progress:.0%} into {name!r} ({phase})"
    return ending
