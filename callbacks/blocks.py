"""Remove whole blocks while a model trains: it becomes smaller and faster at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.checks import check_number, check_whole_number
from lightning_compress.phase import Phase
from lightning_compress.pruning import Criterion
from lightning_compress.structure.blocks import choose_blocks, find_blocks, freed, record_blocks, score_block
from lightning_compress.structure.progress import BlockProgress
from lightning_compress.structure.record import Record, is_removed, structure_of

from .shrinking import Shrinking

__all__ = ["LayerPruning"]


class LayerPruning(Shrinking[BlockProgress]):
    """Removes whole blocks: those with the lowest scores among the blocks whose output has the shape of their input.

    A block is called once per forward, with one tensor, and returns a tensor of the same shape: a residual block, a
    transformer layer, a square linear layer. An identity takes its place; its parameters leave the optimizer.

    Args:
        num_layers: Number of blocks to remove.
        criterion: Scores the weights; a block's score is the mean of its weights' scores.
        phase: When. The blocks are removed at its end; a criterion that looks at data observes the training steps of
            the phase.
        include: Name patterns of the blocks that may go; empty for all.
        exclude: Name patterns of blocks to keep.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only once the blocks are removed.
        gate_stopping: Whether EarlyStopping waits likewise.
        strict: Whether a target that is not reached is an error when ``fit`` ends, after checkpoints and files are
            written; else it is a warning.
        max_share: The largest share of the model's parameters that a block may hold, above 0, up to 1: what holds more
            is no block but the network, and the blocks inside of it are looked at instead. Parameters that a block
            shares with the rest of the model do not count, for they stay.

    Raises:
        ValueError: If a value is out of range, or there are fewer such blocks.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[LayerPruning(num_layers=2)], logger=False, enable_checkpointing=False)
    """

    progress_class = BlockProgress

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
        self,
        num_layers: int = 1,
        criterion: Criterion | None = None,
        phase: Phase | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        gate_checkpoints: bool = True,
        gate_stopping: bool = True,
        strict: bool = False,
        max_share: float = 0.5,
    ) -> None:
        super().__init__(criterion, phase, include, exclude, gate_checkpoints, gate_stopping, strict)
        self.num_layers = num_layers
        self.max_share = max_share
        self._freed: dict[str, int] = {}  # parameters that went with each block
        check_whole_number("LayerPruning.num_layers", num_layers, "a whole number of blocks from 1", low=1)
        check_number("LayerPruning.max_share", max_share, "a share above 0, up to 1, such as 0.5", above=0, high=1)

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phase with its name."""
        return [("layers", self.phase)]

    def asked(self) -> dict[str, float]:
        """How many blocks are to go."""
        return {"layers": self.num_layers}

    def find(self, model: nn.Module) -> tuple[BlockProgress, dict[str, str]]:
        """Find the blocks, and refuse to remove more than there are."""
        names, skipped = find_blocks(model, self._forward, self.include, self.exclude, self.max_share)
        removable = choose_blocks(
            model, self._forward, names, dict.fromkeys(names, 0.0), self.num_layers, self._rehearse
        )
        if len(removable) < self.num_layers:
            why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            raise ValueError(
                f"LayerPruning.num_layers={self.num_layers}: only {len(removable)} blocks can be removed together, and "
                f"accepted is a number up to that. The blocks whose output has the shape of their input are: "
                f"{', '.join(names) or 'none'}"
                f"{f' (left alone: {why})' if why else ''}. {self._fix(skipped)}"
            )
        return BlockProgress(blocks=names), skipped

    def choose(
        self, model: nn.Module, progress: BlockProgress, scores: Mapping[str, Tensor], share: float
    ) -> tuple[Record, BlockProgress, dict[str, str]]:
        """The blocks with the lowest scores."""
        gone = record_blocks(structure_of(model)["removed"])
        names = [name for name in progress.blocks if not is_removed(name, gone)]
        values = {name: score_block(model, name, scores) for name in names}
        chosen = choose_blocks(model, self._forward, names, values, self.num_layers, self._rehearse)
        if len(chosen) < self.num_layers:
            rank_zero_warn(
                f"LayerPruning.num_layers={self.num_layers}: {len(chosen)} are removed, because other callbacks shrank "
                f"the model before, and without more of {', '.join(names) or 'its blocks'} it would not run. Remove "
                "fewer, or let LayerPruning come first."
            )
        self._freed = {name: freed(model, name) for name in chosen}
        return record_blocks(chosen), replace(progress, stands={"layers": len(chosen)}), self.skipped

    def summary(self, record: Record, progress: BlockProgress) -> str:
        """Names of the removed blocks, and how many parameters went with each."""
        if not record.removed:
            return "no block removed"
        return "without " + ", ".join(
            f"{name} ({self._freed[name]:,} parameters)" if name in self._freed else name for name in record.removed
        )

    def _fix(self, skipped: Mapping[str, str]) -> str:
        if any("max_share" in reason for reason in skipped.values()):
            return "Remove fewer, or raise max_share."
        return "Remove fewer."
