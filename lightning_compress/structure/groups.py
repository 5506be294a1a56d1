"""Which channels go together: the groups that can be removed from a model, found by tracing one forward on a copy.

torch-pruning (Fang 2023, arXiv:2301.12900) traces the dependencies; here they become sets of channels, *atoms*, that
are kept or removed as one, and positions along the axes of named tensors.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch_pruning import ops

from lightning_compress.layers import EMBEDDING, PRUNABLE, find_layers, matches
from lightning_compress.structure.channels import Place, entries, located, plain_name, tensor_of
from lightning_compress.structure.heads import Attention, find_attentions

__all__ = ["Coupling", "Group", "couple", "tracing"]

Forward = Callable[[nn.Module], Any]

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass
class Group:
    """Channels of layers that are coupled, in atoms that are removed as one.

    Args:
        name: The first of the layers.
        layers: All layers whose outputs are among the channels.
        places: Where the channels are found.
        atoms: For each channel of the root the number of its atom.
        attentions: The attentions whose heads the atoms are.
        why: Why they cannot be removed.
    """

    name: str
    layers: list[str]
    places: list[Place]
    atoms: Tensor
    attentions: list[Attention] = field(default_factory=list)
    why: str = ""

    @property
    def sizes(self) -> Tensor:
        """Root channels of every atom."""
        return torch.bincount(self.atoms)


@dataclass
class Coupling:
    """The groups of a model.

    Args:
        groups: Those that may be removed.
        skipped: Name of every layer left alone, with the reason.
    """

    groups: list[Group]
    skipped: dict[str, str]


@contextmanager
def tracing() -> Iterator[None]:
    """Run a copy eagerly, without fused kernels that skip modules, and leave the global random state as it is."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def couple(  # noqa: C901  # the whole way from a trace to groups and refusals
    model: nn.Module,
    forward: Forward,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    num_heads: Mapping[str, int] | None = None,
    skipped: Mapping[str, str] | None = None,
) -> Coupling:
    """Find the groups of channels that can be removed.

    Args:
        model: A copy of the model, which is spoiled; its parameters say what is frozen.
        forward: Calls the model as training does and gives its outputs.
        include: Name patterns of the layers whose output channels may go; empty for all.
        exclude: Name patterns of layers that keep their output channels.
        num_heads: Heads by the name pattern of an attention, where they cannot be found in its attributes.
        skipped: What was left alone before, with the reason; it stays so.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    layers, reasons = find_layers(model, (*PRUNABLE, *EMBEDDING), (), ())
    names = [_module_of(layer.name, layer.parameter) for layer in layers]
    names = list(dict.fromkeys([*names, *reasons]))
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(
                    f"{key}={pattern!r} matches no layer. The layers are: {', '.join(names) or 'none'}. "
                    "Give a name, a prefix of a name, or a glob such as 'encoder.*'."
                )
    modules = dict(model.named_modules())
    attentions = find_attentions(modules, num_heads or {})
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    reasons = {name: reason for name, reason in reasons.items() if "taken only when" not in reason}
    with tracing(), torch.enable_grad():
        try:
            graph, outputs = _trace(model, forward)
        except Exception as error:
            return Coupling([], {name: _reason(error, "be traced") for name in names} | reasons)
        found = list(_groups(graph, modules, attentions))
    groups: list[Group] = []
    for group in found:
        why = _refuse(group, modules, frozen, outputs, include, exclude)
        why = why or next(
            (skipped[name] for name in map(plain_name, group.layers) if skipped and name in skipped), None
        )
        if why:
            reasons |= dict.fromkeys(map(plain_name, group.layers), why)
        else:
            groups.append(group)
    groups = _without_torn_ties(model, modules, groups, reasons)
    plain = {plain_name(name): module for name, module in modules.items()}
    reached = {plain_name(name) for group in found for name in group.layers}
    for name in names:
        if name not in reached and name not in reasons:
            module = plain.get(name)
            kind = type(module).__name__
            reasons[name] = f"{kind} is left whole" if isinstance(module, _RECURRENT) else "not reached by forward"
    for module_name, module in modules.items():  # part of their attention
        if isinstance(module, nn.MultiheadAttention):
            reasons.pop(plain_name(f"{module_name}.out_proj".lstrip(".")), None)
    return Coupling(groups, reasons | dict(skipped or {}))


def _module_of(name: str, parameter: str) -> str:
    return name if parameter == "weight" else name.removesuffix(parameter).rstrip(".")


# This asks autograd, not a lightning_compress.trace.Trace: torch-pruning reads the graph of autograd, and only that
# graph goes through the functions of a user's own autograd.Function.
def _trace(model: nn.Module, forward: Forward) -> tuple[tp.DependencyGraph, set[str]]:
    """The dependency graph, and the names of the layers whose outputs leave the model."""
    layer_of: dict[Node | None, str] = {}
    results: list[Tensor] = []

    def remember(name: str, module: nn.Module, args: object, output: object) -> None:
        layer_of.update((x.grad_fn, name) for x in _differentiable(output))

    def run(model: nn.Module, _: object) -> list[Tensor]:
        results.extend(_differentiable(forward(model)))
        return list(results)

    graph = tp.DependencyGraph()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (*_ROOTS, *_RECURRENT)):
                stack.enter_context(module.register_forward_hook(partial(remember, name)))
        graph.build_dependency(model, None, forward_fn=run, verbose=False)
    return graph, _last_layers([x.grad_fn for x in results], layer_of)


def _last_layers(nodes: Sequence[Node | None], layer_of: Mapping[Node | None, str]) -> set[str]:
    """The layers that nodes of autograd's graph come from, with no other layer between."""
    found: set[str] = set()
    seen: set[Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in layer_of:
            found.add(layer_of[node])
        else:
            left.extend(before for before, _ in node.next_functions)
    return found


def _differentiable(values: object) -> list[Tensor]:
    """The tensors that autograd knows the origin of."""
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Tensor) and x.grad_fn is not None]


