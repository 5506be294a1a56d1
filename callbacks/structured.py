"""Remove channels and blocks while a model trains: it becomes smaller and faster at once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.analysis.inspect import count_macs
from lightning_compress.deploy.forward import Inputs, run_model, with_batch
from lightning_compress.layers import PRUNABLE, Layer, find_layers
from lightning_compress.phase import Clock, Phase
from lightning_compress.pruning import Criterion, Magnitude, Observation
from lightning_compress.pruning.blocks import choose_blocks, find_blocks, record_blocks, score_block
from lightning_compress.pruning.coupling import Coupling, couple
from lightning_compress.pruning.plan import (
    Drops,
    Limits,
    choose,
    num_channels,
    num_parameters,
    plan,
    prove_groups,
    record_of,
    score_groups,
)
from lightning_compress.pruning.surgery import Record, apply_record, check_optimizer, structure_of
from lightning_compress.quantization.convert import to_float

from .clock import check_run, read_clock
from .evaluate import example_inputs
from .gate import gate_checkpoints as gate
from .gate import open_checkpoints
from .reshape import reshape
from .structure import check_strategy, check_structure_on_load

__all__ = ["ChannelPruning", "LayerPruning"]

Target = Literal["channels", "parameters", "macs", "latency"]
_TARGETS = ("channels", "parameters", "macs", "latency")


class _Shrinking(pl.Callback):
    """What removing channels and removing blocks have in common: when, on what data, and what must follow."""

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

    @property
    def state_key(self) -> str:
        """Tells this callback's state from another's with other layers or another phase."""
        return self._generate_state_key(
            include=list(self.include), exclude=list(self.exclude), phase=[self.phase.begin, self.phase.end]
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse sharding strategies, and let a checkpoint of another shape be loaded."""
        check_strategy(trainer)
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
            gate(trainer, self)

    def examine(self, model: nn.Module) -> tuple[dict[str, str], dict[str, Any]]:
        """What of a float copy is left alone, and what is to be remembered of it."""
        raise NotImplementedError

    def plan(self, model: nn.Module, scores: Mapping[str, Tensor], share: float) -> tuple[Record, dict[str, Any]]:
        """What to remove of a float copy, and what to remember; share is the part of the target that is due."""
        raise NotImplementedError

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

        record, self._facts, self.skipped, macs = _on_rank_zero(trainer, planned)
        reshape(trainer, pl_module, record)
        self.shrinks = due
        self._observe(pl_module, None)
        after = sum(p.numel() for p in pl_module.parameters())
        rank_zero_info(
            f"{type(self).__name__} {due}/{self.steps}: {before:,} -> {after:,} parameters, "
            f"{macs[0]:,} -> {macs[1]:,} multiply-accumulates; {self.summary(record)}"
        )

    def summary(self, record: Record) -> str:
        """What was removed, in words."""
        raise NotImplementedError


