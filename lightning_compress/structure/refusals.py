"""Why groups of channels are left alone, as far as looking at them tells; the rest is for a proof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_compress.layers import matches, plain_name
from lightning_compress.structure.channels import ChannelPlace, entries, located, tensor_of
from lightning_compress.structure.dependencies import Group, grouped

__all__ = ["RECURRENT", "why_left_alone", "without_torn_ties"]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def why_left_alone(
    group: Group,
    modules: Mapping[str, nn.Module],
    frozen: set[int],
    outputs: set[str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    """Why a group is left alone; None where nothing speaks against removing channels.

    Args:
        group: The group.
        modules: All modules of the model, by name.
        frozen: Ids of the parameters that do not train.
        outputs: Names of the layers whose outputs leave the model.
        include: Name patterns of the layers whose channels may go; empty for all.
        exclude: Name patterns of the layers that keep theirs.
    """
    plain = [plain_name(name) for name in group.layers]
    named = any(matches(name, include) for name in plain)
    leaving = [plain_name(name) for name in group.layers if name in outputs]
    if leaving:
        return "an output layer" if len(group.layers) == 1 else f"coupled with the output layer {leaving[0]}"
    if group.why:
        return group.why
    if any(matches(name, exclude) for name in plain):
        return "excluded by name"
    if include and not named:
        return "not included by name"
    for place in group.places:
        why = _why_of_place(place, modules)
        if why is None and not named:
            why = _why_frozen(place, modules, frozen)
        if why is not None:
            return why
    if int(group.atoms.max()) == 0:
        return "its channels all go together"
    return None


def _why_of_place(place: ChannelPlace, modules: Mapping[str, nn.Module]) -> str | None:
    """Why channels cannot leave one of the modules where they are found."""
    name = plain_name(place.module)
    module = modules.get(place.module)
    owner = modules.get(place.module.rpartition(".")[0]) if place.side == "raw" else module
    if isinstance(owner, RECURRENT):
        return f"leads to {name}, a recurrent layer, which is left whole"
    if module is None:
        return None
    num_groups, size = grouped(module, place.side)
    if num_groups > 1 and len(place.channels.unique()) < size:
        return f"{name} computes in groups, of which these are not all channels"
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module._parameters.get("weight") is None:
        return f"the weight of {name} is parametrized or computed by other code"
    # torch's own mark of a layer with three projections
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:  # noqa: SLF001
        return f"keys and values of {name} have sizes of their own"
    for entry in entries(module, place.side):
        tensor = tensor_of(module, entry.key)
        assert tensor is not None
        if entry.positions(place.channels).max() >= tensor.shape[entry.axis]:
            return f"its channels are rearranged on the way to {name}"
    return None


def _why_frozen(place: ChannelPlace, modules: Mapping[str, nn.Module], frozen: set[int]) -> str | None:
    """Why channels of a frozen module stay, unless they are asked for by name."""
    module = modules.get(place.module)
    if module is None or not any(id(tensor_of(module, entry.key)) in frozen for entry in entries(module, place.side)):
        return None
    return f"{plain_name(place.module)} is frozen (requires_grad=False); include the layer by name to take it"


def without_torn_ties(
    model: nn.Module, modules: Mapping[str, nn.Module], groups: Sequence[Group], reasons: dict[str, str]
) -> list[Group]:
    """Leave groups alone in which the copies of one shared weight would lose different channels.

    Args:
        model: The model.
        modules: All its modules, by name.
        groups: The groups.
        reasons: Gets the reason of every group that is left alone, by the names of its layers.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[id(p)].append(name)
    shared = [names for names in owners.values() if len(names) > 1]
    touched = _touched(modules, groups, {name for names in shared for name in names})
    torn: dict[int, str] = {}
    for names in shared:
        for name in names:
            for other in names:
                if touched[name] != touched[other]:
                    pair = f"{plain_name(name)} and {plain_name(other)}"
                    torn |= {number: pair for _, _, number, _ in touched[name] | touched[other]}
    for number, pair in torn.items():
        why = f"{pair} share one weight and would lose different channels"
        reasons |= dict.fromkeys(map(plain_name, groups[number].layers), why)
    return [group for number, group in enumerate(groups) if number not in torn]


def _touched(
    modules: Mapping[str, nn.Module], groups: Sequence[Group], names: set[str]
) -> dict[str, set[tuple[int, int, int, int]]]:
    """By name of a tensor, where it loses what: axis, position, number of the group and atom."""
    touched: dict[str, set[tuple[int, int, int, int]]] = defaultdict(set)
    for number, group in enumerate(groups):
        for place in group.places:
            for name, axis, positions, roots in located(place, modules):
                if name in names:
                    for position, atom in _pairs(positions, group.atoms[roots]):
                        touched[name].add((axis, position, number, atom))
    return touched


def _pairs(positions: Tensor, atoms: Tensor) -> list[tuple[int, int]]:
    return list(zip(positions.flatten().tolist(), atoms.expand_as(positions).flatten().tolist(), strict=True))
