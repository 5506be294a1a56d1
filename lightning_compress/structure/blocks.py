"""Which blocks of a model can be left out: found by watching one forward on a copy, proven by another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.checks import first_line
from lightning_compress.copies import copy_module
from lightning_compress.layers import matches, plain_name
from lightning_compress.structure.groups import Forward, tracing
from lightning_compress.structure.proof import Rehearse
from lightning_compress.structure.record import Record, apply_record
from lightning_compress.trace import Began, Ended, Trace
from lightning_compress.watch import Watch

__all__ = ["choose_blocks", "find_blocks", "freed", "record_blocks", "score_block"]


def find_blocks(
    model: nn.Module,
    forward: Forward,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_share: float = 0.5,
) -> tuple[list[str], dict[str, str]]:
    """Blocks that give back the shape they read, so that the model runs without any of them.

    Of blocks inside blocks the outermost count, unless the inner ones are named. Of a block that holds more of the
    model than it may, the blocks inside count.

    Args:
        model: The model; it is copied.
        forward: Calls a model and gives its outputs.
        include: Name patterns of the blocks; empty for all.
        exclude: Name patterns of blocks to keep.
        max_share: The largest share of the model's parameters that a block may have to itself, 0..1.

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
    watched = copy_module(model).eval()
    with Watch(watched) as watch:
        outputs = _outputs(watched, forward)
    found, skipped = _sort(model, watch.trace, include, exclude)
    found = _no_networks(model, found, max_share, skipped)
    if not include:
        found = _outermost(model, found)
    proven = []
    for name in found:
        why = _why_needed(model, forward, [name], outputs)
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
    model: nn.Module,
    forward: Forward,
    names: Sequence[str],
    scores: Mapping[str, float],
    num: int,
    rehearse: Rehearse | None = None,
) -> list[str]:
    """The blocks with the lowest scores without which, all together, the model runs; fewer where there are not as many.

    Args:
        model: The model; it is copied.
        forward: Calls a model and gives its outputs.
        names: The blocks.
        scores: A score for each.
        num: How many to remove.
        rehearse: Runs a smaller model in all that it is used for.
    """
    outputs = _outputs(copy_module(model).eval(), forward)
    chosen: list[str] = []
    for name in sorted(names, key=lambda name: scores[name]):
        tried = [*chosen, name]
        if len(chosen) < num and _why_needed(model, forward, tried, outputs) is None:
            smaller = copy_module(model)
            apply_record(smaller, record_blocks(tried))
            if rehearse is None or rehearse(smaller) is None:
                chosen.append(name)
    return chosen


def freed(model: nn.Module, name: str) -> int:
    """Parameters that go with a block: those that it shares with nothing outside of it.

    Args:
        model: The model.
        name: The block.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> model[1].weight = model[0].weight
        >>> freed(model, "1")
        4
    """
    inside = set(model.get_submodule(name).modules())
    kept = {id(p) for module in model.modules() if module not in inside for p in module._parameters.values()}
    return sum(p.numel() for p in model.get_submodule(name).parameters() if id(p) not in kept)


def record_blocks(names: Sequence[str]) -> Record:
    """The record that removes blocks."""
    return Record(removed=list(names))


def _sort(
    model: nn.Module, trace: Trace, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Names of the blocks that may be removed as far as a trace shows, and those left alone with the reason."""
    # what is compiled holds the module that it was made of: both have one plain name, and the outer one is the block
    names: dict[str, str] = {}
    for name, _ in model.named_modules():
        names.setdefault(plain_name(name), name)
    num_calls = _most_calls(trace)
    num_places = Counter(id(child) for module in model.modules() for child in module.children())
    found: list[str] = []
    skipped: dict[str, str] = {}
    for plain in _shape_keepers(trace):
        module = model.get_submodule(names[plain])
        own = list(module.parameters())
        is_frozen = any(not p.requires_grad for p in own)
        if not plain or not any(p.dim() > 1 for p in own):
            continue
        if num_calls[plain] != 1 or num_places[id(module)] > 1:
            skipped[plain] = "called more than once"
        elif include and not any(plain == pattern or _is_named(plain, pattern) for pattern in include):
            continue
        elif matches(plain, exclude):
            skipped[plain] = "excluded by name"
        elif is_frozen and not include:
            skipped[plain] = "frozen (requires_grad=False); include it by name to take it"
        else:
            found.append(names[plain])
    return found, skipped


def _no_networks(model: nn.Module, names: Sequence[str], max_share: float, skipped: dict[str, str]) -> list[str]:
    """Those without which most of the model is left; the reason for the others goes into ``skipped``."""
    total = sum(p.numel() for p in model.parameters())
    kept = []
    for name in names:
        share = freed(model, name) / max(1, total)
        if share <= max_share:
            kept.append(name)
        else:
            skipped[plain_name(name)] = (
                f"it holds {share:.0%} of the model's parameters, and a block may hold up to {max_share:.0%} "
                "(max_share)"
            )
    return kept


def _most_calls(trace: Trace) -> Counter[str]:
    """How often each module was called on the way that called it most."""
    most: Counter[str] = Counter()
    now: Counter[str] = Counter()
    depth = 0
    for event in trace.events:
        if isinstance(event, Began):
            depth += 1
            now[event.name] += 1
        elif isinstance(event, Ended):
            depth -= 1
            if not depth:
                most |= now
                now = Counter()
    return most


def _shape_keepers(trace: Trace) -> list[str]:
    """Modules that gave a tensor of the shape and type that they read, in all calls; in the order of the first ones."""
    keeps: dict[str, bool] = {}
    for event in trace.events:
        if isinstance(event, Began):
            keeps.setdefault(event.name, True)
        elif isinstance(event, Ended):
            read = event.args[0] if event.args else None
            given = event.output
            if read is None or given is None or (read.shape, read.dtype) != (given.shape, given.dtype):
                keeps[event.name] = False
    return [name for name, keeps_shape in keeps.items() if keeps_shape]


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


def _is_named(name: str, pattern: str) -> bool:
    """Whether a pattern names the block itself, or a module that it lies in directly."""
    return matches(name, [pattern]) and (pattern == name.rpartition(".")[0] or not name.startswith(pattern + "."))


def _outputs(model: nn.Module, forward: Forward) -> list[Tensor]:
    """The tensors that a copy of the model gives."""
    with tracing(), torch.no_grad():
        return [x for x in torch.utils._pytree.tree_leaves(forward(model)) if isinstance(x, Tensor)]


def _why_needed(model: nn.Module, forward: Forward, names: Sequence[str], expected: Sequence[Tensor]) -> str | None:
    """Why a model does not run without some blocks; None where it does."""
    smaller = copy_module(model).eval()
    try:
        apply_record(smaller, record_blocks(names))
        outputs = _outputs(smaller, forward)
    except Exception as error:
        return f"the model does not run without it: {first_line(error)}"
    if [x.shape for x in outputs] != [x.shape for x in expected]:
        return "the model's output would change its shape"
    return None
