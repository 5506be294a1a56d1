"""Prune a model gradually while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import lightning.pytorch as pl

from lightning_compress.phase import Clock, Phase
from lightning_compress.pruning import Criterion, Element, Magnitude, Pattern, Schedule
from lightning_compress.pruning.arguments import check_arguments, schedule_for
from lightning_compress.pruning.prunable import unseen
from lightning_compress.pruning.scopes import Scope
from lightning_compress.pruning.sharding import mean_over_processes
from lightning_compress.structure.held import forget_states
from lightning_compress.structure.optimizers import check_forgetting
from lightning_compress.structure.record import Record

from .masking import Masking
from .protocol import State
from .run import check_run, read_clock, tell_left_alone

__all__ = ["GradualPruning"]


class GradualPruning(Masking):
    """Drops more and more weights during a phase, and keeps them zero from then on.

    The masks live in the callback's state, never in the model: names and order of parameters stay, and a run resumes
    bit-identically. They are enforced after every optimizer step, whatever the optimizer.

    Args:
        sparsity: Share of the weights dropped by the end of the phase, 0..1, rising from 0 along a cubic (Zhu & Gupta
            2017, arXiv:1710.01878); or a schedule. By default 0.9, or the most that the pattern allows.
        criterion: Scores the weights; the lowest are dropped first. One that looks at data observes the normal training
            steps.
        pattern: Which weights are dropped together.
        scope: ``"global"`` ranks all layers together, ``"layer"`` drops the same share of each, ``"erk"`` more of the
            larger ones (Evci 2020, arXiv:1911.11134).
        phase: When the sparsity rises.
        every: Optimizer steps between two updates of the masks; the end of the phase is always an update.
        include: Name patterns of the layers to prune; empty for all that multiply, embeddings apart.
        exclude: Name patterns of layers to leave dense.
        targets: Final sparsity of single layers by name pattern; they rise along the same schedule.
        floor: Smallest share of what all layers keep on average that a layer keeps, so that none is emptied; the
            pattern ``WholeLayer`` ignores it.
        keep_first: Leave the first layer dense.
        keep_last: Leave the last layer dense.
        rewind: Point in the run, in the phase's unit, whose weights are saved; surviving weights are reset to them each
            time sparsity increases (Frankle 2020, arXiv:1912.05671). For the schedule ``Rounds``. None never rewinds.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only from the final sparsity on: the "best"
            model before it would be a dense one.
        gate_stopping: Whether EarlyStopping waits likewise.
        strict: Whether a target that is not reached is an error when ``fit`` ends, after checkpoints and files are
            written; else it is a warning.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GradualPruning(sparsity=0.8, phase=Phase(0.1, 0.7))], logger=False,
        ...                      enable_checkpointing=False)
    """

    lever = "sparsity"

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
        self,
        sparsity: float | Schedule | None = None,
        criterion: Criterion | None = None,
        pattern: Pattern | None = None,
        scope: Scope = "global",
        phase: Phase | None = None,
        every: int = 10,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        targets: Mapping[str, float] | None = None,
        floor: float = 0.1,
        keep_first: bool = False,
        keep_last: bool = False,
        rewind: float | None = None,
        gate_checkpoints: bool = True,
        gate_stopping: bool = True,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.criterion = Magnitude() if criterion is None else criterion
        self.pattern = Element() if pattern is None else pattern
        self.scope = scope
        self.phase = Phase(0.2, 0.6) if phase is None else phase
        self.every = every
        self.include = include
        self.exclude = exclude
        self.targets = {} if targets is None else targets
        self.floor = floor
        self.keep_first = keep_first
        self.keep_last = keep_last
        self.rewind = rewind
        self.gate_checkpoints = gate_checkpoints
        self.gate_stopping = gate_stopping
        self.strict = strict
        fields = ["criterion", "pattern", "phase", "scope", "every", "floor", "targets", "rewind", "include", "exclude"]
        fields += ["keep_first", "keep_last", "gate_checkpoints", "gate_stopping", "strict"]
        check_arguments(type(self).__name__, **{field: getattr(self, field) for field in fields})
        self.targets = dict(self.targets)
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.schedule = schedule_for(type(self).__name__, sparsity, self.pattern)
        self.final = self.schedule.final
        self.goal = None  # a sparsity that AccuracyGuard asks for, in the schedule's place
        self._goal_met: float | None = None

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phases with their names."""
        return [("prune", self.phase)]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As every masking callback; refuse optimizers that cannot begin anew where weights are rewound."""
        for optimizer in trainer.optimizers if self.rewind is not None else ():
            check_forgetting(f"{type(self).__name__}.rewind={self.rewind}", optimizer)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if a phase does not fit the run; the steps of an earlier fit do not count in this one."""
        assert self.masks is not None
        self._take_state(self.masks)
        check_run(trainer)
        self._last_step = min(self._last_step, trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Update the masks when it is time, and observe the batch."""
        clock = read_clock(trainer, batch_idx)
        if self.rewind is not None and self._rewound is None and getattr(clock, self.phase.unit) >= self.rewind:
            self._rewound = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        progress = self.phase.progress(clock)
        due = self._last_step < 0 or clock.step - self._last_step >= self.every
        if self.goal is not None:
            due = self.goal != self._goal_met
        if progress >= 0 and not self._done and (due or progress >= 1):
            self._update(trainer, pl_module, clock)
        if self._observation is not None and not self.reached:
            self._observation.begin_batch()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Reach the final sparsity at the very end of the phase."""
        if self._observation is not None and not self.reached:
            mean = partial(mean_over_processes, trainer.strategy.root_device) if trainer.world_size > 1 else None
            self._observation.end_batch(mean)
        clock = read_clock(trainer, batch_idx + 1)
        begun = self._last_step >= 0 or clock.run >= 1
        if begun and self.phase.progress(clock) >= 1 and not self._done:
            self._update(trainer, pl_module, clock)

    def state_dict(self) -> State:
        """The masks, bit-packed, what was observed, and how far the phase is."""
        state = self._state or {"masks": None, "observed": None}
        if self.masks is not None:
            observed = None if self._observation is None or self.reached else self._observation.state_dict()
            state = {"masks": self.masks.state_dict(), "observed": observed}
        goal = {} if self.goal is None else {"goal": self.goal, "goal_met": self._goal_met}
        if self._raw:
            state = {**state, "layers": self._raw}
        return {**state, "rewound": self._rewound, "last_step": self._last_step, "done": self._done, **goal}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore from a checkpoint."""
        has_masks = state_dict["masks"] is not None
        self._state = {key: state_dict.get(key) for key in ("masks", "observed")} if has_masks else None
        self._raw = state_dict.get("layers", {})
        self._rewound = state_dict.get("rewound")
        self._last_step = state_dict["last_step"]
        self._done = state_dict["done"]
        self.goal = state_dict.get("goal")
        self._goal_met = state_dict.get("goal_met")

    def check_level(self, level: float) -> None:
        """Refuse a sparsity above the schedule's."""
        if level > self.schedule.final:
            raise ValueError(f"{type(self).__name__}: accepted are sparsities up to {self.schedule.final:g}, its own.")

    def steer(self, level: float | None) -> None:
        """Prune to this sparsity in place of following the schedule; None: follow the schedule again."""
        self.goal = level

    def keep(self) -> State | None:
        """The masks, and how far the phase is."""
        return self.state_dict()

    def go_back(self, pl_module: pl.LightningModule, kept: State) -> None:
        """Return to an earlier state of this very run; the weights are the caller's."""
        assert self.masks is not None
        done = self._done
        self.load_state_dict(kept)
        self._take_state(self.masks)
        if self._observation is not None and kept["observed"] is not None:
            self._observation.load_state_dict(kept["observed"])
        # Where a guard says how far, a phase that is over stays over; else the rest is due at the next batch.
        self._done |= done and self.goal is not None

    def follow(self, pl_module: pl.LightningModule, record: Record) -> None:
        """Cut masks and remembered weights, forget what was seen of other shapes, and make up for what went."""
        if self.masks is None:
            return
        super().follow(pl_module, record)
        # What is left may be less sparse than what went: the target is one of the model as it stands.
        if self._done and self._observation is None:
            self._drop(pl_module.trainer, 1.0)
        elif self._done:
            self._done = False  # until a batch was observed

    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, clock: Clock) -> None:
        assert self.masks is not None
        if self._observation is not None and not self._observation.ready:
            return  # at the next batch
        if self._observation is not None and self._last_step < 0:
            refused = unseen(self._observation, self.masks.layers)
            tell_left_alone(self, refused, warn=True)
            self.skipped |= refused
        progress = min(self.phase.progress(clock), 1.0)
        before = self.masks.sparsity
        self._drop(trainer, progress)
        if self._rewound is not None and self.masks.sparsity > before:
            pl_module.load_state_dict(self._rewound)
            self.masks.apply()
            for optimizer in trainer.optimizers:
                forget_states(optimizer)
        self._last_step = clock.step
        self._goal_met = self.goal
        self._done = progress >= 1

    def _drop(self, trainer: pl.Trainer, progress: float) -> None:
        """Drop what is due, also from the averages of the weights."""
        assert self.masks is not None
        final = self.schedule.final
        sparsity = self.schedule(progress) if self.goal is None else min(self.goal, final)
        share = sparsity / final if final else self.schedule.shape(min(max(progress, 0.0), 1.0))
        self.masks.update(
            self.criterion,
            self.pattern,
            sparsity,
            self.scope,
            targets={name: target * share for name, target in self._targets.items()},
            floor=self.floor,
            observation=self._observation,
        )
        self._mask_copies(trainer)
