"""Which layers of a model are pruned, how far each, and whether a criterion can see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.computed import keeps_zeros, takes_empty_rows
from lightning_compress.layers import PRUNABLE, QUANTIZABLE, Layer, find_layers, matches, modules_by_name, plain_name
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.observation import Observation
from lightning_compress.pruning.patterns import Element, NofM, Pattern
from lightning_compress.pruning.sharding import whole
from lightning_compress.structure.mirrors import find_mirrors

__all__ = ["check_finite", "find_prunable", "observe", "targets_by_layer", "unseen"]


def find_prunable(
    model: nn.Module,
    criterion: Criterion,
    pattern: Pattern,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep_first: bool = False,
    keep_last: bool = False,
) -> tuple[list[Layer], dict[str, str]]:
    """The layers that a criterion can score and a pattern fits.

    Args:
        model: The model.
        criterion: Scores the weights.
        pattern: The shape in which they are dropped.
        include: Name patterns; empty for all.
        exclude: Name patterns of layers to leave dense.
        keep_first: Leave the first layer dense.
        keep_last: Leave the last layer dense.

    Returns:
        The layers, and a dict of name to reason for every weight left alone.

    Raises:
        ValueError: If a name pattern matches no layer.
    """
    found, skipped = find_layers(model, PRUNABLE, include, exclude, skip_frozen=True, skip_tied=True)
    layers = []
    averages = {plain_name(copy): source for copy, source in find_mirrors(model).items() if source is not None}
    for i, layer in enumerate(found):
        average = next((copy for copy in averages if layer.name.startswith(f"{copy}.")), None)
        if average is not None:
            skipped[layer.name] = f"an average of {averages[average]}, which it follows"
            continue
        reason = criterion.refuses(layer) or pattern.refuses(_shape(layer)) or _why_not_computed(layer, pattern)
        if keep_first and i == 0:
            reason = "the first layer stays dense (keep_first)"
        if keep_last and i == len(found) - 1:
            reason = "the last layer stays dense (keep_last)"
        if reason is None:
            layers.append(layer)
        else:
            skipped[layer.name] = reason
    return layers, skipped


def _why_not_computed(layer: Layer, pattern: Pattern) -> str | None:
    """Why zeros in the parameter that a weight is computed from do not do."""
    if not layer.source:
        return None
    if not keeps_zeros(layer.module, layer.source):
        return "the layer multiplies by what it computes from the weight, where zeros do not stay zeros"
    if not isinstance(pattern, Element | NofM) and not takes_empty_rows(layer.module, layer.source):
        return f"a row of zeros comes to NaN in what the layer computes from the weight, and {pattern} makes such rows"
    return None


def _shape(layer: Layer) -> torch.Size:
    """The weight's shape as patterns see it."""
    return layer.out_first(torch.empty(layer.weight.shape, device="meta")).shape


def targets_by_layer(name: str, targets: Mapping[str, float], layers: Sequence[Layer]) -> dict[str, float]:
    """Sparsities of single layers by their names; of several patterns that match a layer, the last counts.

    Args:
        name: Who was given the targets, for the message.
        targets: Sparsities by name pattern.
        layers: The layers that are pruned.

    Raises:
        ValueError: If a pattern matches none of them.
    """
    found: dict[str, float] = {}
    for pattern, target in targets.items():
        named = [layer.name for layer in layers if matches(layer.name, [pattern])]
        if not named:
            raise ValueError(
                f"{name}.targets[{pattern!r}] matches no layer that is pruned. They are: "
                f"{', '.join(layer.name for layer in layers) or 'none'}."
            )
        found |= dict.fromkeys(named, target)
    return found


def check_finite(name: str, model: nn.Module) -> None:
    """Raise unless all weights of a model are finite; of sharded ones, on all processes.

    Args:
        name: Who is to compress the model, for the message.
        model: The model.

    Raises:
        ValueError: If a layer, or a parameter that is trained, holds NaN or an infinity.
    """
    bad = {}
    for prefix, module in modules_by_name(model).items():
        for key, value in module._parameters.items():
            if value is None or isinstance(value, nn.UninitializedParameter) or not value.is_floating_point():
                continue
            # A frozen parameter of the user's own may hold an infinity on purpose, as masks do.
            if not value.requires_grad and not isinstance(module, QUANTIZABLE):
                continue
            num = value.numel() - int(whole(torch.isfinite(value.detach()).sum()))
            if num:
                bad[f"{prefix}.{key}".removeprefix(".").removesuffix(".weight")] = num
    if bad:
        layers = ", ".join(f"{layer} has {num} weights" for layer, num in bad.items())
        raise ValueError(
            f"{name}: {layers} that are NaN or infinite before training starts. Accepted are finite ones. Start from a "
            "checkpoint that is finite."
        )


def observe(name: str, criterion: Criterion, layers: Sequence[Layer], model: nn.Module) -> Observation | None:
    """What observes a model for a criterion; None for one that reads weights alone.

    Args:
        name: Who was given the criterion, for the message.
        criterion: The criterion.
        layers: The layers that it scores.
        model: The model.

    Raises:
        ValueError: If the model has no batch norm to read, or is compiled and hides its activations.
    """
    if not criterion.needs_data:
        return None
    if criterion.needs_norm and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        raise ValueError(
            f"{name}.criterion={criterion}: the model has no batch norm. Take another criterion, such as Magnitude()."
        )
    compiled = [key for key, m in model.named_modules() if isinstance(m, torch._dynamo.OptimizedModule)]
    if compiled and not criterion.observes_gradients:
        raise ValueError(
            f"{name}.criterion={criterion}: it observes activations by hooks, which torch.compile overlooks in "
            f"{', '.join(compiled)}. Prune uncompiled, or take a criterion that reads weights or gradients, such as "
            "Magnitude() or Taylor()."
        )
    return Observation(criterion, layers, model)


def unseen(observation: Observation, layers: Sequence[Layer]) -> dict[str, str]:
    """The layers that turned out not to be scored, each with its reason."""
    reasons = {layer.name: observation.refuses(layer) for layer in layers}
    return {name: reason for name, reason in reasons.items() if reason is not None}
