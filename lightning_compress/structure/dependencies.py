"""Groups of channels that go together, and where they lie, read from the axes that a forward was followed along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_compress.structure.axes import Axis, factors_of, leaves_of, place_of
from lightning_compress.structure.literals import Use
from lightning_compress.structure.rules.call import Axes

__all__ = ["Followed", "Group", "Place", "find_groups", "written_by"]


@dataclass
class Followed:
    """What following a forward has shown.

    Args:
        named: The axes of each parameter and buffer, by its name.
        parameters: Names of the parameters.
        read: Names of those that an operation read.
        uses: The sizes that functions were given by attributes.
        inputs: The axes of what modules without weights of their own have read, by the module's name.
    """

    named: dict[str, Axes]
    parameters: set[str]
    read: set[str]
    uses: list[Use]
    inputs: dict[str, Axes]


@dataclass(frozen=True)
class Place:
    """Where channels lie along an axis of a parameter or buffer.

    Args:
        name: The tensor's name.
        axis: The axis.
        positions: Where along it.
        atoms: Which atom of the group lies at each of the positions.
    """

    name: str
    axis: int
    positions: Tensor
    atoms: Tensor


@dataclass
class Group:
    """Channels of layers that are coupled, in atoms that are removed as one.

    Args:
        name: The first of the layers.
        layers: All layers whose outputs are among the channels.
        places: Where the channels lie.
        sizes: Output channels of the first layer per atom: one, or those of a head.
        leaf: Their axis.
        followed: The forward in which they were found.
        block: Number of channels that kernels take at once: with other than a multiple they are slower than before.
    """

    name: str
    layers: list[str]
    places: list[Place]
    sizes: Tensor
    leaf: Axis = field(repr=False)
    followed: Followed = field(repr=False)
    block: int = 1


def find_groups(followed: Followed, outs: Mapping[str, tuple[str, int]]) -> list[Group]:
    """The groups of channels against which nothing speaks, in the order of the layers.

    Of the factors of an axis one alone is taken, the first that can be: heads rather than the channels of a head.

    Args:
        followed: What following a forward has shown.
        outs: The tensor and the axis of the output channels of every layer, by its name.
    """
    chosen = _chosen(followed)
    names: dict[str, int] = {}
    groups: list[Group] = []
    places = _places(followed, chosen)
    for leaf in chosen:
        layers = written_by(leaf, followed, outs)
        own = places[id(leaf)]
        if not any(place.name in followed.read & followed.parameters for place in own):
            continue  # a table of positions, say
        first = (
            next((place for place in own if (place.name, place.axis) == outs.get(layers[0])), own[0])
            if layers
            else own[0]
        )
        name = layers[0] if layers else first.name
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}#{names[name]}"
        sizes = torch.bincount(first.atoms, minlength=leaf.size)
        groups.append(Group(unique, layers or [name], own, sizes, leaf, followed))
    order = {name: i for i, name in enumerate(outs)}
    return sorted(groups, key=lambda group: order.get(group.layers[0], len(order)))


def written_by(leaf: Axis, followed: Followed, outs: Mapping[str, tuple[str, int]]) -> list[str]:
    """The layers among whose outputs the channels of a leaf are."""
    return [
        layer
        for layer, (name, axis) in outs.items()
        if name in followed.read and any(one is leaf for one in leaves_of(followed.named[name][axis]))
    ]


def _chosen(followed: Followed) -> list[Axis]:
    """The leaves that can lose channels, none of them beside another one in a product."""
    chosen: dict[int, Axis] = {}
    held: set[int] = set()
    axes = [axis.now for name, axes in followed.named.items() if name in followed.read for axis in axes]
    for axis in sorted(axes, key=lambda axis: axis.kind == "leaf"):  # products first: they hold leaves
        _choose(axis, chosen, held)
    return list(chosen.values())


def _choose(axis: Axis, chosen: dict[int, Axis], held: set[int]) -> None:
    """Choose leaves of an axis, and note those that are held because others were chosen."""
    axis = axis.now
    if axis.kind == "leaf":
        if _is_free(axis) and id(axis) not in held:
            chosen[id(axis)] = axis
    elif axis.kind == "sum":
        for term in axis.parts:
            _choose(term, chosen, held)
    else:
        factors = factors_of(axis)
        free = [[leaf for leaf in leaves_of(factor) if _is_free(leaf) and id(leaf) not in held] for factor in factors]
        taken = [any(id(leaf) in chosen for leaf in leaves) for leaves in free]
        able = taken if any(taken) else [bool(leaves) for leaves in free]
        if any(able):
            first = able.index(True)
            for i, factor in enumerate(factors):
                if i != first:
                    held |= {id(leaf) for leaf in leaves_of(factor) if id(leaf) not in chosen}
            _choose(factors[first], chosen, held)


def _is_free(leaf: Axis) -> bool:
    return leaf.size > 1 and not leaf.why


def _places(followed: Followed, chosen: Sequence[Axis]) -> dict[int, list[Place]]:
    """Where the channels of leaves lie, by the leaf's id."""
    wanted = {id(leaf) for leaf in chosen}
    places: dict[int, list[Place]] = {key: [] for key in wanted}
    for name, axes in followed.named.items():
        for number, axis in enumerate(axes):
            for leaf in {id(leaf): leaf for leaf in leaves_of(axis) if id(leaf) in wanted}.values():
                for atoms in place_of(axis, leaf):
                    positions = (atoms >= 0).nonzero().flatten()
                    places[id(leaf)].append(Place(name, number, positions, atoms[positions]))
    return places
