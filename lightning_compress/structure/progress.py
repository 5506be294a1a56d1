"""How much of what was asked has been removed: counted anew where others changed the model, saved in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from lightning_compress.layers import matches, plain_name
from lightning_compress.structure.choose import Drops, num_channels
from lightning_compress.structure.groups import Group

__all__ = ["BlockProgress", "ChannelProgress", "Progress", "count_channels", "pattern_of"]
__all__ += ["removed_by_pattern", "shares_due"]


@dataclass
class Progress:
    """What a callback that removes structure knows between two shrinks.

    Args:
        stands: How much has been removed, by what was asked for.
        changed: Whether others changed the model's shape since.
    """

    stands: dict[str, float] = field(default_factory=dict)
    changed: bool = False

    def to_state(self) -> dict[str, object]:
        """Plain values, with which the class makes the same progress again."""
        return asdict(self)


@dataclass
class BlockProgress(Progress):
    """Progress of removing blocks.

    Args:
        stands: How many have been removed.
        changed: Whether others changed the model's shape since.
        blocks: Names of the blocks that may go, those removed among them.
    """

    blocks: list[str] = field(default_factory=list)


@dataclass
class ChannelProgress(Progress):
    """Progress of removing channels.

    Args:
        stands: Share removed, by what was asked for.
        changed: Whether others changed the model's shape since.
        dense: The target's quantity in the dense model: channels, parameters, multiply-accumulates or milliseconds.
        widths: Channels of the dense groups, by name.
        left: Channels of the groups that are left, by name.
        removed: Share removed of the target.
    """

    dense: float = 0.0
    widths: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    removed: float = 0.0

    def channels_left(self, groups: Sequence[Group], drops: Drops) -> float:
        """Channels that are left after a choice; groups that it does not name stay as they are."""
        others = sum(num for name, num in self.left.items() if name not in drops)
        return float(others + num_channels(groups, drops))


def count_channels(groups: Sequence[Group], before: ChannelProgress | None = None) -> ChannelProgress:
    """Count what there is to remove; ``dense`` counts channels.

    Args:
        groups: The groups of the model as it is.
        before: Progress until others changed the model's shape: what this callback took before still counts.
    """
    left = {group.name: int(group.sizes.sum()) for group in groups}
    widths = dict(left)
    removed = 0.0
    if before is not None:
        removed = before.removed
        for name in left.keys() & before.left.keys():
            # What the others left of a group is its new dense width, of which this callback took the same share.
            widths[name] = round(left[name] * before.widths[name] / before.left[name])
    return ChannelProgress(dense=float(sum(widths.values())), widths=widths, left=left, removed=removed)


def shares_due(
    groups: Sequence[Group], progress: ChannelProgress, sparsity: float, targets: Mapping[str, float], share: float
) -> dict[str, float]:
    """Share that each group loses of the channels it has left.

    Args:
        groups: The groups.
        progress: What they have lost so far.
        sparsity: Share of the dense channels that a group loses in all, 0..1.
        targets: The same for single layers and all that share their channels, by name pattern.
        share: Part of the way that is due, 0..1.
    """
    shares = {}
    for group in groups:
        pattern = pattern_of(group, targets)
        final = sparsity if pattern is None else targets[pattern]
        kept = 1 - final * share
        shares[group.name] = max(0.0, 1 - kept * progress.widths[group.name] / progress.left[group.name])
    return shares


def removed_by_pattern(
    groups: Sequence[Group], progress: ChannelProgress, patterns: Iterable[str]
) -> dict[str | None, float]:
    """Share removed of the channels, by the pattern that names their group; None for those that none names."""
    patterns = list(patterns)
    found: dict[str | None, list[str]] = {}
    for group in groups:
        found.setdefault(pattern_of(group, patterns), []).append(group.name)
    return {
        pattern: 1 - sum(progress.left[name] for name in names) / sum(progress.widths[name] for name in names)
        for pattern, names in found.items()
    }


def pattern_of(group: Group, patterns: Iterable[str]) -> str | None:
    """The first pattern that one of a group's layers matches."""
    names = [plain_name(layer) for layer in group.layers]
    return next((pattern for pattern in patterns if any(matches(name, [pattern]) for name in names)), None)