def _groups(graph: Any, modules: Mapping[str, nn.Module], attentions: Mapping[str, Attention]) -> Iterator[Group]:
    names = {id(module): name for name, module in modules.items()}
    done: set[str] = set()
    for root in list(graph.module2node):
        name = names.get(id(root), "")
        if not isinstance(root, _ROOTS) or name in done or id(root) not in names:
            continue
        if isinstance(root, nn.Linear) and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            continue
        pruner = graph.get_pruner_of_module(root)
        num = int(pruner.get_out_channels(root))
        try:
            places = list(_reach(graph, root, pruner.prune_out_channels, num, names))
        except Exception as error:  # torch-pruning's mappings of views that it does not know
            yield Group(name, [name], [], torch.zeros(num, dtype=torch.int64), why=_reason(error, "be followed"))
            continue
        outs = [p.module for p in places if p.side == "out" and isinstance(modules.get(p.module), _ROOTS)]
        places = [_of_module(place, modules) for place in places]
        done.update(outs)
        order = {key: i for i, key in enumerate(modules)}
        yield _atomize(name, num, sorted(set(outs), key=order.__getitem__), places, modules, attentions)


# a walk over torch-pruning's graph, with its exceptions
def _reach(graph: Any, root: nn.Module, function: Any, num: int, names: Mapping[int, str]) -> Iterator[Place]:  # noqa: C901
    """All channels that follow when channels of the root go, each with every root channel that it follows."""
    # torch-pruning's indices have no public name
    start = [tp._helpers._HybridIndex(idx=i, root_idx=i) for i in range(num)]  # noqa: SLF001
    if isinstance(root, nn.modules.conv._ConvNd) and ops.module2type(root) == ops.OPTYPE.DEPTHWISE_CONV:
        function = tp.pruner.function.PrunerBox[ops.OPTYPE.DEPTHWISE_CONV].prune_out_channels
    pairs: dict[tuple[Any, Any], dict[Any, None]] = defaultdict(dict)
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
    for (node, handler), found in pairs.items():
        if not found:
            continue
        channels = torch.tensor([index.idx for index in found])
        roots = torch.tensor([index.root_idx for index in found])
        side = "out" if graph.is_out_channel_pruning_fn(handler) else "in"
        if isinstance(node.module, nn.Parameter):
            # torch-pruning's names of raw parameters
            yield Place(graph._param_to_name[node.module], "raw", channels, roots, node.pruning_dim)  # noqa: SLF001
        elif id(node.module) in names:
            yield Place(names[id(node.module)], side, channels, roots)


def _of_module(place: Place, modules: Mapping[str, nn.Module]) -> Place:
    """The weight of a norm that torch-pruning does not know, as a side of its module."""
    owner = place.module.rpartition(".")[0]
    if place.side == "raw" and isinstance(modules.get(owner), nn.RMSNorm):
        return Place(owner, "out", place.channels, place.roots)
    return place