class ChannelPruning(_Shrinking):
    """Removes channels from all layers that share them, and with them parameters, optimizer state and time.

    Which channels go together is traced on a copy (torch-pruning, Fang 2023, arXiv:2301.12900); a smaller copy is
    proven to compute what the dense one computes with these channels at zero, before the model itself is touched. What
    cannot be removed safely is left alone and named in ``skipped``. Heads of attentions are removed as a whole.

    Args:
        sparsity: Share removed at the end of the phase, 0..1.
        criterion: Which channels go first, by the mean of the squared scores of their weights.
        phase: When; a criterion that looks at data does so during the phase. The shrinks lie at equal distances, the
            last at its end.
        steps: Number of shrinks.
        target: Of what the share is removed: ``"channels"`` (of those that can be removed), ``"parameters"``,
            ``"macs"`` (multiply-accumulates) or ``"latency"`` (measured on the CPU, one sample).
        scope: ``"global"`` ranks all channels together, each relative to its layer; ``"local"`` every group for itself.
        include: Name patterns of the layers whose output channels may go; empty for all.
        exclude: Name patterns of layers that keep their output channels.
        num_heads: Number of heads by the name pattern of an attention, where its attributes do not tell.
        round_to: The number of channels that are kept is a multiple of this.
        floor: Share of its channels that every layer keeps.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only once all is removed.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ChannelPruning(sparsity=0.5)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        criterion: Criterion | None = None,
        phase: Phase | None = None,
        steps: int = 1,
        target: Target = "channels",
        scope: Literal["global", "local"] = "global",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        num_heads: Mapping[str, int] | None = None,
        round_to: int = 1,
        floor: float = 0.1,
        gate_checkpoints: bool = True,
    ) -> None:
        super().__init__(criterion, phase, include, exclude, gate_checkpoints)
        self.sparsity, self.steps, self.target, self.scope = sparsity, steps, target, scope
        self.num_heads, self.round_to, self.floor = dict(num_heads or {}), round_to, floor
        for name in ("sparsity", "floor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
                raise ValueError(f"ChannelPruning.{name}={value!r}: accepted is a share in 0..1, below 1, such as 0.5.")
        for name in ("steps", "round_to"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ChannelPruning.{name}={value!r}: accepted is a whole number from 1.")
        if target not in _TARGETS:
            raise ValueError(f"ChannelPruning.target={target!r}: accepted are {', '.join(map(repr, _TARGETS))}.")
        if scope not in ("global", "local"):
            raise ValueError(
                f"ChannelPruning.scope={scope!r}: accepted are 'global' (all channels ranked together) and 'local'."
            )

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phase with its name."""
        return [("channels", self.phase)]

    def examine(self, model: nn.Module) -> tuple[dict[str, str], dict[str, Any]]:
        """Find the groups of channels; warn if the target is out of reach."""
        coupling = self._couple(model)
        widths = {group.name: int(group.sizes.sum()) for group in coupling.groups}
        facts: dict[str, Any] = {"dense": 0.0, "widths": widths, "left": dict(widths)}
        if not coupling.groups:
            rank_zero_warn(f"ChannelPruning finds no channels that can be removed: {coupling.skipped}")
            return coupling.skipped, facts
        facts["dense"] = self._amount(model, None) if self.target != "channels" else float(sum(widths.values()))
        ranks = score_groups(coupling.groups, model, {})
        most = choose(coupling.groups, ranks, 1.0, self._limits(widths))
        left = self._left(model, coupling, most, record_of(model, coupling.groups, most), facts)
        if left > (1 - self.sparsity) * facts["dense"] + 1e-6:
            rank_zero_warn(
                f"ChannelPruning.sparsity={self.sparsity}: at most {1 - left / facts['dense']:.3f} of the "
                f"{self.target} can be removed, and will be. Lower sparsity or floor, or see ChannelPruning.skipped."
            )
        return coupling.skipped, facts

    def plan(self, model: nn.Module, scores: Mapping[str, Tensor], share: float) -> tuple[Record, dict[str, Any]]:
        """The channels with the lowest scores, up to the target."""
        coupling, facts = self._couple(model), copy.deepcopy(self._facts)
        most = (1 - self.sparsity * share) * facts["dense"] + 1e-6

        def reached(drops: Drops, record: Record) -> bool:
            return self._left(model, coupling, drops, record, facts) <= most

        record, drops, _ = plan(model, self._forward, coupling, scores, self._limits(facts["widths"]), reached)
        for group in coupling.groups:
            facts["left"][group.name] = num_channels([group], drops)
        self.skipped = coupling.skipped
        return record, facts

    def summary(self, record: Record) -> str:
        """Channels left of those that could be removed."""
        dense, left = sum(self._facts["widths"].values()), sum(self._facts["left"].values())
        return f"{left} of {dense} channels left"

    def _couple(self, model: nn.Module) -> Coupling:
        spoiled = copy.deepcopy(model)
        coupling = couple(spoiled, self._forward, self.include, self.exclude, self.num_heads, self.skipped)
        return prove_groups(model, self._forward, coupling, self._limits({}))

    def _limits(self, widths: Mapping[str, int]) -> Limits:
        return Limits(self.floor, self.round_to, widths, self.scope)

    def _left(self, model: nn.Module, coupling: Coupling, drops: Drops, record: Record, facts: dict[str, Any]) -> float:
        """How much of the target's quantity a record leaves."""
        if self.target == "channels":
            others = {k: v for k, v in facts["left"].items() if k not in drops}
            return float(sum(others.values()) + num_channels(coupling.groups, drops))
        return self._amount(model, record)

    def _amount(self, model: nn.Module, record: Record | None) -> float:
        assert self._inputs is not None
        if self.target == "parameters":
            return float(num_parameters(model, record or {"kept": {}}))
        if record is not None:
            model = copy.deepcopy(model)
            apply_record(model, record)
        if self.target == "macs":
            return float(count_macs(model, self._inputs)[""])
        return _milliseconds(model, with_batch(self._inputs, 1))


class LayerPruning(_Shrinking):
    """Removes whole blocks: those whose weights score lowest among the blocks that give back the shape they read.

    A block is called once in the forward, with one tensor, and gives a tensor of the same shape: a residual block, a
    transformer layer, a square linear layer. An identity takes its place; its parameters leave the optimizer.

    Args:
        num_layers: How many to remove.
        criterion: Gives the scores; a block's is their mean.
        phase: When; a criterion that looks at data does so during the phase, the blocks go at its end.
        include: Name patterns of the blocks that may go; empty for all.
        exclude: Name patterns of blocks to keep.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only once all is removed.

    Raises:
        ValueError: If a value is out of range, or there are fewer such blocks.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LayerPruning(num_layers=2)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        num_layers: int = 1,
        criterion: Criterion | None = None,
        phase: Phase | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        gate_checkpoints: bool = True,
    ) -> None:
        super().__init__(criterion, phase, include, exclude, gate_checkpoints)
        self.num_layers = num_layers
        if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
            raise ValueError(f"LayerPruning.num_layers={num_layers!r}: accepted is a whole number of blocks from 1.")

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phase with its name."""
        return [("layers", self.phase)]

    def examine(self, model: nn.Module) -> tuple[dict[str, str], dict[str, Any]]:
        """Find the blocks, and refuse to remove more than there are."""
        names, skipped = find_blocks(model, self._forward, self.include, self.exclude)
        removable = choose_blocks(model, self._forward, names, dict.fromkeys(names, 0.0), self.num_layers)
        if len(removable) < self.num_layers:
            why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            raise ValueError(
                f"LayerPruning.num_layers={self.num_layers}: only {len(removable)} blocks can be removed together. The "
                f"blocks that give back the shape they read are: {', '.join(names) or 'none'}"
                f"{f' (left alone: {why})' if why else ''}. Remove fewer."
            )
        return skipped, {"blocks": names}

    def plan(self, model: nn.Module, scores: Mapping[str, Tensor], share: float) -> tuple[Record, dict[str, Any]]:
        """The blocks with the lowest scores."""
        names = self._facts["blocks"]
        values = {name: score_block(model, name, scores) for name in names}
        return record_blocks(choose_blocks(model, self._forward, names, values, self.num_layers)), self._facts

    def summary(self, record: Record) -> str:
        """Names of the removed blocks."""
        return f"without {', '.join(record['removed'])}"


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


def _milliseconds(model: nn.Module, inputs: Inputs) -> float:
    taken = []
    for _ in range(7):
        begin = time.perf_counter()
        run_model(model, inputs)
        taken.append((time.perf_counter() - begin) * 1e3)
    return median(taken[2:])
