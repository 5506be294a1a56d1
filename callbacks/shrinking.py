"""What the callbacks that remove structure share: when they shrink the model, and on what data."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, NoReturn, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.checks import check_flag, check_instance, check_names, first_line
from lightning_compress.copies import forget_graphs
from lightning_compress.phase import Clock, Phase
from lightning_compress.pruning import Criterion, Magnitude, Observation
from lightning_compress.pruning.prunable import check_finite
from lightning_compress.pruning.scoring import scorable_layers, scores_by_tensor
from lightning_compress.structure.mirrors import check_mirrors
from lightning_compress.structure.optimizers import check_optimizer
from lightning_compress.structure.progress import Progress
from lightning_compress.structure.record import Record, apply_record, structure_of

from .examples import Calls, example_calls, in_single_precision
from .live_shape import CutError, check_strategy, check_structure_on_load, tell
from .protocol import State
from .raw_layers import know_layers
from .rehearsal import why_it_fails
from .run import check_run, on_rank_zero, read_clock, tell_left_alone
from .verdict import end_with_verdict

__all__ = ["Shrinking"]

P = TypeVar("P", bound=Progress)

_ROUNDING = 1e-6  # of shares that were counted


class _Shrink(NamedTuple):
    """What rank zero found, and all others are told."""

    record: Record
    progress: Any
    skipped: dict[str, str]
    macs: int
    macs_left: int


class Shrinking(pl.Callback, ABC, Generic[P]):
    """Base class of the callbacks that remove structure during fit; a subclass says what to remove."""

    compresses = True
    progress_class: ClassVar[type[Any]]
    steps = 1

    def __init__(
        self,
        criterion: Criterion | None,
        phase: Phase | None,
        include: Sequence[str],
        exclude: Sequence[str],
        gate_checkpoints: bool,
        gate_stopping: bool,
        strict: bool,
    ) -> None:
        check_names(f"{type(self).__name__}.include", include)
        check_names(f"{type(self).__name__}.exclude", exclude)
        for field, flag in (
            ("gate_checkpoints", gate_checkpoints),
            ("gate_stopping", gate_stopping),
            ("strict", strict),
        ):
            check_flag(f"{type(self).__name__}.{field}", flag)
        self.criterion = Magnitude() if criterion is None else criterion
        self.phase = Phase(0.1, 0.3) if phase is None else phase
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.gate_checkpoints = gate_checkpoints
        self.gate_stopping = gate_stopping
        self.strict = strict
        for name, kind in (("criterion", Criterion), ("phase", Phase)):
            accepted = f"a {kind.__name__}, an object of that class and not its name"
            check_instance(f"{type(self).__name__}.{name}", getattr(self, name), kind, accepted)
        self.skipped: dict[str, str] = {}
        self.shrinks = 0
        self.failed = ""  # why the last shrink was undone
        self.progress: P | None = None  # None before anything was looked at
        self._inside = False
        self._calls = Calls({})
        self._module: pl.LightningModule | None = None
        self._state: State | None = None
        self._observation: Observation | None = None

    @abstractmethod
    def phases(self) -> list[tuple[str, Phase]]:
        """Its phase with its name."""

    @abstractmethod
    def asked(self) -> dict[str, float]:
        """How much is to be removed."""

    @abstractmethod
    def find(self, model: nn.Module) -> tuple[P, dict[str, str]]:
        """What could be removed of a float copy, and what is left alone, with the reason."""

    @abstractmethod
    def choose(
        self, model: nn.Module, progress: P, scores: Mapping[str, Tensor], share: float
    ) -> tuple[Record, P, dict[str, str]]:
        """What to remove of a float copy, the progress that makes, and what is left alone, with the reason.

        Args:
            model: The copy.
            progress: The progress so far.
            scores: The criterion's scores, by the name of the weight's tensor.
            share: Part of what is asked that is due by now, 0..1.
        """

    @abstractmethod
    def summary(self, record: Record, progress: P) -> str:
        """What a shrink did, in words."""

    @property
    def reached(self) -> bool:
        """Whether all is removed that will be."""
        return self.shrinks >= self.steps

    def stands(self) -> dict[str, float]:
        """How much has been removed."""
        stands = {} if self.progress is None else self.progress.stands
        return dict.fromkeys(self.asked(), 0.0) | stands

    def shortfalls(self) -> dict[str, str]:
        """What of it could not be removed, or is not removed yet."""
        asked = self.asked()
        if not self.reached:
            waits = self._observation is not None and not self._observation.ready
            return dict.fromkeys(asked, f"{self.criterion} had seen nothing of the layers" if waits else "")
        stands = self.stands()
        if self.failed:
            return {name: self.failed for name, value in asked.items() if stands[name] < value - _ROUNDING}
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
        why = f"no more can be removed{f' (left alone: {reasons})' if reasons else ''}"
        return {name: why for name, value in asked.items() if stands[name] < value - _ROUNDING}

    def keep(self) -> None:
        """Nothing: what was removed does not come back."""

    def go_back(self, pl_module: pl.LightningModule, kept: State) -> NoReturn:
        """Refuse."""
        raise NotImplementedError(f"{type(self).__name__} keeps nothing: what was removed does not come back.")

    def follow(self, pl_module: pl.LightningModule, record: Record) -> None:
        """Observe anew; before the next shrink, count what is left."""
        if self.progress is not None:
            self.progress.changed = True
        if self._observation is not None:
            self._observation.follow(pl_module)

    @property
    def state_key(self) -> str:
        """Tells this callback's state from another's with other layers or another phase."""
        return self._generate_state_key(
            include=list(self.include), exclude=list(self.exclude), phase=[self.phase.begin, self.phase.end]
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse sharding strategies, and let a checkpoint of another shape be loaded."""
        check_strategy(trainer, self)
        check_structure_on_load(pl_module)
        if stage == "fit":
            end_with_verdict(trainer)
        if self._module is not pl_module and stage == "fit":
            self.shrinks = 0
            self.skipped = {}
            self.progress = None
        self._module = pl_module

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out on a copy what can be removed, before training starts."""
        check_finite(type(self).__name__, pl_module)
        check_mirrors(type(self).__name__, pl_module)
        for optimizer in trainer.optimizers:
            other = check_optimizer(type(self).__name__, optimizer)
            if other:
                rank_zero_info(
                    f"{type(self).__name__}: {type(optimizer).__name__} keeps state of other shapes than those of the "
                    f"parameters ({', '.join(other)}). What it knows of a parameter begins anew when that shrinks."
                )
        observed = None if self._state is None else self._restore(self._state)
        self._state = None
        if not self.reached:
            know_layers(self, trainer, pl_module)  # which raw parameters have scores
            self._calls = on_rank_zero(trainer, lambda: example_calls(trainer, pl_module, type(self).__name__))
            self._observe(pl_module, observed)
            if self.progress is None:
                self.progress, self.skipped = on_rank_zero(trainer, lambda: self.find(in_single_precision(pl_module)))
        tell_left_alone(self, self.skipped)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if a phase does not fit the run."""
        check_run(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Shrink when it is time, between two optimizer steps, and observe the batch."""
        clock = read_clock(trainer, batch_idx)
        self._inside = 0 <= self.phase.progress(clock) < 1
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._shrink(trainer, pl_module, clock)
        if self._observation is not None and self._inside and not self.reached:
            self._observation.begin_batch()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Observe gradients."""
        if self._observation is not None and self._inside and not self.reached:
            self._observation.observe_gradients(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Shrink for the last time at the very end of the phase."""
        if self._observation is not None:
            self._observation.end_batch()
        clock = read_clock(trainer, batch_idx + 1)
        complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if complete and (self._inside or clock.run >= 1) and self.phase.progress(clock) >= 1:
            self._shrink(trainer, pl_module, clock)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop observing."""
        if self._observation is not None:
            self._observation.cancel()

    def state_dict(self) -> State:
        """How often it shrank, what of, and how the module differs from its dense self."""
        if self._state is not None:
            return self._state
        return {
            "shrinks": self.shrinks,
            "skipped": dict(self.skipped),
            "facts": {} if self.progress is None else self.progress.to_state(),
            "observed": None if self._observation is None or self.reached else self._observation.state_dict(),
            "structure": {} if self._module is None else structure_of(self._module),
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Restore from a checkpoint."""
        self._state = dict(state_dict)

    def settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know what was removed of a model that was trained in processes of its own."""
        self._module = pl_module
        if self._state is not None:
            self._restore(self._state)
            # what was observed is of use as long as something is still to go
            self._state = None if self.reached else self._state

    def _restore(self, state: State) -> State | None:
        """Take a checkpoint's progress; gives what was observed."""
        self.shrinks = state["shrinks"]
        self.skipped = dict(state["skipped"])
        self.progress = self.progress_class(**copy.deepcopy(state["facts"])) if state["facts"] else None
        return state["observed"]

    def _forward(self, model: nn.Module) -> object:
        return self._calls.run(model)

    def _rehearse(self, model: nn.Module) -> str | None:
        """Why a changed float copy does not go through the user's own steps; None where it does."""
        assert self._module is not None
        return why_it_fails(self._module.trainer, model, self._calls.batches)

    def _observe(self, pl_module: pl.LightningModule, state: State | None) -> None:
        """Watch what the criterion wants to see."""
        self._observation = None
        if self.criterion.needs_data:
            layers = scorable_layers(pl_module, self.criterion)
            self._observation = Observation(self.criterion, layers, pl_module)
            if state is not None:
                self._observation.load_state_dict(state)

    def _shrink(self, trainer: pl.Trainer, pl_module: pl.LightningModule, clock: Clock) -> None:
        """Shrink to the mark that the phase has reached."""
        due = min(self.steps, math.floor(self.phase.progress(clock) * self.steps + 1e-9))
        if due <= self.shrinks or (self._observation is not None and not self._observation.ready):
            return
        before = sum(p.numel() for p in pl_module.parameters())
        try:
            found = on_rank_zero(trainer, lambda: self._planned(pl_module, due / self.steps))
            forget_graphs(pl_module)
            tell(trainer, found.record)
        except CutError as error:
            # a run is worth more than a cut: it goes on with what it has, and ends with a target missed
            self.shrinks = due
            self.failed = str(error)
            rank_zero_warn(
                f"{type(self).__name__} {due}/{self.steps}: nothing is removed, because {error}. All is as it was."
            )
            return
        self.progress = found.progress  # after all were told, this callback too: its own change is counted
        self.skipped = found.skipped
        self.shrinks = due
        after = sum(p.numel() for p in pl_module.parameters())
        rank_zero_info(
            f"{type(self).__name__} {due}/{self.steps}: {before:,} -> {after:,} parameters, {found.macs:,} -> "
            f"{found.macs_left:,} multiply-accumulates; {self.summary(found.record, found.progress)}"
        )

    def _planned(self, pl_module: pl.LightningModule, share: float) -> _Shrink:
        """What to remove; what goes wrong on the copy does not end the run, but a criterion that fails does."""
        scores = scores_by_tensor(pl_module, self.criterion, self._observation)
        try:
            return self._choose(pl_module, scores, share)
        except Exception as error:
            raise CutError(f"planning it raised {first_line(error)}") from error

    def _choose(self, pl_module: pl.LightningModule, scores: Mapping[str, Tensor], share: float) -> _Shrink:
        """What to remove, on a float copy."""
        assert self.progress is not None
        model = in_single_precision(pl_module)
        macs = self._calls.macs(model)
        record, progress, skipped = self.choose(model, self.progress, scores, share)
        apply_record(model, record)
        return _Shrink(record, progress, skipped, macs, self._calls.macs(model))
