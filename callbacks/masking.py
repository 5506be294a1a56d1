"""Masks beside a model that trains: which layers have them, and what keeps dropped weights at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_compress.layers import Layer
from lightning_compress.phase import Phase
from lightning_compress.pruning import Criterion, Masks, Observation, Pattern
from lightning_compress.pruning.arguments import check_sharded
from lightning_compress.pruning.prunable import check_finite, find_prunable, observe, targets_by_layer
from lightning_compress.structure.record import Record, cut_state

from .best_checkpoint import gate_checkpoints, open_checkpoints
from .live_shape import check_strategy, check_structure_on_load, is_model_parallel
from .protocol import State
from .run import tell_left_alone

__all__ = ["Masking"]


class Masking(pl.Callback):
    """Base class of the callbacks that zero weights; a subclass says when the masks change.

    The masks live in the callback's state, never in the model, and are enforced after every optimizer step.
    """

    compresses = True
    criterion: Criterion
    pattern: Pattern
    phase: Phase
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    targets: Mapping[str, float]
    keep_first: bool
    keep_last: bool
    rewind: float | None
    gate_checkpoints: bool

    def __init__(self) -> None:
        self.masks: Masks | None = None
        self.skipped: dict[str, str] = {}
        self._observation: Observation | None = None
        self._targets: dict[str, float] = {}  # by the layers' names
        self._state: State | None = None  # of a checkpoint, until there are masks to take it
        self._rewound: dict[str, Tensor] | None = None  # the weights to return to
        self._last_step = -1  # of the last update; -1 before the first
        self._done = False
        self._handles: list[RemovableHandle] = []

    @property
    def reached(self) -> bool:
        """Whether the final sparsity is reached."""
        return self._done

    @property
    def state_key(self) -> str:
        """Tells this callback's state from another's with other layers or another phase."""
        return self._generate_state_key(
            include=list(self.include), exclude=list(self.exclude), phase=[self.phase.begin, self.phase.end]
        )

    def stands(self) -> dict[str, float]:
        """The sparsity of the masks."""
        return {"sparsity": 0.0 if self.masks is None else self.masks.sparsity}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what sharded weights cannot take, and let a checkpoint of another structure be refused in words."""
        check_strategy(trainer, self, model_parallel=True)
        if is_model_parallel(trainer):
            check_sharded(type(self).__name__, self.criterion, self.rewind)
        check_structure_on_load(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers, take the masks of a checkpoint, and watch the optimizers.

        A ModelParallelStrategy loads its checkpoint after this, before ``on_train_start``.
        """
        layers, self.skipped = find_prunable(
            pl_module,
            self.criterion,
            self.pattern,
            self.include,
            self.exclude,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
        )
        self._targets = targets_by_layer(type(self).__name__, self.targets, layers)
        check_finite(layers)
        tell_left_alone(self, self.skipped)
        if self._state is None and (self.masks is None or not self.masks.are_of(layers)):
            self._last_step = -1
            self._done = False
            self._rewound = None
            self.masks = None
        # Masks of these very weights stay: a second fit goes on where the first ended.
        if self.masks is None or self._state is not None:
            self.masks = Masks(layers)
            self._observation = observe(type(self).__name__, self.criterion, layers, pl_module)
            if self._observation is not None and self._state is not None and self._state["observed"] is not None:
                self._observation.load_state_dict(self._state["observed"])
        self._take_state(self.masks)
        self.masks.bind(pl_module)
        for optimizer in trainer.optimizers:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            theirs = [layer for layer in layers if id(layer.weight) in ids]
            self._handles.append(optimizer.register_step_post_hook(partial(_enforce, self.masks, theirs)))
        if self.gate_checkpoints:
            gate_checkpoints(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Observe gradients; keep dropped weights out of a clipped gradient norm."""
        if self._observation is not None and not self.reached:
            self._observation.observe_gradients(optimizer)
        if trainer.gradient_clip_val and self.masks is not None and self._last_step >= 0:
            self.masks.apply_to_gradients()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop observing, and let checkpoints go."""
        if self._observation is not None:
            self._observation.cancel()
        open_checkpoints(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave exact zeros behind and let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        open_checkpoints(trainer)
        if self.masks is not None:
            self.masks.bind(pl_module)
            self.masks.apply()

    def follow(self, pl_module: pl.LightningModule, record: Record) -> None:
        """Cut masks and remembered weights with the model, and forget what was seen of other shapes."""
        if self.masks is not None:
            self.masks.follow(pl_module, record)
        if self._rewound is not None:
            self._rewound = cut_state(self._rewound, record)
        if self._observation is not None:
            self._observation.follow(pl_module)

    def _take_state(self, masks: Masks) -> None:
        """Take the masks of a checkpoint."""
        if self._state is not None:
            masks.load_state_dict(self._state["masks"])
            self._state = None


def _enforce(masks: Masks, layers: Sequence[Layer], *_: object) -> None:
    masks.enforce(layers)
