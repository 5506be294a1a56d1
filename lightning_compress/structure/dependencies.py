"""Groups of channels that go together, followed through the dependency graph of torch-pruning.

torch-pruning (Fang 2023, arXiv:2301.12900) traces the dependencies; here they become sets of channels, *atoms*, that
are kept or removed as one, and positions along the axes of named tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from lightning_compress.checks import first_line
from lightning_compress.structure.channels import ChannelPlace
from lightning_compress.structure.heads import Attention

__all__ = ["ROOTS", "Group", "find_groups", "grouped"]

# torch-pruning's nodes, functions that cut a side of one, and indices, none of which it has types for.
Node = Any
Handler = Any
Index = Any

ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention)
"""Layers whose output channels can be removed."""


@dataclass
class Group:
    """Channels of layers that are coupled, in atoms that are removed as one.

    Args:
        name: The first of the layers.
        layers: All layers whose outputs are among the channels.
        places: Where the channels are found.
        atoms: The number of the atom of each channel of the root.
        attentions: The attentions whose heads the atoms are.
        why: Why they cannot be removed; empty where they can.
    """

    name: str
    layers: list[str]
    places: list[ChannelPlace]
    atoms: Tensor
    attentions: list[Attention] = field(default_factory=list)
    why: str = ""

    @property
    def sizes(self) -> Tensor:
        """Root channels of every atom."""
        return torch.bincount(self.atoms)


def find_groups(
    graph: tp.DependencyGraph, modules: Mapping[str, nn.Module], attentions: Mapping[str, Attention]
) -> Iterator[Group]:
    """The groups of a traced model, in the order of the trace.

    Args:
        graph: The dependencies of the model.
        modules: All modules of the model, by name.
        attentions: The user's attentions, by the name of each of their layers.
    """
    names = {id(module): name for name, module in modules.items()}
    order = {name: i for i, name in enumerate(modules)}
    done: set[str] = set()
    for root in list(graph.module2node):
        name = names.get(id(root), "")
        if not isinstance(root, ROOTS) or name in done or id(root) not in names:
            continue
        if isinstance(root, nn.Linear) and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            continue
        pruner = graph.get_pruner_of_module(root)
        num = int(pruner.get_out_channels(root))
        if num == 0:
            continue
        try:
            places = list(_reach(graph, root, pruner.prune_out_channels, num, names))
        except Exception as error:  # torch-pruning's mappings of views that it does not know
            why = f"its channels cannot be followed: {first_line(error)}"
            yield Group(name, [name], [], torch.zeros(num, dtype=torch.int64), why=why)
            continue
        outs = {
            place.module for place in places if place.side == "out" and isinstance(modules.get(place.module), ROOTS)
        }
        done |= outs
        layers = sorted(outs, key=order.__getitem__)
        yield _atomize(name, num, layers, [_of_module(place, modules) for place in places], modules, attentions)


def _reach(
    graph: tp.DependencyGraph, root: nn.Module, function: Handler, num: int, names: Mapping[int, str]
) -> Iterator[ChannelPlace]:
    """All channels that follow when channels of the root go, each with every root channel that it follows."""
    for (node, handler), found in _followed(graph, root, function, num).items():
        if not found:
            continue
        channels = torch.tensor([index.idx for index in found])
        roots = torch.tensor([index.root_idx for index in found])
        if isinstance(node.module, nn.Parameter):
            # torch-pruning's names of raw parameters
            name = graph._param_to_name[node.module]  # noqa: SLF001
            yield ChannelPlace(name, "raw", channels, roots, node.pruning_dim)
        elif id(node.module) in names:
            side = "out" if graph.is_out_channel_pruning_fn(handler) else "in"
            yield ChannelPlace(names[id(node.module)], side, channels, roots)


def _followed(
    graph: tp.DependencyGraph, root: nn.Module, function: Handler, num: int
) -> dict[tuple[Node, Handler], dict[Index, None]]:
    """By node and side of the graph, the indices that are reached, in order: a walk until nothing new is found."""
    # torch-pruning's indices have no public name
    start = [tp._helpers._HybridIndex(idx=i, root_idx=i) for i in range(num)]  # noqa: SLF001
    if isinstance(root, nn.modules.conv._ConvNd) and ops.module2type(root) == ops.OPTYPE.DEPTHWISE_CONV:
        function = tp.pruner.function.PrunerBox[ops.OPTYPE.DEPTHWISE_CONV].prune_out_channels
    pairs: dict[tuple[Node, Handler], dict[Index, None]] = defaultdict(dict)
    pairs[graph.module2node[root], function] = dict.fromkeys(start)
    stack = [(graph.module2node[root], function, start)]
    while stack:
        node, handler, indices = stack.pop()
        for dep in node.dependencies:
            if not dep.is_triggered_by(handler):
                continue
            new = indices
            for mapping in dep.index_mapping:
                new = mapping(new) if mapping is not None else new
            known = pairs[dep.target, dep.handler]
            new = [index for index in new if index not in known]
            if new:
                known.update(dict.fromkeys(new))
                stack.append((dep.target, dep.handler, new))
    return pairs


def _of_module(place: ChannelPlace, modules: Mapping[str, nn.Module]) -> ChannelPlace:
    """The weight of a norm that torch-pruning does not know, as a side of its module."""
    owner = place.module.rpartition(".")[0]
    if place.side == "raw" and isinstance(modules.get(owner), nn.RMSNorm):
        return ChannelPlace(owner, "out", place.channels, place.roots)
    return place


def _atomize(
    name: str,
    num: int,
    layers: list[str],
    places: list[ChannelPlace],
    modules: Mapping[str, nn.Module],
    attentions: Mapping[str, Attention],
) -> Group:
    """Join the root channels that a place, a grouped convolution or a head holds together."""
    parent = list(range(num))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(keys: Tensor, roots: Tensor) -> None:
        first: dict[int, int] = {}
        for key, root in zip(keys.tolist(), roots.tolist(), strict=True):
            low, high = sorted((find(first.setdefault(key, root)), find(root)))
            parent[high] = low

    involved: dict[str, Attention] = {}
    for place in places:
        join(place.channels, place.roots)
        module = modules.get(place.module)
        if place.module == name and place.side == "out":
            join(torch.cat([place.channels, torch.arange(num)]), torch.cat([place.roots, torch.arange(num)]))
        groups, size = grouped(module, place.side)
        if groups > 1:
            join(place.channels % (size // groups), place.roots)
        if isinstance(module, nn.MultiheadAttention):
            join(place.channels // module.head_dim, place.roots)
        if place.side == "out" and place.module in attentions:
            attention = attentions[place.module]
            join(place.channels // attention.head_dim % attention.num_heads, place.roots)
            involved[attention.name] = attention
    atoms = torch.tensor([find(i) for i in range(num)]).unique(return_inverse=True)[1]
    return Group(layers[0], layers, places, atoms, list(involved.values()))


def grouped(module: nn.Module | None, side: str) -> tuple[int, int]:
    """In how many groups of channels a module computes, and how many channels these are together."""
    if isinstance(module, nn.modules.conv._ConvNd) and not module.groups == module.in_channels == module.out_channels:
        return module.groups, module.out_channels if side == "out" else module.in_channels
    if isinstance(module, nn.GroupNorm):
        return module.num_groups, module.num_channels
    return 1, 0
