"""Where sparsity goes, against loops and the authors' formula."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.layers import Layer, find_layers
from lightning_compress.pruning import Block, Channel, Criterion, Element, Magnitude, Masks, NofM, Pattern, WholeLayer
from lightning_compress.pruning.scopes import erdos_renyi_kernel, keep_groups, split_by_scope

from .helpers import noise, randomized

NETS = {
    "convs": lambda: nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 64, 1)),
        *(nn.ConvTranspose2d(64, 8, 2), nn.Linear(200, 10)),
    ),
    "mlp": lambda: nn.Sequential(nn.Linear(300, 100), nn.Linear(100, 10), nn.Linear(10, 2)),
    "lstm": lambda: nn.Sequential(nn.LSTM(6, 12), nn.Linear(12, 3)),
    "alike": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
}


def rigl(shapes: dict[str, Sequence[int]], sparsity: float) -> dict[str, float]:
    """Sparsities as in the authors' get_mask_random's loop: the layer of the highest probability turns dense first."""
    dense: set[str] = set()
    while True:
        divisor = rhs = 0.0
        raw = {}
        for name, shape in shapes.items():
            num = float(np.prod(shape))
            num_zeros = num * sparsity
            if name in dense:
                rhs -= num_zeros
            else:
                rhs += num - num_zeros
                raw[name] = sum(shape) / num
                divisor += raw[name] * num
        if not raw:
            return dict.fromkeys(shapes, 0.0)
        epsilon = rhs / divisor
        largest = max(raw.values())
        if largest * epsilon <= 1:
            return {name: 0.0 if name in dense else 1 - epsilon * raw[name] for name in shapes}
        dense |= {name for name, value in raw.items() if value == largest}


@pytest.mark.parametrize("net", NETS)
def test_erk_is_the_authors_formula(net: str) -> None:
    layers = find_layers(NETS[net]())[0]
    for sparsity in np.linspace(0, 1, 201).tolist():
        got = erdos_renyi_kernel(layers, sparsity)
        expected = rigl({layer.name: layer.weight.shape for layer in layers}, sparsity)
        assert got == pytest.approx(expected, abs=1e-9)
        assert all(-1e-12 <= share <= 1 for share in got.values())
        kept = sum((1 - got[layer.name]) * layer.weight.numel() for layer in layers)
        assert kept == pytest.approx((1 - sparsity) * sum(layer.weight.numel() for layer in layers))


def test_small_layers_saturate_at_dense() -> None:
    shares = erdos_renyi_kernel(find_layers(NETS["convs"]())[0], 0.3)
    assert [name for name, share in shares.items() if share == 0] == ["0", "2", "3", "5"]
    assert shares["1"] > 0.7


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_targets_are_ranked_alone_and_the_rest_by_scope(scope: str) -> None:
    layers = find_layers(NETS["mlp"]())[0]
    parts = split_by_scope(layers, 0.7, scope, {"1": 0.2})
    assert (parts[0][0][0].name, parts[0][1]) == ("1", 0.2)
    rest = [(layer.name, share) for part, share in parts[1:] for layer in part]
    assert [name for name, _ in rest] == ["0", "2"]
    expected = rigl({"0": (100, 300), "2": (2, 10)}, 0.7) if scope == "erk" else dict.fromkeys(("0", "2"), 0.7)
    assert dict(rest) == pytest.approx(expected)
    assert len(parts) == (2 if scope == "global" else 3)
    assert split_by_scope(layers[:1], 0.7, scope, {"0": 0.1}) == [([layers[0]], 0.1)]
    assert split_by_scope([], 0.7, scope, {}) == []


def greedy(groups: list[list[float]], sizes: list[int], sparsity: float, floor: float) -> list[list[bool]]:
    """Drop the lowest group that may still go, until the share of weights is reached."""
    needed = [math.ceil(floor * (1 - sparsity) * len(g) - 1e-7) if sparsity < 1 else 0 for g in groups]
    keep = [[True] * len(g) for g in groups]
    left = round(sparsity * sum(len(g) * size for g, size in zip(groups, sizes, strict=True)), 6)
    order = sorted(((score, i, j) for i, g in enumerate(groups) for j, score in enumerate(g)), key=lambda t: t[0])
    for score, i, j in order:
        if left <= 1e-6:
            break
        if score < math.inf and sum(keep[i]) > needed[i]:
            keep[i][j] = False
            left -= sizes[i]
    return keep


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("unequal", [True, False], ids=["unequal", "equal"])
@pytest.mark.parametrize("protected", [0.0, 0.3])
@pytest.mark.parametrize("dead", [0.0, 0.2])
def test_groups_go_as_in_a_greedy_loop(floor: float, unequal: bool, protected: float, dead: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        numbers = [int(n) for n in rng.integers(1, 12, rng.integers(1, 6))]
        sizes = [int(n) for n in rng.integers(1, 6, len(numbers))] if unequal else [3] * len(numbers)
        groups = []
        for n in numbers:
            scores = rng.normal(scale=rng.choice([0.1, 1.0, 10.0]), size=n).astype(np.float32)
            scores[rng.random(n) < protected] = np.inf
            scores[rng.random(n) < dead] = -np.inf
            groups.append(torch.from_numpy(scores))
        for sparsity in (0.0, 0.3, 0.55, 0.9, 1.0):
            got = [keep.tolist() for keep in keep_groups(groups, sizes, sparsity, floor)]
            assert got == greedy([g.tolist() for g in groups], sizes, sparsity, floor), (groups, sizes, sparsity)


def test_a_score_that_is_nan_is_an_error_whatever_the_sizes() -> None:
    groups = [torch.tensor([1.0, math.nan]), torch.tensor([2.0])]
    for sizes in ([1, 1], [1, 2]):
        with pytest.raises(ValueError, match="NaN"):
            keep_groups(groups, sizes, 0.5)


class Scored(Criterion):
    """Magnitude that knows only whole layers, so that nothing is streamed."""

    def score(self, layer: Layer) -> Tensor:
        return layer.weight.detach().abs()


def train(models: Sequence[nn.Module], seed: int, digits: int) -> None:
    """Move the kept weights of all models alike; dropped ones stay zero, some of them negative zero."""
    with torch.no_grad():
        for model in models:
            for i, p in enumerate(model.parameters()):
                step = 0.3 * noise(*p.shape, seed=seed + 100 * i)
                p.copy_(torch.where(p == 0, -p, (p + step).round(decimals=digits)))


@pytest.mark.parametrize("net", ["mlp", "lstm", "convs"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("digits", [0, 9], ids=["ties", "distinct"])
def test_the_streamed_path_drops_what_the_scored_path_drops(net: str, scope: str, floor: float, digits: int) -> None:
    streamed = randomized(NETS[net]())
    scored = copy.deepcopy(streamed)
    first, last = (find_layers(streamed)[0][i].name for i in (0, -1))
    both = [Masks(find_layers(model)[0]) for model in (streamed, scored)]
    if digits == 0:  # ties of transposed weights are broken in another order
        both = [Masks([layer for layer in masks.layers if layer.out_axis == 0]) for masks in both]
    with torch.no_grad():
        for model in (streamed, scored):  # a layer that global ranking would empty
            next(iter(model.parameters())).mul_(0.02)
    for targets in ({}, {first: 0.3, last: 0.99}):
        for step, sparsity in enumerate((0.0, 0.2, 0.6, 0.6, 0.97, 1.0)):
            train((streamed, scored), step, digits)
            for masks, criterion in zip(both, (Magnitude(), Scored()), strict=True):
                shares = {name: sparsity * target for name, target in targets.items()}
                masks.update(criterion, Element(), sparsity, scope, targets=shares, floor=floor)
            assert both[0].sparsity == both[1].sparsity
            for a, b in zip(streamed.parameters(), scored.parameters(), strict=True):
                assert torch.equal(a, b), sparsity


@pytest.mark.parametrize("pattern", [Element(), Channel(), Block(2, 2), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_an_update_to_the_same_sparsity_drops_nothing_more(pattern: Pattern, scope: str) -> None:
    """Else every update would count as a rise, and rewind."""
    layers = (nn.Linear(8, 12), nn.Conv2d(4, 6, 2), nn.ConvTranspose2d(4, 8, 3), nn.Linear(12, 4))
    model = randomized(nn.Sequential(*layers))
    masks = Masks(find_layers(model)[0])
    for step, share in enumerate((0.2, 0.2, 0.2, 0.7, 0.7, 1.0, 1.0)):
        before = masks.sparsity
        train([model], step, 9)
        masks.update(Scored(), pattern, 0.9 * share * pattern.max_sparsity, scope, floor=0.2)
        assert (masks.sparsity > before) == (step in (0, 3, 5)), step


def test_a_floor_keeps_a_layer_that_would_be_emptied() -> None:
    model = randomized(nn.Sequential(nn.Linear(20, 50), nn.Linear(50, 10)))
    with torch.no_grad():
        model[1].weight.mul_(1e-4)
    for floor, kept in ((0.0, 0), (0.1, 5), (0.11, 6), (1.0, 50)):
        masks = Masks(find_layers(copy.deepcopy(model))[0])
        masks.update(Magnitude(), Element(), 0.9, "global", floor=floor)
        assert int((masks.layers[1].weight != 0).sum()) == kept
        assert masks.sparsity == pytest.approx(0.9)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_layer_of_one_channel_is_not_emptied_unless_whole_layers_go(scope: str) -> None:
    layers = (nn.Linear(8, 12), nn.Linear(12, 1))
    model = randomized(nn.Sequential(*layers))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    Masks(find_layers(model)[0]).update(Scored(), Channel(), 0.5, scope, floor=0.1)
    assert bool(model[1].weight.all())
    assert int(model[0].weight.any(1).sum()) == (5 if scope == "global" else 6)
    Masks(find_layers(model)[0]).update(Scored(), WholeLayer(), 0.05, "global", floor=0.1)
    assert not model[1].weight.any()
