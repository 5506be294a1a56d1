"""Which channels go together: the groups that can be removed from a model, found by following one forward on a copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.checks import first_line
from lightning_compress.layers import EMBEDDING, PRUNABLE, check_patterns, find_layers, matches, plain_name
from lightning_compress.structure.axes import leaves_of, split_in_two
from lightning_compress.structure.dependencies import Followed, Group, find_groups, written_by
from lightning_compress.structure.follow import AN_INPUT, AN_OUTPUT, Follow
from lightning_compress.structure.literals import Uses, marked
from lightning_compress.structure.refusals import why_left_alone
from lightning_compress.structure.rules.call import Axes
from lightning_compress.structure.sizes import is_sized
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
        model: A copy of the model, which is run.
        forward: Calls the model as training does and returns its outputs.
        include: Name patterns of the layers whose output channels may go; empty for all.
        exclude: Name patterns of layers that keep their output channels.
        num_heads: Heads by the name pattern of an attention, where its forward does not tell.
        skipped: What was left alone before, with the reason; it stays so.
        unseen: Names of the modules with weights that nothing has run so far.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    layers, reasons = find_layers(model, (*PRUNABLE, *EMBEDDING), (), ())
    names = list(dict.fromkeys([*(layer.module_name for layer in layers), *reasons]))
    check_patterns(names, include=include, exclude=exclude)
    modules = {plain_name(name): module for name, module in model.named_modules()}
    _check_heads(modules, num_heads or {})
    # Embeddings are taken here, though other methods take them only where they are named.
    reasons = {name: reason for name, reason in reasons.items() if "taken only when" not in reason}
    # Channels that meet an empty weight have no scores there.
    skipped = {name: reason for name, reason in reasons.items() if "is empty" in reason} | dict(skipped or {})
    try:
        try:
            followed = _follow(model, forward, num_heads or {}, marked(model))
        except Exception:  # code that takes numbers for what they are not, such as keys
            followed = _follow(model, forward, num_heads or {}, nullcontext())
    except Exception as error:
        why = f"its channels cannot be followed: {first_line(error)}"
        return Coupling([], dict.fromkeys(names, why) | reasons)
    outs = _outs(model, names)
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    groups: list[Group] = []
    left_alone: dict[str, str] = {}
    for group in find_groups(followed, outs):
        why_not = why_left_alone(group, frozen, include, exclude)
        why_not = why_not or next((skipped[name] for name in group.layers if name in skipped), None)
        if why_not is None:
            groups.append(replace(group, block=_block(group, modules)))
        else:
            left_alone |= dict.fromkeys(group.layers, why_not)
    unseen = [name for name in unseen if not _is_read(name, followed)]
    groups = without_what_unseen_parts_may_touch(modules, groups, unseen, left_alone)
    taken = {name for group in groups for name in group.layers}
    for name in names:
        if name not in taken and name not in left_alone:
            left_alone[name] = _why_whole(name, modules, followed, outs) or reasons.get(name, "")
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):  # its output layer is a part of it
            left_alone.pop(f"{name}.out_proj".lstrip("."), None)
    return Coupling(groups, {**{n: why for n, why in left_alone.items() if n not in taken}, **skipped})


_FOURS = 4  # channels that onnxruntime's kernels of depthwise convolutions take at once; else it runs one by one
_WIDE = 16  # channels of which three more or less are few


def _block(group: Group, modules: Mapping[str, nn.Module]) -> int:
    """Fours where a depthwise convolution gives the channels, if they are many."""
    of_its_layers = [modules.get(plain_name(name)) for name in group.layers]
    num_groups = [(getattr(module, "groups", 1), getattr(module, "in_channels", 0)) for module in of_its_layers]
    is_depthwise = any(1 < num == width for num, width in num_groups)
    return _FOURS if is_depthwise and int(group.sizes.sum()) >= _WIDE else 1


def _is_read(name: str, followed: Followed) -> bool:
    """Whether all weights of a module were read through another one that shares them."""
    own = {full for full in followed.parameters if plain_name(full).rpartition(".")[0] == name}
    return bool(own) and own <= followed.read


def _check_heads(modules: Mapping[str, nn.Module], num_heads: Mapping[str, int]) -> None:
    for pattern in num_heads:
        if not any(matches(name, [pattern]) for name in modules):
            raise ValueError(
                f"num_heads={pattern!r} matches no module. Give the name of an attention or a glob such as '*.attn'."
            )


def _follow(
    model: nn.Module, forward: Forward, num_heads: Mapping[str, int], marks: AbstractContextManager[None]
) -> Followed:
    """Follow the axes of a forward; what it gives keeps its shape."""
    model.eval()
    follow = Follow(model)
    uses = Uses(follow.axes_of)
    inputs: dict[str, Axes] = {}

    def reads(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            inputs[name] = follow.axes_of(args[0])

    with ExitStack() as stack:
        for context in (tracing(), torch.no_grad(), marks, follow, uses):
            stack.enter_context(context)
        for name, module in model.named_modules():
            if is_sized(module):
                stack.callback(module.register_forward_pre_hook(partial(reads, name)).remove)
            given = [num for pattern, num in num_heads.items() if matches(plain_name(name), [pattern])]
            for linear in module.children() if given else ():
                if isinstance(linear, nn.Linear) and linear.out_features % given[0] == 0:
                    _in_heads(follow.axes_of(linear.weight), given[0], linear)
        follow.pin(forward(model), AN_OUTPUT)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return Followed(follow.named, parameters, follow.read, uses.found, inputs)


def _in_heads(weight: Axes, num: int, linear: nn.Linear) -> None:
    """Let the outputs of queries, keys and values lie by heads."""
    thrice = linear.out_features == 3 * linear.in_features
    halves = split_in_two(weight[0], 3) if thrice else (None, weight[0])
    if halves is not None and linear.out_features % num == 0:
        split_in_two(halves[1], num)


def _outs(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The tensor and the axis of the output channels of every layer, by its name."""
    plain = {plain_name(name): name for name, _ in model.named_modules()}
    found: dict[str, tuple[str, int]] = {}
    layers = {layer.module_name: layer for layer in find_layers(model, (*PRUNABLE, *EMBEDDING), (), ())[0]}
    for name in names:
        layer = layers.get(name)
        module = model.get_submodule(plain[name]) if name in plain else None
        if isinstance(module, nn.MultiheadAttention):
            found[name] = f"{plain[name]}.out_proj.weight".lstrip("."), 0
        elif layer is not None:
            axis = 1 if isinstance(layer.module, EMBEDDING) else layer.out_axis
            tensor = layer.source or layer.parameter
            found[name] = f"{plain.get(layer.module_name, layer.module_name)}.{tensor}".lstrip("."), axis
        elif module is not None:
            own = _computed_from(module)
            if own is not None:
                found[name] = f"{plain[name]}.{own}".lstrip("."), 1 if getattr(module, "transposed", False) else 0
    return found


def _computed_from(module: nn.Module) -> str | None:
    """The parameter that a weight is computed from, which has its shape: of a weight norm the direction."""
    keys = [key for key, p in module.named_parameters() if "weight" in key and p.dim() > 1]
    return max(keys, key=lambda key: module.get_parameter(key).numel(), default=None)


def _why_whole(
    name: str, modules: Mapping[str, nn.Module], followed: Followed, outs: Mapping[str, tuple[str, int]]
) -> str | None:
    """Why the output channels of a layer are in no group."""
    if name not in outs:
        return None
    tensor, axis = outs[name]
    if tensor not in followed.read:
        return "not reached by forward"
    for leaf in leaves_of(followed.named[tensor][axis]):
        if leaf.why == AN_OUTPUT:
            others = [other for other in written_by(leaf, followed, outs) if other != name]
            return AN_OUTPUT if not others else f"coupled with the output layer {others[-1]}"
        if leaf.why == AN_INPUT:
            return "coupled with the model's input"
        if leaf.why and leaf.size > 1:
            return leaf.why
    return "it has a single output channel"
