"""Why groups of channels are left alone, as far as looking at them tells; the rest is for a proof."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_compress.layers import matches, plain_name
from lightning_compress.structure.dependencies import Group

__all__ = ["why_left_alone"]


def why_left_alone(group: Group, frozen: set[str], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why a group is left alone; None where nothing speaks against removing channels.

    Args:
        group: The group.
        frozen: Names of the parameters that do not train.
        include: Name patterns of the layers whose channels may go; empty for all.
        exclude: Name patterns of the layers that keep theirs.
    """
    named = any(matches(name, include) for name in group.layers)
    if any(matches(name, exclude) for name in group.layers):
        return "excluded by name"
    if include and not named:
        return "not included by name"
    if not named:
        for place in group.places:
            if place.name in frozen:
                owner = plain_name(place.name.rpartition(".")[0]) or plain_name(place.name)
                return f"{owner} is frozen (requires_grad=False); include the layer by name to take it"
    return None
