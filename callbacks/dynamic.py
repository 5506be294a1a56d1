"""Train sparse from the start: weights are exchanged while the sparsity stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from zlib import crc32

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_compress.checks import check_number
from lightning_compress.layers import Layer
from lightning_compress.phase import Phase
from lightning_compress.pruning import Constant, Criterion
from lightning_compress.pruning.scopes import Scope
from lightning_compress.pruning.sharding import whole

from .protocol import State, all_callbacks
from .pruning import GradualPruning
from .run import read_clock

__all__ = ["SET", "RigL"]


class RigL(GradualPruning):
    """Sparse from the beginning of its phase; at regular exchanges small weights make way for others.

    At an exchange each layer drops its smallest kept weights, and as many others grow from zero where the gradient is
    largest (Evci 2020, arXiv:1911.11134). Their optimizer state is zeroed. The gradient is that of the optimizer step
    about to be taken; steps between exchanges cost nothing.

    Args:
        sparsity: Share of the weights that is zero throughout the phase, 0..1.
        criterion: Scores the weights at the beginning; the lowest are dropped. By default the smallest.
        scope: How the sparsity is distributed over the layers: ``"erk"``, ``"layer"`` or ``"global"``.
        phase: Begins with the first drop and ends with the last exchange.
        every: Optimizer steps between two exchanges.
        share: Share of the kept weights that the first exchange replaces; it falls to 0 along a cosine.
        include: Name patterns of the layers to prune; empty for all.
        exclude: Name patterns of layers to leave dense.
        keep_first: Leave the first layer dense.
        keep_last: Leave the last layer dense.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only once the model is sparse.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[RigL(sparsity=0.8, every=100)], logger=False, enable_checkpointing=False)
    """

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
        self,
        sparsity: float = 0.9,
        criterion: Criterion | None = None,
        scope: Scope = "erk",
        phase: Phase | None = None,
        every: int = 100,
        share: float = 0.3,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        keep_first: bool = False,
        keep_last: bool = False,
        gate_checkpoints: bool = True,
    ) -> None:
        accepted = "a share in 0..1, below 1; it stays the same during training"
        check_number(f"{type(self).__name__}.sparsity", sparsity, accepted, low=0, below=1)
        super().__init__(
            Constant(sparsity),
            criterion,
            scope=scope,
            phase=Phase(0.0, 0.75) if phase is None else phase,
            every=every,
            include=include,
            exclude=exclude,
            keep_first=keep_first,
            keep_last=keep_last,
            gate_checkpoints=gate_checkpoints,
        )
        check_number(f"{type(self).__name__}.share", share, "a share above 0 and up to 1", above=0, high=1)
        self.share = share
        self._exchanged: dict[int, int] = {}

    @property
    def reached(self) -> bool:
        """Whether the model is sparse."""
        return self._last_step >= 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if a phase does not fit the run; the steps of an earlier fit do not count in this one."""
        super().on_train_start(trainer, pl_module)
        self._check_others(trainer)
        begun = self._last_step >= 0
        self._exchanged = {i: min(step, trainer.global_step) for i, step in self._exchanged.items() if begun}

    def _check_others(self, trainer: pl.Trainer) -> None:
        """Refuse another one that prunes the same layers: each would keep at zero what the other lets grow."""
        assert self.masks is not None
        ours = {id(layer.weight) for layer in self.masks.layers}
        for other in all_callbacks(trainer):
            if other is self or not isinstance(other, GradualPruning) or other.masks is None:
                continue
            shared = [layer.name for layer in other.masks.layers if id(layer.weight) in ours]
            if shared:
                raise ValueError(
                    f"{type(self).__name__} prunes the same layers as {type(other).__name__}: {', '.join(shared)}. "
                    "Each would keep at zero what the other lets grow. Accepted are layers of its own for each, by "
                    "include and exclude."
                )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Become sparse when the phase begins."""
        if self._last_step < 0:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Exchange weights when it is time, by the dense gradient."""
        assert self.masks is not None
        clock = read_clock(trainer, trainer.fit_loop.epoch_loop.batch_idx)
        index = [id(o) for o in trainer.optimizers].index(id(getattr(optimizer, "optimizer", optimizer)))
        progress = self.phase.progress(clock)
        last = self._exchanged.get(index, self._last_step)
        if self._last_step >= 0 and progress < 1 and clock.step - last >= self.every:
            self._exchange(optimizer, clock.step, self.share / 2 * (1 + math.cos(math.pi * progress)))
            self._exchanged[index] = clock.step
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def growth(self, layer: Layer, step: int) -> Tensor:
        """Scores of a layer's weights at an optimizer step; the highest grow."""
        assert layer.weight.grad is not None
        return layer.weight.grad.detach().abs()

    def keep(self) -> None:
        """Nothing: an exchange follows from the steps before, and no guard could ask for less."""

    def state_dict(self) -> State:
        """Also when weights were exchanged last, by optimizer."""
        return {**super().state_dict(), "exchanged": dict(self._exchanged)}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore from a checkpoint."""
        super().load_state_dict(state_dict)
        self._exchanged = dict(state_dict["exchanged"])

    def _exchange(self, optimizer: torch.optim.Optimizer, step: int, share: float) -> None:
        assert self.masks is not None
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = [x for x in self.masks.layers if id(x.weight) in theirs]
        gradients = [layer.weight.grad for layer in layers]
        if not all(g is not None and bool(whole(torch.isfinite(g).all())) for g in gradients):
            return  # a step that a gradient scaler will skip, or one without a loss
        grown = self.masks.exchange(layers, share, lambda layer: self.growth(layer, step))
        for layer in layers:
            for value in optimizer.state.get(layer.weight, {}).values():
                if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                    value.mul_(1 - grown[layer.name])


class SET(RigL):
    """As ``RigL``, but random weights grow (Mocanu 2018, arXiv:1707.04780); the arguments are those of ``RigL``."""

    def growth(self, layer: Layer, step: int) -> Tensor:
        """Uniform noise, the same on every process and after a resume."""
        generator = torch.Generator().manual_seed(crc32(f"{step} {layer.name}".encode()))
        return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
