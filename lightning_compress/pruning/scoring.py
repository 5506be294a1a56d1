"""Scores of a whole model, for those who remove structure: by the names of the weights' tensors."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from lightning_compress.layers import PRUNABLE, Layer, find_layers
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.observation import Observation

__all__ = ["scorable_layers", "scores_by_tensor"]


def scorable_layers(model: nn.Module, criterion: Criterion) -> list[Layer]:
    """The layers that a criterion can score, frozen ones among them; of those that share a weight, the first."""
    layers, _ = find_layers(model, PRUNABLE, skip_tied=True)
    return [layer for layer in layers if criterion.refuses(layer) is None]


@torch.no_grad()
def scores_by_tensor(model: nn.Module, criterion: Criterion, observation: Observation | None) -> dict[str, Tensor]:
    """A criterion's scores, on the CPU; a shared weight has them under each of its names.

    Args:
        model: The model.
        criterion: Gives the scores.
        observation: What the criterion saw; layers that it cannot score have none.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        names[id(p)].append(name)
    scores: dict[str, Tensor] = {}
    for layer in scorable_layers(model, criterion):
        if observation is not None and observation.refuses(layer) is not None:
            continue
        seen = layer if observation is None else observation.layer(layer)
        scores |= dict.fromkeys(names[id(layer.weight)], criterion.score(seen).detach().cpu())
    return scores
