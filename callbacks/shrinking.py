"""What the callbacks that remove structure share: when they shrink the model, and on what data."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, NoReturn, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_compress.analysis.inspect import count_macs
from lightning_compress.checks import check_instance
from lightning_compress.forward import Inputs, run_model, with_batch
from lightning_compress.phase import Clock, Phase
from lightning_compress.pruning import Criterion, Magnitude, Observation
from lightning_compress.pruning.scoring import scorable_layers, scores_by_tensor
from lightning_compress.quantization.convert import to_float
from lightning_compress.structure.optimizers import check_optimizer
from lightning_compress.structure.progress import Progress
from lightning_compress.structure.record import Record, apply_record, structure_of

from .best_checkpoint import gate_checkpoints, open_checkpoints
from .evaluate import example_inputs
from .live_shape import check_strategy, check_structure_on_load
from .protocol import State, tell
from .run import check_run, on_rank_zero, read_clock, tell_left_alone

__all__ = ["Shrinking"]

P = TypeVar("P", bound=Progress)


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
    ) -> None:
        self.criterion = Magnitude() if criterion is None else criterion
        self.phase = Phase(0.1, 0.3) if phase is None else phase
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.gate_checkpoints = gate_checkpoints
        for name, kind in (("criterion", Criterion), ("phase", Phase)):
            accepted = f"a {kind.__name__}, an object of that class and not its name"
            check_instance(f"{type(self).__name__}.{name}", getattr(self, name), kind, accepted)
        self.skipped: dict[str, str] = {}
        self.shrinks = 0
        self.progress: P | None = None  # None before anything was looked at
        self._inside = False
        self._inputs: Inputs | None = None
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
        stands = {} if self.progress is None else dict(self.progress.stands)
        return stands or dict.fromkeys(self.asked(), 0.0)

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
        if self._module is not pl_module and stage == "fit":
            self.shrinks = 0
            self.skipped = {}
            self.progress = None
        self._module = pl_module

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out on a copy what can be removed, before training starts."""
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer)
        observed = None if self._state is None else self._restore(self._state)
        self._state = None
        if not self.reached:
            self._inputs = on_rank_zero(trainer, lambda: self._record_inputs(trainer, pl_module))
            self._observe(pl_module, observed)
            if self.progress is None:
                self.progress, self.skipped = on_rank_zero(trainer, lambda: self.find(to_float(pl_module)))
        tell_left_alone(self, self.skipped)
        if self.gate_checkpoints:
            gate_checkpoints(trainer)

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
        """Stop observing, and let checkpoints go."""
        if self._observation is not None:
            self._observation.cancel()
        open_checkpoints(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let checkpoints go."""
        open_checkpoints(trainer)

    def state_dict(self) -> State:
        """How often it shrank, what of, and how the module differs from its dense self."""
        if self._state is not None:
            return self._state
        return {
            "shrinks": self.shrinks,
            "skipped": dict(self.skipped),
            "facts": {} if self.progress is None else self.progress.to_state(),
            "observed": None if self._observation is None else self._observation.state_dict(),
            "structure": {} if self._module is None else structure_of(self._module),
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Restore from a checkpoint."""
        self._state = dict(state_dict)

    def _restore(self, state: State) -> State | None:
        """Take a checkpoint's progress; gives what was observed."""
        self.shrinks = state["shrinks"]
        self.skipped = dict(state["skipped"])
        self.progress = self.progress_class(**copy.deepcopy(state["facts"])) if state["facts"] else None
        return state["observed"]

    def _record_inputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Inputs:
        inputs = example_inputs(trainer, pl_module)
        if inputs is None:
            raise ValueError(
                f"{type(self).__name__} watches the model's forward, but the validation step never calls it and there "
                "is no example_input_array. Call self(...) in validation_step, or set self.example_input_array."
            )
        small = with_batch(inputs, 2)
        try:
            run_model(to_float(pl_module), small)
        except Exception:  # a first axis that is no batch
            return inputs
        return small

    def _forward(self, model: nn.Module) -> Any:
        assert self._inputs is not None
        return model(*self._inputs.args, **self._inputs.kwargs)

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
        found = on_rank_zero(trainer, lambda: self._choose(pl_module, due / self.steps))
        tell(trainer, found.record)
        self.progress = found.progress  # after all were told, this callback too: its own change is counted
        self.skipped = found.skipped
        self.shrinks = due
        after = sum(p.numel() for p in pl_module.parameters())
        rank_zero_info(
            f"{type(self).__name__} {due}/{self.steps}: {before:,} -> {after:,} parameters, {found.macs:,} -> "
            f"{found.macs_left:,} multiply-accumulates; {self.summary(found.record, found.progress)}"
        )

    def _choose(self, pl_module: pl.LightningModule, share: float) -> _Shrink:
        """What to remove, on a float copy."""
        assert self._inputs is not None
        assert self.progress is not None
        model = to_float(pl_module)
        macs = count_macs(model, self._inputs)[""]
        scores = scores_by_tensor(pl_module, self.criterion, self._observation)
        record, progress, skipped = self.choose(model, self.progress, scores, share)
        apply_record(model, record)
        return _Shrink(record, progress, skipped, macs, count_macs(model, self._inputs)[""])
