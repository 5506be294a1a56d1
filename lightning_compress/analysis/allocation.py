"""Which layer gives up how much: a way from the dense model to a small one, cheapest accuracy first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.analysis.sensitivity import sensitivity
from lightning_compress.checks import check_by_name, check_callable, check_flag, check_instance, check_numbers, shown
from lightning_compress.copies import copy_module
from lightning_compress.forward import Inputs
from lightning_compress.layers import PRUNABLE, find_layers
from lightning_compress.structure.choose import Limits, drop_lowest, score_groups
from lightning_compress.structure.cuts import record_of
from lightning_compress.structure.groups import Group, couple
from lightning_compress.structure.proof import prove_groups
from lightning_compress.structure.record import apply_record

__all__ = ["Allocation", "Point", "allocate"]

_FREE = 1e-3  # a drop below this is as good as none: what one image in a thousand makes

Kind = Literal["shares", "bits", "sparsities"]


@dataclass(frozen=True)
class Allocation:
    """What each layer gives up; what is not named stays as it is.

    Args:
        shares: Share of the output channels that go, by the name of the first layer of those that share them.
        bits: Bits of a layer's weights.
        sparsities: Share of a layer's weights that are zero.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)
    sparsities: Mapping[str, float] = field(default_factory=dict)

    def after(self, kind: Kind, name: str, level: float) -> Allocation:
        """With one layer at another level."""
        return Allocation(**{**vars(self), kind: {**getattr(self, kind), name: level}})


@dataclass(frozen=True)
class Point:
    """A model between dense and small.

    Args:
        plan: What its layers give up.
        cost: What is left of the cost.
        drop: Sum of what they lose of the metric, each alone and without retraining.
    """

    plan: Allocation
    cost: float
    drop: float


@torch.no_grad()
def allocate(  # noqa: PLR0913  # each a setting of its own, given by name
    model: nn.Module,
    inputs: Inputs,
    evaluate: Callable[[nn.Module], float],
    cost: Callable[[nn.Module, Allocation], float],
    *,
    shares: Sequence[float] = (0.25, 0.5, 0.625, 0.75, 0.8125, 0.875),
    bits: Mapping[str, Sequence[int]] | None = None,
    sparsities: Sequence[float] = (),
    more_is_better: bool = True,
) -> list[Point]:
    """Which layers give up what in turn: each step is the one that saves most for what it costs.

    First each layer alone is compressed to each level and the metric measured, without retraining. Then greedily the
    step with the highest saving of cost a lost metric is taken, until all layers are as small as they can be. Costs
    need not add up: every step is priced on the model as it is by then.

    Args:
        model: In eval mode on the CPU, in float32; it is as before in the end.
        inputs: Example inputs of its forward.
        evaluate: The metric of a model.
        cost: What a narrowed model costs with the bits and sparsities of a plan: bytes, multiply-accumulates.
        shares: Shares of their output channels that layers may lose, rising.
        bits: Bits that a layer's weights may have, falling, by name; empty for those of the scheme.
        sparsities: Shares of its weights that a layer may lose, rising.
        more_is_better: Whether a lower metric is worse.

    Returns:
        The points of the way, the dense model first.

    Raises:
        ValueError: If nothing can be given up.
    """
    bits = {} if bits is None else bits
    check_instance("allocate.model", model, nn.Module, "an nn.Module")
    check_instance("allocate.inputs", inputs, Inputs, "Inputs(args, kwargs) of the forward")
    check_callable("allocate.evaluate", evaluate, "a function of the model that returns its metric")
    check_callable("allocate.cost", cost, "a function of a model and an Allocation that returns its cost")
    _check_levels(shares, bits, sparsities)
    check_flag("allocate.more_is_better", more_is_better)

    def forward(model: nn.Module) -> Any:
        return model(*inputs.args, **inputs.kwargs)

    coupling = prove_groups(model, forward, couple(copy_module(model), forward, (), (), {}, {}), Limits())
    scores = score_groups(coupling.groups, _magnitudes(model))

    def narrow(shares: Mapping[str, float]) -> nn.Module:
        smaller = copy_module(model)
        if shares:
            drops = drop_lowest(coupling.groups, scores, 1.0, Limits(floor=0.0, shares=shares))
            apply_record(smaller, record_of(model, coupling.groups, drops))
        return smaller

    levels: dict[tuple[Kind, str], Sequence[float]] = {}
    levels |= {("shares", group.name): _within(group, shares) for group in coupling.groups}
    levels |= {("bits", name): steps for name, steps in bits.items()}
    names = [layer.name for layer in find_layers(model, PRUNABLE, skip_tied=True)[0]]
    levels |= {("sparsities", name): sparsities for name in names}
    if not any(levels.values()):
        raise ValueError(
            f"allocate.shares={shown(shares)}, bits={shown(bits)}, sparsities={shown(sparsities)}: the model has no "
            f"channels that can be removed ({coupling.skipped}), and no other level is given. Accepted is one level at "
            "least. Name bits or sparsities, or other shares."
        )
    dense = evaluate(model)
    sign = 1 if more_is_better else -1
    lost: dict[tuple[Kind, str, float], float] = {
        ("shares", group.name, level): sign * (dense - evaluate(narrow({group.name: level})))
        for group in coupling.groups
        for level in levels["shares", group.name]
    }
    lost |= _lost_in_values(model, inputs, evaluate, bits, sparsities, more_is_better)
    points = [Point(Allocation(), cost(model, Allocation()), 0.0)]
    narrowed = model
    while True:
        now = points[-1]
        best = None
        for (kind, name), steps in levels.items():
            at = getattr(now.plan, kind).get(name)
            level = next(iter(steps if at is None else steps[steps.index(at) + 1 :]), None)
            if level is None:
                continue
            plan = now.plan.after(kind, name, level)
            smaller = narrow(plan.shares) if kind == "shares" else narrowed
            left = cost(smaller, plan)
            more = max(0.0, lost[kind, name, level]) - max(0.0, lost.get((kind, name, at), 0.0))
            worth = (now.cost - left) / max(more, _FREE)
            if left < now.cost and (best is None or worth > best[0]):
                best = worth, Point(plan, left, now.drop + max(more, 0.0)), smaller
        if best is None:
            return points
        points.append(best[1])
        narrowed = best[2]


