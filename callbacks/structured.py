"""Remove channels and blocks while a model trains: it becomes smaller and faster at once."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.analysis.inspect import count_macs
from lightning_compress.forward import Inputs, run_model, with_batch
from lightning_compress.layers import matches
from lightning_compress.phase import Phase
from lightning_compress.pruning import Criterion
from lightning_compress.structure.blocks import choose_blocks, find_blocks, record_blocks, score_block
from lightning_compress.structure.channels import plain_name
from lightning_compress.structure.groups import Coupling, Group, couple
from lightning_compress.structure.plan import (
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
from lightning_compress.structure.record import Record, apply_record, is_removed, structure_of

from .shrinking import Shrinking

__all__ = ["ChannelPruning", "LayerPruning"]

Target = Literal["channels", "parameters", "macs", "latency"]
_TARGETS = ("channels", "parameters", "macs", "latency")


class ChannelPruning(Shrinking):
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
        targets: Share removed of the output channels of single layers, by name pattern, and of all that share them;
            the others lose ``sparsity`` each. With ``target="channels"``, ``scope="local"``.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only once all is removed.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[ChannelPruning(sparsity=0.5)], logger=False, enable_checkpointing=False)
    """

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
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
        targets: Mapping[str, float] | None = None,
        gate_checkpoints: bool = True,
    ) -> None:
        super().__init__(criterion, phase, include, exclude, gate_checkpoints)
        self.targets = dict(targets or {})
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

        for pattern, value in self.targets.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
                raise ValueError(
                    f"ChannelPruning.targets[{pattern!r}]={value!r}: accepted is a share in 0..1, below 1, such as 0.5."
                )
        if self.targets and (target, scope) != ("channels", "local"):
            raise ValueError(
                f"ChannelPruning.targets with target={target!r}, scope={scope!r}: each layer loses a share of its own. "
                "Accepted are target='channels' and scope='local'."
            )

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phase with its name."""
        return [("channels", self.phase)]

    def asked(self) -> dict[str, float]:
        """Share removed of the target; and of the channels of layers with a target of their own."""
        return {self.target: self.sparsity, **{_own(pattern): share for pattern, share in self.targets.items()}}

    def examine(self, model: nn.Module) -> tuple[dict[str, str], dict[str, Any]]:
        """Find the groups of channels; warn if the target is out of reach."""
        coupling = self._couple(model)
        facts = self._count(model, coupling)
        if not coupling.groups:
            rank_zero_warn(f"ChannelPruning finds no channels that can be removed: {coupling.skipped}")
            return coupling.skipped, facts
        if self.targets:
            self._check_targets(coupling)
            return coupling.skipped, facts
        ranks = score_groups(coupling.groups, model, {})
        most = choose(coupling.groups, ranks, 1.0, self._limits(facts["widths"]))
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
        if facts.pop("changed", False):
            facts = self._count(model, coupling, facts)
        most = (1 - self.sparsity * share) * facts["dense"] + 1e-6

        def reached(drops: Drops, record: Record) -> bool:
            return self._left(model, coupling, drops, record, facts) <= most

        limits = self._limits(facts["widths"])
        if self.targets:
            limits = replace(limits, shares=self._shares(coupling, facts, share))
        record, drops, _ = plan(model, self._forward, coupling, scores, limits, reached)
        for group in coupling.groups:
            facts["left"][group.name] = num_channels([group], drops)
        if facts["dense"]:
            of_channels = self.target == "channels"
            left = float(sum(facts["left"].values())) if of_channels else self._amount(model, record)
            facts["removed"] = 1 - left / facts["dense"]
        facts["stands"] = {self.target: facts["removed"]} if not self.targets else self._removed(coupling, facts)
        self.skipped = coupling.skipped
        return record, facts

    def _count(self, model: nn.Module, coupling: Coupling, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What there is to remove; where others shrank the model, what is left and what this callback took of that."""
        left = {group.name: int(group.sizes.sum()) for group in coupling.groups}
        widths, removed = dict(left), 0.0
        if before is not None:
            removed = before["removed"]
            for name in left.keys() & before["left"].keys():
                widths[name] = round(left[name] * before["widths"][name] / before["left"][name])
        dense = float(sum(widths.values()))
        if self.target != "channels" and left:
            dense = self._amount(model, None) / (1 - removed)
        return {"dense": dense, "widths": widths, "left": left, "removed": removed}

    def _removed(self, coupling: Coupling, facts: Mapping[str, Any]) -> dict[str, float]:
        """Share removed of the channels, by what was asked."""
        found: dict[str, list[str]] = {key: [] for key in self.asked()}
        for group in coupling.groups:
            pattern = _pattern_of(group, self.targets)
            found[self.target if pattern is None else _own(pattern)].append(group.name)
        widths, left = facts["widths"], facts["left"]
        return {
            key: 1 - sum(left[n] for n in names) / sum(widths[n] for n in names)
            for key, names in found.items()
            if names
        }

    def _check_targets(self, coupling: Coupling) -> None:
        for pattern in self.targets:
            if not any(_pattern_of(group, [pattern]) for group in coupling.groups):
                names = ", ".join(plain_name(layer) for group in coupling.groups for layer in group.layers)
                raise ValueError(
                    f"ChannelPruning.targets[{pattern!r}] matches no layer whose channels can be removed. They are: "
                    f"{names}."
                )

    def _shares(self, coupling: Coupling, facts: dict[str, Any], share: float) -> dict[str, float]:
        """What each group loses of the channels it has left."""
        shares = {}
        for group in coupling.groups:
            pattern = _pattern_of(group, self.targets)
            kept = 1 - (self.sparsity if pattern is None else self.targets[pattern]) * share
            shares[group.name] = max(0.0, 1 - kept * facts["widths"][group.name] / facts["left"][group.name])
        return shares

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


class LayerPruning(Shrinking):
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
        >>> import lightning.pytorch as pl
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

    def asked(self) -> dict[str, float]:
        """How many blocks are to go."""
        return {"layers": self.num_layers}

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
        gone = record_blocks(structure_of(model)["removed"])
        names = [name for name in self._facts["blocks"] if not is_removed(name, gone)]
        values = {name: score_block(model, name, scores) for name in names}
        chosen = choose_blocks(model, self._forward, names, values, self.num_layers)
        if len(chosen) < self.num_layers:
            rank_zero_warn(
                f"LayerPruning.num_layers={self.num_layers}: {len(chosen)} are removed, for others shrank the model "
                f"before, and without more of {', '.join(names) or 'its blocks'} it would not run. Remove fewer, or "
                "let LayerPruning come first."
            )
        return record_blocks(chosen), {**self._facts, "stands": {"layers": len(chosen)}}

    def summary(self, record: Record) -> str:
        """Names of the removed blocks."""
        return f"without {', '.join(record['removed'])}" if record["removed"] else "no block removed"


def _own(pattern: str) -> str:
    """What is asked of layers with a target of their own, in words."""
    return f"channels of {pattern}"


def _pattern_of(group: Group, patterns: Iterable[str]) -> str | None:
    """The first pattern that one of a group's layers matches."""
    names = [plain_name(layer) for layer in group.layers]
    return next((pattern for pattern in patterns if any(matches(name, [pattern]) for name in names)), None)


def _milliseconds(model: nn.Module, inputs: Inputs) -> float:
    taken = []
    for _ in range(7):
        begin = time.perf_counter()
        run_model(model, inputs)
        taken.append((time.perf_counter() - begin) * 1e3)
    return median(taken[2:])
