"""What removing channels and removing blocks have in common: when, on what data, and what must follow."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_compress.analysis.inspect import count_macs
from lightning_compress.forward import Inputs, run_model, with_batch
from lightning_compress.layers import PRUNABLE, Layer, find_layers
from lightning_compress.phase import Clock, Phase
from lightning_compress.pruning import Criterion, Magnitude, Observation
from lightning_compress.quantization.convert import to_float
from lightning_compress.structure.record import Record, apply_record, check_optimizer, structure_of

from .best_checkpoint import gate_checkpoints, open_checkpoints
from .evaluate import example_inputs
from .live_shape import check_strategy, check_structure_on_load
from .protocol import tell
from .run import check_run, read_clock

__all__ = ["Shrinking"]


class Shrinking(pl.Callback, ABC):
    """What removing channels and removing blocks have in common: when, on what data, and what must follow."""

    compresses = True
    criterion: Criterion
    phase: Phase
    steps = 1
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def __init__(
        self, criterion: Criterion | None, phase: Phase | None, include: Any, exclude: Any, gate_checkpoints: bool
    ) -> None:
        self.gate_checkpoints = gate_checkpoints
        self.criterion = Magnitude() if criterion is None else criterion
        self.phase = Phase(0.1, 0.3) if phase is None else phase
        self.include, self.exclude = tuple(include), tuple(exclude)
        for name, kind in (("criterion", Criterion), ("phase", Phase)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"{type(self).__name__}.{name}={getattr(self, name)!r}: accepted is a {kind.__name__}, an object "
                    "of that class and not its name."
                )
        self.skipped: dict[str, str] = {}
        self.shrinks = 0
        self._facts: dict[str, Any] = {}
        self._inside = False
        self._inputs: Inputs | None = None
        self._module: pl.LightningModule | None = None
        self._state: dict[str, Any] | None = None
        self._observation: Observation | None = None

    @property
    def reached(self) -> bool:
        """Whether all is removed that will be."""
        return self.shrinks >= self.steps

    @abstractmethod
    def phases(self) -> list[tuple[str, Phase]]:
        """Its phase with its name."""

    @abstractmethod
    def asked(self) -> dict[str, float]:
        """How much is to be removed."""

    def stands(self) -> dict[str, float]:
        """How much has been removed."""
        return dict(self._facts.get("stands", {})) or dict.fromkeys(self.asked(), 0.0)

    def keep(self) -> None:
        """Nothing: what was removed does not come back."""

    def go_back(self, pl_module: pl.LightningModule, kept: dict[str, Any]) -> None:
        """Refuse."""
        raise NotImplementedError(f"{type(self).__name__} keeps nothing: what was removed does not come back.")

    def follow(self, pl_module: pl.LightningModule, record: Record) -> None:
        """Observe anew; before the next shrink, count what is left."""
        self._facts["changed"] = True
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
            self.shrinks, self.skipped, self._facts = 0, {}, {}
        self._module = pl_module

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out on a copy what can be removed, before training starts."""
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer)
        observed = None
        if self._state is not None:
            self.shrinks, self.skipped = self._state["shrinks"], dict(self._state["skipped"])
            self._facts, observed = copy.deepcopy(self._state["facts"]), self._state["observed"]
            self._state = None
        if self.shrinks < self.steps:
            self._inputs = _on_rank_zero(trainer, lambda: self._record_inputs(trainer, pl_module))
            self._observe(pl_module, observed)
            if not self._facts:
                found = _on_rank_zero(trainer, lambda: self.examine(to_float(pl_module)))
                self.skipped, self._facts = found
        if self.skipped:
            left = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            rank_zero_info(f"{type(self).__name__} leaves alone {left}")
        if self.gate_checkpoints:
            gate_checkpoints(trainer)

    @abstractmethod
    def examine(self, model: nn.Module) -> tuple[dict[str, str], dict[str, Any]]:
        """What of a float copy is left alone, and what is to be remembered of it."""

    @abstractmethod
    def plan(self, model: nn.Module, scores: Mapping[str, Tensor], share: float) -> tuple[Record, dict[str, Any]]:
        """What to remove of a float copy, and what to remember; share is the part of the target that is due."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse phases that cannot be."""
        check_run(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Shrink when it is time, between two optimizer steps, and observe the batch."""
        clock = read_clock(trainer, batch_idx)
        self._inside = 0 <= self.phase.progress(clock) < 1
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._shrink(trainer, pl_module, clock)
        if self._observation is not None and self._inside and self.shrinks < self.steps:
            self._observation.begin_batch()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Observe gradients."""
        if self._observation is not None and self._inside and self.shrinks < self.steps:
            self._observation.observe_gradients(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
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

    def state_dict(self) -> dict[str, Any]:
        """How often it shrank, what of, and how the module differs from its dense self."""
        if self._state is not None:
            return self._state
        return {
            "shrinks": self.shrinks,
            "skipped": dict(self.skipped),
            "facts": copy.deepcopy(self._facts),
            "observed": None if self._observation is None else self._observation.state_dict(),
            "structure": {} if self._module is None else structure_of(self._module),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self._state = dict(state_dict)

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

    def _observe(self, pl_module: pl.LightningModule, state: dict[str, Any] | None) -> None:
        """Watch what the criterion wants to see."""
        criterion, self._observation = self.criterion, None
        if criterion.observes_activations or criterion.observes_gradients or criterion.needs_norm:
            self._observation = Observation(criterion, self._layers(pl_module), pl_module)
            if state is not None:
                self._observation.load_state_dict(state)

    def _layers(self, pl_module: pl.LightningModule) -> list[Layer]:
        layers, _ = find_layers(pl_module, PRUNABLE, skip_tied=True)
        return [layer for layer in layers if self.criterion.refuses(layer) is None]

    @torch.no_grad()
    def _scores(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """The criterion's scores by the names of the weights' tensors."""
        names: dict[int, list[str]] = {}
        for name, p in pl_module.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        scores: dict[str, Tensor] = {}
        for layer in self._layers(pl_module):
            if self._observation is None or self._observation.refuses(layer) is None:
                seen = layer if self._observation is None else self._observation.layer(layer)
                scores |= dict.fromkeys(names[id(layer.weight)], self.criterion.score(seen).detach().cpu())
        return scores

    def _shrink(self, trainer: pl.Trainer, pl_module: pl.LightningModule, clock: Clock) -> None:
        """Shrink to the mark that the phase has reached."""
        due = min(self.steps, math.floor(self.phase.progress(clock) * self.steps + 1e-9))
        if due <= self.shrinks or (self._observation is not None and not self._observation.ready):
            return
        before = sum(p.numel() for p in pl_module.parameters())

        def planned() -> tuple[Record, dict[str, Any], dict[str, str], list[int]]:
            model = to_float(pl_module)
            assert self._inputs is not None
            macs = [count_macs(model, self._inputs)[""]]
            record, facts = self.plan(model, self._scores(pl_module), due / self.steps)
            apply_record(model, record)
            return record, facts, self.skipped, [*macs, count_macs(model, self._inputs)[""]]

        record, facts, self.skipped, macs = _on_rank_zero(trainer, planned)
        tell(trainer, record)
        self._facts, self.shrinks = facts, due
        after = sum(p.numel() for p in pl_module.parameters())
        rank_zero_info(
            f"{type(self).__name__} {due}/{self.steps}: {before:,} -> {after:,} parameters, "
            f"{macs[0]:,} -> {macs[1]:,} multiply-accumulates; {self.summary(record)}"
        )

    @abstractmethod
    def summary(self, record: Record) -> str:
        """What was removed, in words."""


def _on_rank_zero(trainer: pl.Trainer, call: Callable[[], Any]) -> Any:
    """What a call gives on rank zero, on every rank; what it raises there is raised everywhere."""
    result: Any = None
    if trainer.is_global_zero:
        try:
            result = call()
        except Exception as error:
            if trainer.world_size == 1:
                raise
            result = error
    result = trainer.strategy.broadcast(result)
    if isinstance(result, Exception):
        raise result
    return result
