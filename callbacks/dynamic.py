"""Train sparse from the start: weights are exchanged while the sparsity stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from zlib import crc32

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lightning_compress.checks import check_number
from lightning_compress.layers import Layer
from lightning_compress.phase import Clock, Phase
from lightning_compress.pruning import Constant, Criterion
from lightning_compress.pruning.scopes import Scope
from lightning_compress.pruning.sharding import whole
from lightning_compress.structure.held import scale_state, states_of

from .protocol import State, all_callbacks
from .pruning import GradualPruning
from .run import read_clock, tell_left_alone

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
        every: Optimizer steps between two exchanges; fewer where the phase is shorter.
        share: Share of the kept weights that the first exchange replaces; it falls to 0 along a cosine.
        include: Name patterns of the layers to prune; empty for all.
        exclude: Name patterns of layers to leave dense.
        keep_first: Leave the first layer dense.
        keep_last: Leave the last layer dense.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only once the model is sparse.
        gate_stopping: Whether EarlyStopping waits likewise.
        strict: Whether a target that is not reached is an error when ``fit`` ends, after checkpoints and files are
            written; else it is a warning.

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
        gate_stopping: bool = True,
        strict: bool = False,
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
            gate_stopping=gate_stopping,
            strict=strict,
        )
        check_number(f"{type(self).__name__}.share", share, "a share above 0 and up to 1", above=0, high=1)
        self.share = share
        self._exchanged: dict[str, int] = {}  # by layer, the step of its last exchange
        self._num_exchanged = 0
        self._without_gradient: set[str] = set()  # layers whose weights were to be exchanged

    def asked(self) -> dict[str, float | str]:
        """The sparsity, and one weight at least that is exchanged."""
        return {**super().asked(), "exchanged weights": 1}

    def stands(self) -> dict[str, float | str]:
        """The sparsity, and how many weights were exchanged."""
        return {**super().stands(), "exchanged weights": self._num_exchanged}

    def shortfalls(self) -> dict[str, str]:
        """A sparsity that is not reached; and if no weight was exchanged."""
        short = super().shortfalls()
        if not self._num_exchanged:
            short["exchanged weights"] = short.get("sparsity", "") or self._why_none()
        return short

    def _why_none(self) -> str:
        if not self.reached:
            return ""
        if self._without_gradient:
            return f"no gradient arrived at {', '.join(sorted(self._without_gradient))}"
        return (
            f"no exchange of a weight was due: the first one takes place {self.every} steps after the model became "
            f"sparse, within {self.phase}"
        )

    @property
    def reached(self) -> bool:
        """Whether the model is sparse."""
        return self._last_step >= 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if a phase does not fit the run; the steps of an earlier fit do not count in this one."""
        super().on_train_start(trainer, pl_module)
        self._check_others(trainer)
        begun = self._last_step >= 0
        self._exchanged = {name: min(step, trainer.global_step) for name, step in self._exchanged.items() if begun}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the layers that kept their own weights because no gradient arrived when they were due."""
        kept = sorted(self._without_gradient - self._exchanged.keys())
        if self._num_exchanged and kept:
            tell_left_alone(self, dict.fromkeys(kept, "no gradient arrived, it keeps the weights that it began with"))

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
        clock = read_clock(trainer, trainer.fit_loop.epoch_loop.batch_idx)
        progress = self.phase.progress(clock)
        if self._last_step >= 0 and progress < 1:
            after = read_clock(trainer, trainer.fit_loop.epoch_loop.batch_idx + 1)
            # each layer by itself: one that has no gradient when it is due is tried at the next step
            layers = self._growing(self._due(optimizer, clock, last=self.phase.progress(after) >= 1))
            if layers:
                share = self.share / 2 * (1 + math.cos(math.pi * progress))
                plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
                self._exchange(plain, layers, clock.step, share)
                self._mask_copies(trainer)
                self._exchanged |= dict.fromkeys((layer.name for layer in layers), clock.step)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def _due(self, optimizer: torch.optim.Optimizer, clock: Clock, last: bool) -> list[Layer]:
        """The layers of an optimizer whose weights are to be exchanged at this step."""
        assert self.masks is not None
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        between = self._steps_between(clock)

        def is_due(name: str) -> bool:
            if last and name not in self._exchanged:
                return True
            return clock.step - self._exchanged.get(name, self._last_step) >= between

        return [layer for layer in self.masks.layers if id(layer.weight) in theirs and is_due(layer.name)]

    def _steps_between(self, clock: Clock) -> int:
        """Steps between two exchanges: those that are asked for, or half of a phase that is too short for them."""
        begin, end = self.phase.fractions(clock)
        if not math.isfinite(clock.total_steps * end):
            return self.every
        behind_first = math.ceil(end * clock.total_steps - 1e-9) - math.ceil(begin * clock.total_steps - 1e-9) - 1
        return self.every if self.every <= behind_first else (max(0, behind_first) + 1) // 2

    def growth(self, layer: Layer, step: int) -> Tensor:
        """Scores of a layer's weights at an optimizer step; the highest grow."""
        assert layer.gradient is not None
        return layer.gradient.abs()

    def keep(self) -> None:
        """Nothing: an exchange follows from the steps before, and no guard could ask for less."""

    def state_dict(self) -> State:
        """Also when weights were exchanged last, by layer, and how many were in all."""
        counts = {"exchanged": dict(self._exchanged), "num_exchanged": self._num_exchanged}
        return {**super().state_dict(), **counts}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore from a checkpoint."""
        super().load_state_dict(state_dict)
        exchanged = state_dict["exchanged"]
        if exchanged and not isinstance(next(iter(exchanged)), str):  # up to version 0.1 by the optimizer's index
            masked = (state_dict["masks"] or {}).keys()
            exchanged = dict.fromkeys(masked, min(exchanged.values()))
        self._exchanged = dict(exchanged)
        self._num_exchanged = state_dict.get("num_exchanged", 0)

    def _growing(self, layers: list[Layer]) -> list[Layer]:
        """Those that have a gradient; none where one of these is not finite: a gradient scaler will skip the step."""
        # An unused head, or an expert that was not chosen, has none; that is no reason to leave the others as they are.
        self._without_gradient |= {layer.name for layer in layers if layer.gradient is None}
        layers = [layer for layer in layers if layer.gradient is not None]
        finite = [bool(whole(torch.isfinite(layer.gradient).all())) for layer in layers]  # type: ignore[arg-type]
        return layers if all(finite) else []

    def _exchange(self, optimizer: torch.optim.Optimizer, layers: list[Layer], step: int, share: float) -> None:
        assert self.masks is not None
        grown = self.masks.exchange(layers, share, lambda layer: self.growth(layer, step))
        new = {id(layer.weight): grown[layer.name] for layer in layers}
        for each in self._elementwise[id(optimizer)]:
            for _, p, state in states_of(each):
                if id(p) in new:
                    scale_state(state, p, 1 - new[id(p)])
        self._num_exchanged += sum(int(whole(grown[layer.name]).sum()) for layer in layers)


class SET(RigL):
    """As ``RigL``, but random weights grow (Mocanu 2018, arXiv:1707.04780); the arguments are those of ``RigL``."""

    def _growing(self, layers: list[Layer]) -> list[Layer]:
        """All of them: what grows is drawn by lot."""
        return layers

    def growth(self, layer: Layer, step: int) -> Tensor:
        """Uniform noise, the same on every process and after a resume."""
        generator = torch.Generator().manual_seed(crc32(f"{step} {layer.name}".encode()))
        return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