def _check_levels(shares: Sequence[float], bits: Mapping[str, Sequence[int]], sparsities: Sequence[float]) -> None:
    levels = "a list of shares in 0..1, rising, such as [0.25, 0.5]"
    check_numbers("allocate.shares", shares, levels, low=0, high=1)
    check_numbers("allocate.sparsities", sparsities, levels, low=0, high=1)
    check_by_name("allocate.bits", bits, "a dict of lists of bits by a layer's name, such as {'fc1': [8, 4]}")
    for layer, steps in bits.items():
        widths = "a list of whole numbers in 2..8, falling, such as [8, 4]"
        check_numbers(f"allocate.bits[{layer!r}]", steps, widths, low=2, high=8, whole=True)


def _lost_in_values(
    model: nn.Module,
    inputs: Inputs,
    evaluate: Callable[[nn.Module], float],
    bits: Mapping[str, Sequence[int]],
    sparsities: Sequence[float],
    more_is_better: bool,
) -> dict[tuple[Kind, str, float], float]:
    """What fewer bits and zeros lose of the metric, by layer and level."""
    kinds: dict[str, Kind] = {"bits": "bits", "sparsity": "sparsities"}
    asked = sorted({b for steps in bits.values() for b in steps}, reverse=True)
    if not asked and not sparsities:
        return {}
    found = sensitivity(
        model, evaluate, sparsities=sparsities, bits=asked, more_is_better=more_is_better, inputs=inputs
    )
    return {(kinds[row.kind], row.layer, row.level): row.drop for row in found.rows}


def _within(group: Group, levels: Sequence[float]) -> list[float]:
    """The levels that leave a channel, and differ in what they leave."""
    found: dict[int, float] = {}
    for level in levels:
        num = int(level * int(group.sizes.sum()) + 1e-6)
        if 0 < num < int(group.sizes.sum()):
            found.setdefault(num, level)
    return list(found.values())


def _magnitudes(model: nn.Module) -> dict[str, Tensor]:
    layers, _ = find_layers(model, PRUNABLE, skip_tied=True)
    ours = {id(layer.weight) for layer in layers}
    return {name: p.abs() for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ours}