def _atomize(
    name: str,
    num: int,
    layers: list[str],
    places: list[Place],
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
            a, b = find(first.setdefault(key, root)), find(root)
            parent[max(a, b)] = min(a, b)

    involved: dict[str, Attention] = {}
    for place in places:
        join(place.channels, place.roots)
        module = modules.get(place.module)
        if place.module == name and place.side == "out":
            join(torch.cat([place.channels, torch.arange(num)]), torch.cat([place.roots, torch.arange(num)]))
        groups, size = _grouped(module, place.side)
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


def _reason(error: Exception, what: str) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"its channels cannot {what}: {type(error).__name__}: {lines[0]}"


def _grouped(module: nn.Module | None, side: str) -> tuple[int, int]:
    """In how many groups of channels a module computes, and how many channels these are together."""
    if isinstance(module, nn.modules.conv._ConvNd) and not module.groups == module.in_channels == module.out_channels:
        return module.groups, module.out_channels if side == "out" else module.in_channels
    if isinstance(module, nn.GroupNorm):
        return module.num_groups, module.num_channels
    return 1, 0


def _refuse(  # noqa: C901  # one branch per reason to leave channels alone
    group: Group,
    modules: Mapping[str, nn.Module],
    frozen: set[int],
    outputs: set[str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    """Why a group is left alone."""
    plain = [plain_name(name) for name in group.layers]
    named = any(matches(name, include) for name in plain)
    if leaving := [name for name in group.layers if name in outputs]:
        return (
            "an output layer" if len(group.layers) == 1 else f"coupled with the output layer {plain_name(leaving[0])}"
        )
    if group.why:
        return group.why
    if any(matches(name, exclude) for name in plain):
        return "excluded by name"
    if include and not named:
        return "not included by name"
    for place in group.places:
        module = modules.get(place.module)
        owner = modules.get(place.module.rpartition(".")[0]) if place.side == "raw" else module
        if isinstance(owner, _RECURRENT):
            return f"leads to {plain_name(place.module)}, a recurrent layer, which is left whole"
        groups, size = _grouped(module, place.side)
        if groups > 1 and len(place.channels.unique()) < size:
            return f"{plain_name(place.module)} computes in groups, of which these are not all channels"
        tensors = []
        if module is not None:
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module._parameters.get("weight") is None:
                return f"the weight of {plain_name(place.module)} is parametrized or computed by other code"
            # torch's own mark of a layer with three projections
            if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:  # noqa: SLF001
                return f"keys and values of {plain_name(place.module)} have sizes of their own"
            for entry in entries(module, place.side):
                tensor = tensor_of(module, entry.key)
                assert tensor is not None
                if entry.positions(place.channels).max() >= tensor.shape[entry.axis]:
                    return f"its channels are rearranged on the way to {plain_name(place.module)}"
                tensors.append(tensor)
        if not named and any(id(tensor) in frozen for tensor in tensors):
            return f"{plain_name(place.module)} is frozen (requires_grad=False); include the layer by name to take it"
    if int(group.atoms.max()) == 0:
        return "its channels all go together"
    return None


def _without_torn_ties(
    model: nn.Module, modules: Mapping[str, nn.Module], groups: list[Group], reasons: dict[str, str]
) -> list[Group]:
    """Leave groups alone in which the copies of one shared weight would lose different channels."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[id(p)].append(name)
    tied = {name: names for names in owners.values() if len(names) > 1 for name in names}
    touched: dict[str, set[tuple[int, int, int, int]]] = defaultdict(set)
    for number, group in enumerate(groups):
        for place in group.places:
            for name, axis, positions, roots in located(place, modules):
                if name in tied:
                    atoms = group.atoms[roots].expand_as(positions)
                    pairs = zip(positions.flatten().tolist(), atoms.flatten().tolist(), strict=True)
                    touched[name].update((axis, position, number, atom) for position, atom in pairs)
    torn: dict[int, str] = {}
    for name, names in tied.items():
        for other in names:
            if touched[name] != touched[other]:
                pair = f"{plain_name(name)} and {plain_name(other)}"
                torn |= {number: pair for _, _, number, _ in touched[name] | touched[other]}
    for number, pair in torn.items():
        reasons |= dict.fromkeys(
            map(plain_name, groups[number].layers), f"{pair} share one weight and would lose different channels"
        )
    return [group for number, group in enumerate(groups) if number not in torn]
