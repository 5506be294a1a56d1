"""Remove channels while a model trains: it becomes smaller and faster at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.checks import check_by_name, check_number, check_one_of, check_whole_number, shown
from lightning_compress.copies import copy_module
from lightning_compress.deploy.timing import time_together
from lightning_compress.layers import plain_name
from lightning_compress.phase import Phase
from lightning_compress.pruning import Criterion
from lightning_compress.structure.choose import (
    Drops,
    Limits,
    Scope,
    drop_lowest,
    num_channels,
    score_groups,
)
from lightning_compress.structure.cuts import num_parameters, record_of
from lightning_compress.structure.groups import Coupling, couple
from lightning_compress.structure.progress import (
    ChannelProgress,
    count_channels,
    pattern_of,
    removed_by_pattern,
    shares_due,
)
from lightning_compress.structure.proof import Rehearse, choose_channels, prove_groups
from lightning_compress.structure.record import Record, apply_record

from .shrinking import Shrinking

__all__ = ["ChannelPruning"]

Target = Literal["channels", "parameters", "macs", "latency"]
_SHARE = "a share in 0..1, below 1, such as 0.5"

# channels that vector kernels of CPUs take at once, with 256 bits
_BLOCK = 8
_SHOWN = 3


class ChannelPruning(Shrinking[ChannelProgress]):
    """Removes channels from all layers that share them, and with them parameters, optimizer state and time.

    Which channels go together is followed through a forward of a copy, operation by operation; a smaller copy is proven
    to compute what the dense one computes with these channels at zero, before the model itself is touched. What cannot
    be removed safely is left alone and named in ``skipped``. Heads of attentions are removed as a whole.

    Args:
        sparsity: Share removed by the end of the phase, 0..1.
        criterion: Scores the weights; the channels with the lowest mean of squared scores go first.
        phase: When. The shrinks are spread evenly over it, the last at its end; a criterion that looks at data observes
            the training steps of the phase.
        steps: Number of shrinks.
        target: What the share is taken of: ``"channels"`` (of those that can be removed), ``"parameters"``,
            ``"macs"`` (multiply-accumulates) or ``"latency"`` (measured on the CPU, one sample).
        scope: ``"global"`` ranks all channels together, each relative to its layer; ``"local"`` each group by itself;
            ``"balanced"`` by the mean of both ranks, with what many layers give and read, such as the width of a
            residual stream, behind the lower half of the others.
        include: Name patterns of the layers whose output channels may go; empty for all.
        exclude: Name patterns of layers that keep their output channels.
        num_heads: Number of heads by the name pattern of an attention, where its forward does not tell.
        round_to: Layers keep a multiple of this number of channels. CPU kernels are made for multiples of 8: with
            others a file is smaller, and may be slower. None is 4 where a depthwise convolution is among them, which
            onnxruntime runs slower than the dense one with others, and 1 elsewhere and with ``targets``.
        floor: Smallest share of its channels that a layer keeps.
        targets: Share removed of the output channels of single layers and of all layers that share them, by name
            pattern; the others lose ``sparsity`` each. Needs ``target="channels"`` and ``scope="local"``.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only once the last channels are removed.
        gate_stopping: Whether EarlyStopping waits likewise.
        strict: Whether a target that is not reached is an error when ``fit`` ends, after checkpoints and files are
            written; else it is a warning.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[ChannelPruning(sparsity=0.5)], logger=False, enable_checkpointing=False)
    """

    progress_class = ChannelProgress

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
        self,
        sparsity: float = 0.5,
        criterion: Criterion | None = None,
        phase: Phase | None = None,
        steps: int = 1,
        target: Target = "channels",
        scope: Scope = "balanced",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        num_heads: Mapping[str, int] | None = None,
        round_to: int | None = None,
        floor: float = 0.1,
        targets: Mapping[str, float] | None = None,
        gate_checkpoints: bool = True,
        gate_stopping: bool = True,
        strict: bool = False,
    ) -> None:
        super().__init__(criterion, phase, include, exclude, gate_checkpoints, gate_stopping, strict)
        self.sparsity = sparsity
        self.steps = steps
        self.target = target
        self.scope = scope
        self.num_heads = {} if num_heads is None else num_heads
        self.round_to = round_to
        self.floor = floor
        self.targets = {} if targets is None else targets
        self._check_values()
        self.num_heads = dict(self.num_heads)
        self.targets = dict(self.targets)

    def _check_values(self) -> None:
        check_number("ChannelPruning.sparsity", self.sparsity, _SHARE, low=0, below=1)
        check_number("ChannelPruning.floor", self.floor, _SHARE, low=0, below=1)
        check_whole_number("ChannelPruning.steps", self.steps, "a whole number from 1", low=1)
        if self.round_to is not None:
            check_whole_number("ChannelPruning.round_to", self.round_to, "a whole number from 1, or None", low=1)
        check_one_of("ChannelPruning.target", self.target, ("channels", "parameters", "macs", "latency"))
        meaning = "'global' ranks all channels together, 'local' those of each group, 'balanced' is in between."
        check_one_of("ChannelPruning.scope", self.scope, ("balanced", "global", "local"), meaning)
        heads = "a dict of whole numbers from 1 by name pattern, such as {'attention': 8}"
        check_by_name("ChannelPruning.num_heads", self.num_heads, heads)
        for pattern, num in self.num_heads.items():
            check_whole_number(f"ChannelPruning.num_heads[{pattern!r}]", num, "a whole number from 1", low=1)
        check_by_name("ChannelPruning.targets", self.targets, "a dict of shares by name pattern, such as {'fc1': 0.5}")
        for pattern, share in self.targets.items():
            check_number(f"ChannelPruning.targets[{pattern!r}]", share, _SHARE, low=0, below=1)
        if self.targets and (self.target, self.scope) != ("channels", "local"):
            raise ValueError(
                f"ChannelPruning.targets={shown(self.targets)} with target={self.target!r}, scope={self.scope!r}: each "
                "layer loses a share of its own. Accepted are target='channels' and scope='local'. Give both, or leave "
                "targets out."
            )

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phase with its name."""
        return [("channels", self.phase)]

    def asked(self) -> dict[str, float]:
        """Share removed of the target; and of the channels of layers with a target of their own."""
        return {self.target: self.sparsity, **{_own(pattern): share for pattern, share in self.targets.items()}}

    def find(self, model: nn.Module) -> tuple[ChannelProgress, dict[str, str]]:
        """Find the groups of channels; warn if the target is out of reach."""
        coupling = self._couple(model, self._rehearse)
        progress = self._count(model, coupling)
        if not coupling.groups:
            rank_zero_warn(f"ChannelPruning finds no channels that can be removed: {coupling.skipped}")
        elif self.targets:
            self._check_targets(coupling)
        else:
            self._check_reach(model, coupling, progress)
        return progress, coupling.skipped

    def choose(
        self, model: nn.Module, progress: ChannelProgress, scores: Mapping[str, Tensor], share: float
    ) -> tuple[Record, ChannelProgress, dict[str, str]]:
        """The channels with the lowest scores, up to the target."""
        coupling = self._couple(model)
        progress = self._count(model, coupling, progress) if progress.changed else copy.deepcopy(progress)
        most = (1 - self.sparsity * share) * progress.dense + 1e-6

        def reached(drops: Drops, record: Callable[[], Record]) -> bool:
            return self._left(model, coupling, drops, record, progress) <= most

        limits = self._limits(progress.widths)
        if self.targets:
            due = shares_due(coupling.groups, progress, self.sparsity, self.targets, share)
            limits = replace(limits, shares=due)
        record, drops, _ = choose_channels(model, self._forward, coupling, scores, limits, reached, self._rehearse)
        if progress.dense:
            progress.removed = 1 - self._left(model, coupling, drops, lambda: record, progress) / progress.dense
        progress.left |= {group.name: num_channels([group], drops) for group in coupling.groups}
        progress.stands = {self.target: progress.removed}
        if self.targets:
            by_pattern = removed_by_pattern(coupling.groups, progress, self.targets)
            removed = {_own(pattern): share for pattern, share in by_pattern.items()}
            # Where each layer has a target of its own there are no others, and all of them have reached theirs.
            progress.stands = {key: removed.get(key, share) for key, share in self.asked().items()}
        return record, progress, coupling.skipped

    def summary(self, record: Record, progress: ChannelProgress) -> str:
        """Channels left of those that could be removed, and whether kernels are made for such widths."""
        words = f"{sum(progress.left.values())} of {sum(progress.widths.values())} channels left"
        odd = {n for name, n in progress.left.items() if n % _BLOCK and progress.widths[name] >= 2 * _BLOCK}
        if odd:
            shown = ", ".join(map(str, sorted(odd)[:_SHOWN]))
            words += f". Widths such as {shown} may run no faster than before: CPU kernels take channels in blocks of "
            words += f"{_BLOCK}, which round_to={_BLOCK} keeps"
        return words

    def _check_reach(self, model: nn.Module, coupling: Coupling, progress: ChannelProgress) -> None:
        """Warn if the target cannot be reached, even by removing all that the limits allow."""
        scores = score_groups(coupling.groups, {})
        most = drop_lowest(coupling.groups, scores, 1.0, self._limits(progress.widths))
        record = partial(record_of, model, coupling.groups, most)
        left = self._left(model, coupling, most, record, progress)
        if left > (1 - self.sparsity) * progress.dense + 1e-6:
            rank_zero_warn(
                f"ChannelPruning.sparsity={self.sparsity}: at most {1 - left / progress.dense:.3f} of the "
                f"{self.target} can be removed, and will be. Lower sparsity or floor, or see ChannelPruning.skipped."
            )

    def _check_targets(self, coupling: Coupling) -> None:
        for pattern in self.targets:
            if not any(pattern_of(group, [pattern]) for group in coupling.groups):
                names = ", ".join(plain_name(layer) for group in coupling.groups for layer in group.layers)
                raise ValueError(
                    f"ChannelPruning.targets[{pattern!r}] matches no layer whose channels can be removed. They are: "
                    f"{names}."
                )

    def _couple(self, model: nn.Module, rehearse: Rehearse | None = None) -> Coupling:
        spoiled = copy_module(model)
        unseen = self._calls.unseen
        coupling = couple(spoiled, self._forward, self.include, self.exclude, self.num_heads, self.skipped, unseen)
        return prove_groups(model, self._forward, coupling, self._limits({}), rehearse)

    def _count(self, model: nn.Module, coupling: Coupling, before: ChannelProgress | None = None) -> ChannelProgress:
        """What there is to remove; where others shrank the model, also what this callback took of that."""
        progress = count_channels(coupling.groups, before)
        if self.target != "channels" and coupling.groups:
            progress.dense = self._amount(model, Record()) / (1 - progress.removed)
        return progress

    def _limits(self, widths: Mapping[str, int]) -> Limits:
        return Limits(self.floor, self.round_to, widths, self.scope)

    def _left(
        self,
        model: nn.Module,
        coupling: Coupling,
        drops: Drops,
        record: Callable[[], Record],
        progress: ChannelProgress,
    ) -> float:
        """How much of the target's quantity a choice leaves, whose record is made where it is needed."""
        if self.target == "channels":
            return progress.channels_left(coupling.groups, drops)
        return self._amount(model, record())

    def _amount(self, model: nn.Module, record: Record) -> float:
        """Parameters, multiply-accumulates or milliseconds of one sample that a record leaves."""
        if self.target == "parameters":
            return float(num_parameters(model, record))
        smaller = copy_module(model)
        apply_record(smaller, record)
        if self.target == "macs":
            return float(self._calls.macs(smaller))
        # The median of five calls is enough: what is asked for is a share, and a search asks often.
        return time_together([self._calls.of_one_sample(smaller)], seconds=0.0)[0].ms


def _own(pattern: str | None) -> str:
    """What is asked of layers with a target of their own, in words."""
    return "channels" if pattern is None else f"channels of {pattern}"
