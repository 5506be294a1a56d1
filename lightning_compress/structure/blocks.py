"""Which blocks of a model can be left out: found by watching one forward on a copy, proven by another."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.layers import matches, plain_name
from lightning_compress.structure.groups import Forward, tracing
from lightning_compress.structure.record import Record, apply_record

__all__ = ["choose_blocks", "find_blocks", "record_blocks", "score_block"]


def find_blocks(  # noqa: C901  # one branch per reason to leave a block alone
    model: nn.Module, forward: Forward, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Blocks that give back the shape they read, so that the model runs without any of them.

    Of blocks inside blocks the outermost count, unless the inner ones are named.

    Args:
        model: The model; it is copied.
        forward: Calls a model and gives its outputs.
        include: Name patterns of the blocks; empty for all.
        exclude: Name patterns of blocks to keep.

    Returns:
        Names of the blocks in the order of their calls, and those left alone with the reason.

    Raises:
        ValueError: If a pattern matches no module.
    """
    names = {name: plain_name(name) for name, _ in model.named_modules() if name}
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names.values()):
                raise ValueError(
                    f"{key}={pattern!r} matches no module. Give a name, a prefix, or a glob such as 'blocks.*'."
                )
    same, calls, outputs = _watch(model, forward)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    uses = Counter(id(m) for m in model.modules() for m in m.children())
    skipped: dict[str, str] = {}
    found: list[str] = []
    for name in same:
        module, plain = model.get_submodule(name), names[name]
        if calls[name] != 1 or uses[id(module)] > 1:
            skipped[plain] = "called more than once"
        elif include and not any(plain == p or _is_glob_match(plain, p) for p in include):
            continue
        elif matches(plain, exclude):
            skipped[plain] = "excluded by name"
        elif any(id(p) in frozen for p in module.parameters()) and not include:
            skipped[plain] = "frozen (requires_grad=False); include it by name to take it"
        else:
            found.append(name)
    if not include:
        found = _outermost(model, found)
    proven = []
    for name in found:
        why = _why(model, forward, [name], outputs)
        if why is None:
            proven.append(name)
        else:
            skipped[names[name]] = why
    return proven, skipped


def score_block(model: nn.Module, name: str, scores: Mapping[str, Tensor]) -> float:
    """The mean score of the weights of a block.

    Args:
        model: The model.
        name: The block.
        scores: A criterion's scores by the name of the weight's tensor; higher = keep.
    """
    inside = [score.float() for key, score in scores.items() if key.startswith(name + ".")]
    num = sum(score.numel() for score in inside)
    return float(sum(score.sum() for score in inside)) / num if num else 0.0


def choose_blocks(
    model: nn.Module, forward: Forward, names: Sequence[str], scores: Mapping[str, float], num: int
) -> list[str]:
    """The blocks with the lowest scores without which, all together, the model runs; fewer where there are not as many.

    Args:
        model: The model; it is copied.
        forward: Calls a model and gives its outputs.
        names: The blocks.
        scores: A score for each.
        num: How many to remove.
    """
    outputs = _watch(model, forward)[2]
    chosen: list[str] = []
    for name in sorted(names, key=lambda name: scores[name]):
        if len(chosen) < num and _why(model, forward, [*chosen, name], outputs) is None:
            chosen.append(name)
    return chosen


def record_blocks(names: Sequence[str]) -> Record:
    """The record that removes blocks."""
    return Record(removed=list(names))


def _outermost(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Without what lies inside another block, and without what only holds blocks or the whole model."""
    num_parameters = len(list(model.parameters()))

    def holds_blocks(name: str) -> bool:
        lists = [
            n for n, m in model.get_submodule(name).named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)
        ]
        inner = [f"{name}.{n}".rstrip(".") for n in lists]
        blocks = [n for n in names if next(model.get_submodule(n).children(), None) is not None]
        return any(sum(n.rpartition(".")[0] == holder for n in blocks) > 1 for holder in inner)

    kept: list[str] = []
    for name in names:
        whole = len(list(model.get_submodule(name).parameters())) == num_parameters and num_parameters > 2
        if not (whole or holds_blocks(name) or any(name.startswith(other + ".") for other in kept)):
            kept.append(name)
    return kept


def _is_glob_match(name: str, pattern: str) -> bool:
    """Whether a pattern names the block itself, or a module that it lies in directly."""
    return matches(name, [pattern]) and (pattern == name.rpartition(".")[0] or not name.startswith(pattern + "."))


def _watch(model: nn.Module, forward: Forward) -> tuple[list[str], Counter[str], list[Tensor]]:
    """Modules with weights that gave a tensor of the shape they read; calls of every module; the outputs."""
    watched = copy.deepcopy(model).eval()
    calls: Counter[str] = Counter()
    begun: list[str] = []
    same: dict[str, bool] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            calls[name] += 1
            begun.append(name)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            fits = bool(args) and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            fits = fits and args[0].shape == output.shape and args[0].dtype == output.dtype
            same[name] = same.get(name, True) and fits

        return hook

    for name, module in watched.named_modules():
        if (
            name
            and any(p.dim() > 1 for p in module.parameters())
            and not isinstance(module, torch._dynamo.OptimizedModule)
        ):
            whole = name.removesuffix("._orig_mod")  # compiled code keeps what it was made of
            module.register_forward_pre_hook(before(whole))
            module.register_forward_hook(after(whole))
    with tracing(), torch.no_grad():
        outputs = [x for x in torch.utils._pytree.tree_leaves(forward(watched)) if isinstance(x, Tensor)]
    order = list(dict.fromkeys(begun))
    return [name for name in order if same.get(name)], calls, outputs


def _why(model: nn.Module, forward: Forward, names: Sequence[str], expected: Sequence[Tensor]) -> str | None:
    """Why a model does not run without some blocks."""
    smaller = copy.deepcopy(model).eval()
    try:
        apply_record(smaller, record_blocks(names))
        with tracing(), torch.no_grad():
            outputs = [x for x in torch.utils._pytree.tree_leaves(forward(smaller)) if isinstance(x, Tensor)]
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        return f"the model does not run without it: {type(error).__name__}: {lines[0]}"
    if [x.shape for x in outputs] != [x.shape for x in expected]:
        return "the model's output would change its shape"
    return None
