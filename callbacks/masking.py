"""Masks beside a model that trains: which layers have them, and what keeps dropped weights at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.layers import Layer, matches
from lightning_compress.phase import Phase
from lightning_compress.pruning import Criterion, Masks, Observation, Pattern
from lightning_compress.pruning.arguments import check_sharded
from lightning_compress.pruning.prunable import check_finite, find_prunable, observe, targets_by_layer
from lightning_compress.structure.held import may_swap, with_wrapped
from lightning_compress.structure.optimizers import elementwise
from lightning_compress.structure.record import Record, cut_state

from .live_shape import check_strategy, check_structure_on_load, is_model_parallel
from .protocol import State, averages
from .raw_layers import know_layers, tell_share
from .run import tell_left_alone
from .verdict import end_with_verdict

__all__ = ["Masking"]

_ROUNDING = 1e-6  # of shares that were counted


class Masking(pl.Callback):
    """Base class of the callbacks that zero weights; a subclass says when the masks change.

    The masks live in the callback's state, never in the model, and are enforced after every optimizer step.
    """

    compresses = True
    leaves = ("skipped",)
    criterion: Criterion
    pattern: Pattern
    phase: Phase
    final: float  # the sparsity that is asked for in the end
    goal: float | None  # one that another asks for, in its place
    include: Sequence[str]
    exclude: Sequence[str]
    targets: Mapping[str, float]
    keep_first: bool
    keep_last: bool
    rewind: float | None
    gate_checkpoints: bool
    gate_stopping: bool
    strict: bool

    def __init__(self) -> None:
        self.masks: Masks | None = None
        self.skipped: dict[str, str] = {}
        self._observation: Observation | None = None
        self._raw: dict[str, str] = {}  # what each axis of each raw parameter is, by name
        self._targets: dict[str, float] = {}  # by the layers' names
        self._state: State | None = None  # of a checkpoint, until there are masks to take it
        self._rewound: dict[str, Tensor] | None = None  # the weights to return to
        self._last_step = -1  # of the last update; -1 before the first
        self._done = False
        self._handles: list[RemovableHandle] = []
        # of the run's optimizers, by id: those, of them and of what they wrap, that know of each weight by itself
        self._elementwise: dict[int, list[Optimizer]] = {}

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

    def asked(self) -> dict[str, float | str]:
        """The final sparsity, and that of layers with a target of their own."""
        return {**self._sparsities()}

    def _sparsities(self) -> dict[str, float]:
        return {"sparsity": self.final, **{_own(pattern): share for pattern, share in self.targets.items()}}

    def stands(self) -> dict[str, float | str]:
        """The same in the masks."""
        if self.masks is None:
            return dict.fromkeys(self.asked(), 0.0)
        stands: dict[str, float | str] = {"sparsity": self.masks.sparsity_of(self._others())}
        for pattern in self.targets:
            layers = [layer for layer in self.masks.layers if matches(layer.name, [pattern])]
            stands[_own(pattern)] = self.masks.sparsity_of(layers)
        return stands

    def shortfalls(self) -> dict[str, str]:
        """The sparsities that are not reached."""
        asked = self._sparsities()
        if self.goal is not None:
            asked = {"sparsity": self.goal}
        elif self.masks is None or not self.masks.layers:
            reason = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            return dict.fromkeys(asked, f"there is nothing to prune{f' ({reason})' if reason else ''}")
        elif not self.reached:
            waits = self._observation is not None and not self._observation.ready
            unseen = f"{self.criterion} had seen nothing of the layers, or no optimizer trains them"
            return dict.fromkeys(asked, unseen if waits else "")
        elif not self._others():  # every layer has a target of its own
            del asked["sparsity"]
        stands = self.stands()
        short = [name for name, share in asked.items() if float(stands[name]) < share - _ROUNDING]
        return dict.fromkeys(short, self._why_short())

    def _others(self) -> list[Layer]:
        """The layers without a target of their own."""
        assert self.masks is not None
        return [layer for layer in self.masks.layers if layer.name not in self._targets]

    def _why_short(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
        return f"no more can be dropped by {self.pattern}{f' (left alone: {reasons})' if reasons else ''}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what sharded weights cannot take, and let a checkpoint of another structure be refused in words."""
        check_strategy(trainer, self, model_parallel=True)
        if is_model_parallel(trainer):
            check_sharded(type(self).__name__, self.criterion, self.rewind)
        check_structure_on_load(pl_module)
        if stage == "fit":
            end_with_verdict(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers, take the masks of a checkpoint, and watch the optimizers.

        A ModelParallelStrategy loads its checkpoint after this, before ``on_train_start``.
        """
        self._raw = know_layers(self, trainer, pl_module, None if self._state is None else self._raw)
        layers, self.skipped = self._find(pl_module)
        self._targets = targets_by_layer(type(self).__name__, self.targets, layers)
        check_finite(type(self).__name__, pl_module)
        tell_share(self, pl_module, layers, self.skipped, "prunes")
        tell_left_alone(self, self.skipped)
        if self._state is None and (self.masks is None or not self.masks.are_of(layers)):
            self._last_step = -1
            self._done = False
            self._rewound = None
            self.masks = None
        # Masks of these very weights stay: a second fit goes on where the first ended.
        if self.masks is None or self._state is not None:
            self.masks = self._begin(pl_module, layers)
        self._take_state(self.masks)
        self.masks.bind(pl_module)
        for optimizer in trainer.optimizers:
            self._elementwise[id(optimizer)] = elementwise(optimizer)
            swapping = self._elementwise[id(optimizer)] if may_swap(optimizer) else []
            # also those that are wrapped: some wrappers never step themselves
            for each in with_wrapped(optimizer):
                ids = {id(p) for group in each.param_groups for p in group["params"]}
                theirs = [layer for layer in layers if id(layer.weight) in ids]
                hook = partial(_enforce, self.masks, theirs, swapping)
                self._handles.append(each.register_step_post_hook(hook))

    def settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold the masks of a model that was trained in processes of its own."""
        know_layers(self, trainer, pl_module, self._raw)
        layers, _ = self._find(pl_module)
        self._targets = targets_by_layer(type(self).__name__, self.targets, layers)
        self.masks = self._begin(pl_module, layers)
        self._take_state(self.masks)
        self.masks.bind(pl_module)

    def _begin(self, pl_module: pl.LightningModule, layers: list[Layer]) -> Masks:
        """Observe for masks that drop nothing yet, or go on as a checkpoint says."""
        self._observation = observe(type(self).__name__, self.criterion, layers, pl_module)
        if self._observation is not None and self._state is not None and self._state["observed"] is not None:
            self._observation.load_state_dict(self._state["observed"])
        return Masks(layers)

    def _find(self, pl_module: pl.LightningModule) -> tuple[list[Layer], dict[str, str]]:
        """The layers to prune, and what is left alone, with the reason."""
        return find_prunable(
            pl_module,
            self.criterion,
            self.pattern,
            self.include,
            self.exclude,
            keep_first=self.keep_first,
            keep_last=self.keep_last,
        )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Observe gradients; keep dropped weights out of a clipped gradient norm."""
        if self._observation is not None and not self.reached:
            self._observation.observe_gradients(optimizer)
        if trainer.gradient_clip_val and self.masks is not None and self._last_step >= 0:
            self.masks.apply_to_gradients()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Validate zeros as zeros, whoever has put other values in for the validation."""
        if batch_idx == 0 and dataloader_idx == 0:
            self._enforce_all()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The same for a checkpoint, which holds the weights themselves."""
        self._enforce_all()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop observing."""
        if self._observation is not None:
            self._observation.cancel()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave exact zeros behind and let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.masks is not None:
            self.masks.bind(pl_module)
            self.masks.apply()
            self._mask_copies(trainer)
        self._elementwise.clear()

    def follow(self, pl_module: pl.LightningModule, record: Record) -> None:
        """Cut masks and remembered weights with the model, and forget what was seen of other shapes."""
        if self.masks is not None:
            self.masks.follow(pl_module, record)
        if self._rewound is not None:
            self._rewound = cut_state(self._rewound, record)
        if self._observation is not None:
            self._observation.follow(pl_module)

    def _enforce_all(self) -> None:
        # after fit, the weights are the user's own
        if self.masks is not None and self._handles and self._last_step >= 0:
            self.masks.enforce(self.masks.layers)

    def _mask_copies(self, trainer: pl.Trainer) -> None:
        """Zero dropped weights wherever else they may come back from; to call whenever masks change."""
        assert self.masks is not None
        self.masks.apply_to_mirrors(trainer.lightning_module)
        for average in averages(trainer):
            self.masks.apply_to_copy(average)
            self.masks.apply_to_mirrors(average)
        for optimizer in trainer.optimizers:
            if may_swap(optimizer):
                self.masks.apply_to_states(self._elementwise.get(id(optimizer), []))

    def _take_state(self, masks: Masks) -> None:
        """Take the masks of a checkpoint."""
        if self._state is not None:
            masks.load_state_dict(self._state["masks"])
            self._state = None


def _own(pattern: str) -> str:
    """What is asked of layers with a target of their own, in words."""
    return f"sparsity of {pattern}"


def _enforce(masks: Masks, layers: Sequence[Layer], swapping: Sequence[Optimizer], *_: object) -> None:
    masks.enforce(layers)
    masks.apply_to_states(swapping)
