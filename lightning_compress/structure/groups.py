"""Which channels go together: the groups that can be removed from a model, found by tracing one forward on a copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_compress.checks import first_line
from lightning_compress.layers import EMBEDDING, PRUNABLE, check_patterns, find_layers, plain_name
from lightning_compress.structure.dependencies import ROOTS, Group, find_groups
from lightning_compress.structure.heads import find_attentions
from lightning_compress.structure.refusals import RECURRENT, why_left_alone, without_torn_ties
from lightning_compress.structure.unseen import without_what_unseen_parts_may_touch

__all__ = ["Coupling", "Forward", "Group", "couple", "tracing"]

Forward = Callable[[nn.Module], Any]


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


def couple(
    model: nn.Module,
    forward: Forward,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    num_heads: Mapping[str, int] | None = None,
    skipped: Mapping[str, str] | None = None,
    unseen: Sequence[str] = (),
) -> Coupling:
    """Find the groups of channels that can be removed.

    Args:
        model: A copy of the model, which is spoiled; its parameters say what is frozen.
        forward: Calls the model as training does and returns its outputs.
        include: Name patterns of the layers whose output channels may go; empty for all.
        exclude: Name patterns of layers that keep their output channels.
        num_heads: Heads by the name pattern of an attention, where they cannot be found in its attributes.
        skipped: What was left alone before, with the reason; it stays so.
        unseen: Names of the modules with weights that nothing has run so far.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    layers, reasons = find_layers(model, (*PRUNABLE, *EMBEDDING), (), ())
    names = list(dict.fromkeys([*(layer.module_name for layer in layers), *reasons]))
    check_patterns(names, include=include, exclude=exclude)
    modules = dict(model.named_modules())
    attentions = find_attentions(modules, num_heads or {})
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())  # the trace follows gradients
    # Embeddings are taken here, though other methods take them only where they are named.
    reasons = {name: reason for name, reason in reasons.items() if "taken only when" not in reason}
    # Channels that meet an empty weight have no scores there.
    skipped = {name: reason for name, reason in reasons.items() if "is empty" in reason} | dict(skipped or {})
    with tracing(), torch.enable_grad():
        try:
            graph, outputs = _trace(model, forward)
        except Exception as error:
            why = f"its channels cannot be traced: {first_line(error)}"
            return Coupling([], dict.fromkeys(names, why) | reasons)
        found = list(find_groups(graph, modules, attentions))
    groups: list[Group] = []
    for group in found:
        plain = [plain_name(name) for name in group.layers]
        why_not = why_left_alone(group, modules, frozen, outputs, include, exclude)
        why_not = why_not or next((skipped[name] for name in plain if name in skipped), None)
        if why_not is None:
            groups.append(group)
        else:
            reasons |= dict.fromkeys(plain, why_not)
    groups = without_torn_ties(model, modules, groups, reasons)
    groups = without_what_unseen_parts_may_touch(modules, groups, unseen, reasons)
    reasons |= _not_followed(modules, found, [name for name in names if name not in reasons])
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):  # its output layer is a part of it
            reasons.pop(plain_name(f"{name}.out_proj".lstrip(".")), None)
    return Coupling(groups, {**reasons, **skipped})


def _not_followed(modules: Mapping[str, nn.Module], found: Sequence[Group], names: Sequence[str]) -> dict[str, str]:
    """The reasons of those layers that are in no group."""
    plain = {plain_name(name): module for name, module in modules.items()}
    followed = {plain_name(name) for group in found for name in group.layers}
    reasons = {}
    for name in names:
        if name in followed:
            continue
        module = plain.get(name)
        is_recurrent = isinstance(module, RECURRENT)
        reasons[name] = f"{type(module).__name__} is left whole" if is_recurrent else "not reached by forward"
    return reasons


# This asks autograd, not a lightning_compress.trace.Trace: torch-pruning reads the graph of autograd, and only that
# graph goes through the functions of a user's own autograd.Function.
def _trace(model: nn.Module, forward: Forward) -> tuple[tp.DependencyGraph, set[str]]:
    """The dependency graph, and the names of the layers whose outputs leave the model."""
    layer_of: dict[Node | None, str] = {}
    made: list[Tensor] = []
    results: list[Tensor] = []

    def remember(name: str, module: nn.Module, args: object, output: object) -> None:
        made.extend(_differentiable(output))
        layer_of.update((x.grad_fn, name) for x in _differentiable(output))

    def run(model: nn.Module, _: object) -> list[Tensor]:
        results.extend(_differentiable(forward(model)))
        reached = _nodes([x.grad_fn for x in results])
        # what a router, say, gives leads to no result that could be differentiated
        for x in reversed(made):
            if x.grad_fn not in reached:
                results.append(x)
                reached |= _nodes([x.grad_fn])
        made.clear()
        return list(results)

    graph = tp.DependencyGraph()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (*ROOTS, *RECURRENT)):
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


def _nodes(nodes: Sequence[Node | None]) -> set[Node | None]:
    """Nodes of autograd's graph, and all that they come from."""
    found: set[Node | None] = {None}
    left = list(nodes)
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left.extend(before for before, _ in node.next_functions)
    return found


def _differentiable(values: object) -> list[Tensor]:
    """The tensors that autograd knows the origin of."""
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Tensor) and x.grad_fn is not None]
