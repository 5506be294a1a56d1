"""Which groups of channels a part of the model may read or feed that no step has run: told by their numbers alone.

What an unseen part is connected to cannot be traced. A group is left alone where one of the part's sizes is one that
the group's channels have anywhere: as channels, flattened, or beside those of another group. A size of inputs that is
nowhere seen could be anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from torch import nn

from lightning_compress.layers import plain_name
from lightning_compress.structure.dependencies import Group

__all__ = ["sizes_of", "without_what_unseen_parts_may_touch"]


def without_what_unseen_parts_may_touch(
    modules: Mapping[str, nn.Module], groups: Sequence[Group], unseen: Sequence[str], reasons: dict[str, str]
) -> list[Group]:
    """Leave groups alone whose channels an unseen part may read or feed.

    Args:
        modules: All modules of the model, by name.
        groups: The groups.
        unseen: Names of the modules with weights that no step has run.
        reasons: Gets the reason of every group that is left alone, by the names of its layers.
    """
    widths = [_widths(group) for group in groups]
    left = dict(enumerate(groups))
    for name, size, reads in _sizes(modules, unseen):
        touched = [i for i, own in enumerate(widths) if size in own]
        if not touched and reads:  # several groups side by side, or a flattening that nothing else has
            touched = [i for i, own in enumerate(widths) if any(width < size for width in own)]
        for i in touched:
            if i in left:
                verb = "read" if reads else "feed"
                why = f"{name}, which no step ran, may {verb} its channels (it has a size of {size})"
                reasons |= dict.fromkeys(map(plain_name, left.pop(i).layers), why)
    return list(left.values())


def sizes_of(model: nn.Module, unseen: Sequence[str]) -> set[int]:
    """The sizes by which unseen modules of a model may be connected to the rest of it."""
    return {size for _, size, _ in _sizes(dict(model.named_modules()), unseen)}


def _widths(group: Group) -> set[int]:
    """The sizes of the axes along which a group's channels lie, in all that is known to read or feed them."""
    named = group.followed.named
    return {int(group.sizes.sum()), *(named[place.name][place.axis].size for place in group.places)}


def _sizes(modules: Mapping[str, nn.Module], unseen: Sequence[str]) -> Iterator[tuple[str, int, bool]]:
    """The sizes by which unseen modules may be connected: the module's name, the size, and whether it is of inputs."""
    plain = {plain_name(name): module for name, module in modules.items()}
    inner = _inner_sides(plain, set(unseen))
    for name in unseen:
        module = plain[name]
        for side in ("in", "out"):
            if (name, side) not in inner:
                yield from ((name, size, side == "in") for size in _sizes_of(module, side))


def _sizes_of(module: nn.Module, side: str) -> set[int]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return {module.in_channels if side == "in" else module.out_channels}
    if isinstance(module, nn.Linear):
        return {module.in_features if side == "in" else module.out_features}
    if isinstance(module, nn.Embedding):
        return {module.embedding_dim} if side == "out" else set()
    # of any other, such as a norm or a parameter of the user's own, each size may be one
    return {size for p in module.parameters(recurse=False) for size in p.shape if size > 1}


def _inner_sides(modules: Mapping[str, nn.Module], unseen: set[str]) -> set[tuple[str, str]]:
    """Sides of unseen layers that lie between two unseen layers of one ``nn.Sequential``."""
    inner: set[tuple[str, str]] = set()
    for name, module in modules.items():
        if isinstance(module, nn.Sequential):
            own = [f"{name}.{key}".lstrip(".") for key, child in module.named_children() if list(child.parameters())]
            inner |= {(child, "in") for before, child in pairwise(own) if before in unseen}
            inner |= {(child, "out") for child, after in pairwise(own) if after in unseen}
    return inner
