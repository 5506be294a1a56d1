"""Win accuracy back: stretches of training with a learning rate of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.checks import check_instance, check_names, check_number
from lightning_compress.layers import matches, modules_by_name
from lightning_compress.phase import Clock, Phase
from lightning_compress.thinning import Thinning

from .live_shape import check_strategy
from .protocol import State, compressing_phases
from .run import check_run, read_clock

__all__ = ["FineTuning"]

_MANY = 4096  # recorded rates: between two of so many no schedule moves by much


class FineTuning(pl.Callback):
    """A phase of training between or after the others, with its own learning rate and frozen parts.

    The optimizer sees the phase's learning rate only during its step: the user's scheduler goes on undisturbed. Frozen
    parameters keep their values during the phase, and frozen batch norms their statistics.

    Args:
        phase: When.
        learning_rate: ``"rewind"`` replays the rates of the stretch of equal length before compression began
            (learning-rate rewinding, Renda 2020, arXiv:2003.02389); ``"constant"`` keeps the rate with which the phase
            begins; a number multiplies the scheduler's rate.
        freeze: Name patterns of modules or parameters that are not trained during the phase.

    Raises:
        ValueError: If learning_rate is none of these, or a pattern matches nothing.

    Example:
        >>> trainer = pl.Trainer(callbacks=[FineTuning(Phase(0.6, 0.7), learning_rate=0.1)], logger=False,
        ...                      enable_checkpointing=False)
    """

    compresses = False

    def __init__(
        self,
        phase: Phase | None = None,
        learning_rate: Literal["rewind", "constant"] | float = "rewind",
        freeze: Sequence[str] = (),
    ) -> None:
        self.phase = Phase(0.6, 0.7) if phase is None else phase
        self.learning_rate = learning_rate
        check_names("FineTuning.freeze", freeze)
        self.freeze = tuple(freeze)
        check_instance("FineTuning.phase", self.phase, Phase, "a Phase, for instance Phase(0.6, 0.7)")
        if not (isinstance(learning_rate, str) and learning_rate in ("rewind", "constant")):
            check_number("FineTuning.learning_rate", learning_rate, "'rewind', 'constant' or a factor above 0", above=0)
        self._history: list[list[float]] = []
        self._thinning = Thinning(limit=_MANY)
        self._clock: Clock | None = None
        self._scheduled: dict[int, list[float | Tensor]] = {}  # what the scheduler asks for, while a step is taken
        self._handles: list[RemovableHandle] = []
        self._frozen: list[nn.Parameter] = []
        self._frozen_norms: list[nn.Module] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that wrap the optimizers, and a Trainer of another package."""
        check_strategy(trainer, self, model_parallel=True)

    @property
    def state_key(self) -> str:
        """Tells this phase's state from another's."""
        return self._generate_state_key(phase=[self.phase.begin, self.phase.end])

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phase with its name."""
        return [("fine-tune", self.phase)]

    @property
    def active(self) -> bool:
        """Whether the phase goes on now."""
        return self._clock is not None and 0 <= self.phase.progress(self._clock) < 1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what is frozen and watch the optimizers."""
        names = [name for name, _ in pl_module.named_parameters()]
        for pattern in self.freeze:
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(
                    f"FineTuning.freeze={pattern!r} matches no parameter. The parameters are: {', '.join(names)}."
                )
        self._frozen = [p for name, p in pl_module.named_parameters() if matches(name, self.freeze)]
        self._frozen_norms = [
            module
            for name, module in modules_by_name(pl_module).items()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and matches(name, self.freeze)
        ]
        offset = 0
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(partial(self._set_rate, offset)))
            offset += len(optimizer.param_groups)
            self._handles.append(optimizer.register_step_post_hook(self._restore_rate))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if a phase does not fit the run."""
        check_run(trainer)
        if trainer.global_step == 0:
            self._history.clear()
            self._thinning = Thinning(limit=_MANY)
        if self.learning_rate == "rewind" and math.isnan(self.phase.fractions(read_clock(trainer, 0))[0]):
            raise ValueError(
                "FineTuning.learning_rate='rewind' replays a stretch of the run, but the run has no known end. Set "
                "Trainer(max_steps=...) or Trainer(max_epochs=...), or take learning_rate='constant'."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Record the rates that will be replayed; enter and leave the phase."""
        was_active = self.active
        self._clock = read_clock(trainer, batch_idx)
        rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if self.learning_rate == "rewind" and self._records(trainer, self._clock):
            self._thinning.add(self._history, rates)
        if self.learning_rate == "constant" and self.active and not self._history:
            self._history.append(rates)
        if self.active or was_active:
            for norm in self._frozen_norms:
                norm.train(not self.active)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the frozen parameters' gradients away: an optimizer skips what has none, weight decay included."""
        if self.active:
            for parameter in self._frozen:
                parameter.grad = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimizers, and of norms that a phase up to the end of the run has frozen."""
        if self.active:
            for norm in self._frozen_norms:
                norm.train()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> State:
        """The recorded rates."""
        return {"history": [list(rates) for rates in self._history], "thinning": asdict(self._thinning)}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore from a checkpoint."""
        self._history = [list(rates) for rates in state_dict["history"]]
        # A checkpoint of an earlier version has kept all.
        self._thinning = Thinning(**state_dict.get("thinning", {"limit": _MANY}))

    def _records(self, trainer: pl.Trainer, clock: Clock) -> bool:
        """Whether now lies in the stretch to replay: as long as the phase, up to where compression began."""
        begin, end = self.phase.fractions(clock)
        begins = [phase.fractions(clock)[0] for phase in compressing_phases(trainer)]
        origin = min([b for b in begins if b <= begin], default=begin)
        start = max(0.0, origin - (end - begin))
        now = Phase(start, max(origin, start)).progress(clock) if origin > start else -1.0
        return 0 <= now < 1

    def _rates(self, scheduled: list[float], offset: int) -> list[float]:
        assert self._clock is not None
        if isinstance(self.learning_rate, int | float):
            return [rate * self.learning_rate for rate in scheduled]
        if not self._history:
            return scheduled
        progress = min(max(self.phase.progress(self._clock), 0.0), 1.0)
        rates = self._history[min(int(progress * len(self._history)), len(self._history) - 1)]
        return rates[offset : offset + len(scheduled)]

    def _set_rate(self, offset: int, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self.active:
            scheduled = [group["lr"] for group in optimizer.param_groups]
            self._scheduled[id(optimizer)] = scheduled
            rates = self._rates([float(rate) for rate in scheduled], offset)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], torch.Tensor) else rate

    def _restore_rate(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group, rate in zip(optimizer.param_groups, self._scheduled.pop(id(optimizer), []), strict=False):
            group["lr"] = rate
