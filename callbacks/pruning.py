"""Prune a model gradually while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.hooks import RemovableHandle

from lightning_compress.layers import PRUNABLE, Layer, find_layers
from lightning_compress.phase import Clock, Phase
from lightning_compress.pruning import Criterion, Cubic, Element, Magnitude, Masks, Pattern, Schedule

from .clock import all_callbacks, check_run, read_clock
from .structure import check_strategy, check_structure_on_load

__all__ = ["GradualPruning"]


class GradualPruning(pl.Callback):
    """Drops more and more weights during a phase, and keeps them zero from then on.

    The masks live in the callback's state, never in the model: names and order of parameters stay, and a run resumes
    bit-identically. They are enforced after every optimizer step, whatever the optimizer.

    Args:
        sparsity: Share of the weights dropped at the end of the phase, 0..1, cubic from 0 (Zhu & Gupta 2017,
            arXiv:1710.01878); or a schedule.
        criterion: Which weights are dropped first.
        pattern: In what shape they are dropped.
        scope: ``"global"`` ranks all layers together, ``"layer"`` drops the same share of each.
        phase: When the sparsity rises.
        every: Optimizer steps between two updates of the masks; the end of the phase is always an update.
        include: Name patterns of the layers to prune; empty for all linear, convolution, attention and recurrent ones.
        exclude: Name patterns of layers to leave dense.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GradualPruning(sparsity=0.8, phase=Phase(0.1, 0.7))], logger=False,
        ...                      enable_checkpointing=False)
    """

    def __init__(
        self,
        sparsity: float | Schedule = 0.9,
        criterion: Criterion | None = None,
        pattern: Pattern | None = None,
        scope: Literal["global", "layer"] = "global",
        phase: Phase | None = None,
        every: int = 10,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self.schedule = sparsity if isinstance(sparsity, Schedule) else _cubic(sparsity)
        self.criterion = Magnitude() if criterion is None else criterion
        self.pattern = Element() if pattern is None else pattern
        self.scope = scope
        self.phase = Phase(0.2, 0.6) if phase is None else phase
        self.every = every
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        for name, kind in (("criterion", Criterion), ("pattern", Pattern), ("phase", Phase)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"GradualPruning.{name}={getattr(self, name)!r}: accepted is a {kind.__name__}, an object of that "
                    "class and not its name."
                )
        if scope not in ("global", "layer"):
            raise ValueError(
                f"GradualPruning.scope={scope!r}: accepted are 'global' (all layers ranked together) and 'layer'."
            )
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"GradualPruning.every={every!r}: accepted is a whole number of optimizer steps from 1.")
        self.masks: Masks | None = None
        self.skipped: dict[str, str] = {}
        self._state: dict[str, Any] | None = None
        self._last_step = -1
        self._done = False
        self._handles: list[RemovableHandle] = []

    @property
    def state_key(self) -> str:
        """Tells this callback's state from another's with other layers or another phase."""
        return self._generate_state_key(
            include=list(self.include), exclude=list(self.exclude), phase=[self.phase.begin, self.phase.end]
        )

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phases with their names."""
        return [("prune", self.phase)]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse sharding strategies, and let a checkpoint of another structure be refused in words."""
        check_strategy(trainer)
        check_structure_on_load(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers, take up the masks of a checkpoint, and watch the optimizers."""
        layers, self.skipped = find_layers(
            pl_module, PRUNABLE, self.include, self.exclude, skip_frozen=True, skip_tied=True
        )
        _check_finite(layers)
        if self.skipped:
            left = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            rank_zero_info(f"GradualPruning leaves alone {left}")
        if self._state is not None:
            self.masks = Masks(layers)
            self.masks.load_state_dict(self._state)
            self._state = None
        elif self.masks is None or not self.masks.are_of(layers):  # else a second fit goes on where the first ended
            self.masks, self._last_step, self._done = Masks(layers), -1, False
        self.masks.bind(pl_module)
        for optimizer in trainer.optimizers:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            theirs = [layer for layer in layers if id(layer.weight) in ids]
            self._handles.append(optimizer.register_step_post_hook(partial(_enforce, self.masks, theirs)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse phases that cannot be."""
        check_run(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Update the masks when it is time."""
        clock = read_clock(trainer, batch_idx)
        progress = self.phase.progress(clock)
        first = self._last_step < 0
        due = first or progress >= 1 or clock.step - self._last_step >= self.every
        if progress >= 0 and due and not self._done:
            self._update(trainer, clock)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reach the final sparsity at the very end of the phase."""
        clock = read_clock(trainer, batch_idx + 1)
        begun = self._last_step >= 0 or clock.run >= 1
        if begun and self.phase.progress(clock) >= 1 and not self._done:
            self._update(trainer, clock)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep dropped weights out of a clipped gradient norm."""
        if trainer.gradient_clip_val and self.masks is not None and self._last_step >= 0:
            self.masks.apply_to_gradients()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave exact zeros behind and let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.masks is not None:
            self.masks.bind(pl_module)
            self.masks.apply()

    def state_dict(self) -> dict[str, Any]:
        """The masks, bit-packed, and how far the phase is."""
        masks = self._state if self.masks is None else self.masks.state_dict()
        return {"masks": masks, "last_step": self._last_step, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self._state = state_dict["masks"]
        self._last_step = state_dict["last_step"]
        self._done = state_dict["done"]

    def _update(self, trainer: pl.Trainer, clock: Clock) -> None:
        assert self.masks is not None
        progress = min(self.phase.progress(clock), 1.0)
        self.masks.update(self.criterion, self.pattern, self.schedule(progress), self.scope)
        for callback in all_callbacks(trainer):
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                self.masks.apply_to_copy(callback._average_model.module)
        self._last_step = clock.step
        self._done = progress >= 1


def _cubic(sparsity: Any) -> Schedule:
    if not isinstance(sparsity, int | float) or isinstance(sparsity, bool) or not 0 <= sparsity <= 1:
        raise ValueError(
            f"GradualPruning.sparsity={sparsity!r}: accepted is a share in 0..1 (0.9 drops nine weights in ten), or a "
            "Schedule such as Linear(0.9)."
        )
    return Cubic(sparsity)


def _check_finite(layers: Sequence[Layer]) -> None:
    for layer in layers:
        bad = layer.weight.numel() - int(torch.isfinite(layer.weight.detach()).sum())
        if bad:
            raise ValueError(
                f"{layer.name} has {bad} weights that are NaN or infinite before training starts. Start from a "
                "checkpoint that is finite."
            )


def _enforce(masks: Masks, layers: Sequence[Layer], *_: Any) -> None:
    masks.enforce(layers)
