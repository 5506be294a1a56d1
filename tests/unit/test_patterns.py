"""In what shape: groups of weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_compress.layers import Layer
from lightning_compress.pruning import Element, Magnitude, Masks, Pattern
from lightning_compress.testing import check_pattern

from .helpers import noise


class Channel(Pattern):
    """A pattern as a user would write it."""

    def reduce(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).sum(1)

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        return keep.view(-1, *[1] * (len(shape) - 1)).expand(shape)


@pytest.mark.parametrize("pattern", [Element(), Channel()])
def test_the_contract_is_kept(pattern: Pattern) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4), (2, 3, 3, 3)])
def test_an_element_is_a_group_of_its_own(shape: tuple[int, ...]) -> None:
    scores = noise(*shape)
    assert torch.equal(Element().reduce(scores), scores)
    keep = scores > 0
    assert torch.equal(Element().expand(keep.flatten(), scores.shape), keep)


@pytest.mark.parametrize("module", [nn.Linear(6, 8), nn.Conv2d(3, 8, 3)])
def test_a_pattern_of_ones_own_drops_whole_groups_like_torch(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.copy_(noise(*module.weight.shape))
    reference = nn.Module()
    reference.weight = nn.Parameter(module.weight.detach().clone())
    prune.ln_structured(reference, "weight", amount=3, n=1, dim=0)
    masks = Masks([Layer("x", module)])
    masks.update(Magnitude(), Channel(), 3 / 8, "layer")
    assert torch.equal(module.weight != 0, reference.weight_mask.bool())
