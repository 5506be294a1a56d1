"""In what shape: groups of weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_compress.layers import Layer
from lightning_compress.pruning import Block, Channel, Element, Head, Magnitude, Masks, NofM, Pattern, WholeLayer
from lightning_compress.testing import check_pattern

from .helpers import noise
from .test_criteria import channels_of_weights


class Own(Pattern):
    """A pattern as a user would write it."""

    def reduce(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).sum(1)

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        return keep.view(-1, *[1] * (len(shape) - 1)).expand(shape)


SHIPPED = [
    *(Element(), NofM(), NofM(4, 8), NofM(1, 4, axis=0), NofM(2, 3, axis=2), Block(), Block(4, 4), Block(1, 1)),
    *(Channel(), Channel(1), Head(4), Head(2, axis=1), Head(2, fused=2), WholeLayer()),
]


@pytest.mark.parametrize("pattern", [*SHIPPED, Own()], ids=lambda v: type(v).__name__)
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
    masks.update(Magnitude(), Own(), 3 / 8, "layer")
    assert torch.equal(module.weight != 0, reference.weight_mask.bool())


# what is pruned, and a shape that it takes
LAYERS = {
    "linear": (nn.Linear(8, 12), (1, 8)),
    "conv": (nn.Conv2d(8, 12, 2), (1, 8, 3, 3)),
    "grouped": (nn.Conv1d(16, 12, 2, groups=2), (1, 16, 3)),
    "transposed": (nn.ConvTranspose1d(8, 12, 3), (1, 8, 3)),
    "grouped transposed": (nn.ConvTranspose2d(16, 12, 2, groups=2), (1, 16, 3, 3)),
}
Place = tuple[int, int, tuple[int, ...]]  # of a weight: output channel, input channel within its group, in the kernel
PATTERNS: list[tuple[Pattern, Callable[[Place], Any]]] = [
    (Channel(), lambda p: p[0]),
    (Channel(1), lambda p: p[1]),
    (Block(4, 2), lambda p: (p[0] // 4, p[1] // 2, p[2])),
    (Block(3, 1), lambda p: (p[0] // 3, p[1], p[2])),
    (Head(3), lambda p: p[0] // 4),
    (Head(2, axis=1), lambda p: p[1] // 4),
    (Head(2, fused=3), lambda p: p[0] // 2 % 2),
    (WholeLayer(), lambda p: 0),
]


@pytest.fixture(scope="module")
def places() -> dict[str, list[Place]]:
    """Of every weight of a layer, in the order in which it is stored."""
    found = {}
    for kind, (module, shape) in LAYERS.items():
        module = copy.deepcopy(module)
        ins, outs = channels_of_weights(module, shape)
        per_group = (int(ins.max()) + 1) // getattr(module, "groups", 1)
        found[kind] = [
            (int(outs[i]), int(ins[i]) % per_group, i[2:]) for i in np.ndindex(*(int(n) for n in module.weight.shape))
        ]
    return found


def seeded(kind: str) -> nn.Module:
    module = copy.deepcopy(LAYERS[kind][0])
    with torch.no_grad():
        module.weight.copy_(noise(*module.weight.shape))
    return module


def train(module: nn.Module, seed: int) -> None:
    """Move the weights that are still there."""
    with torch.no_grad():
        module.weight += 0.5 * noise(*module.weight.shape, seed=seed) * (module.weight != 0)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("pattern", "group_of"), PATTERNS, ids=[str(p) for p, _ in PATTERNS])
def test_groups_are_dropped_by_their_mean_as_in_a_loop(
    kind: str, pattern: Pattern, group_of: Callable[[Place], Any], places: dict[str, list[Place]]
) -> None:
    module = seeded(kind)
    layer = Layer("x", module)
    assert pattern.refuses(layer.out_first(layer.weight).shape) is None
    masks, dropped = Masks([layer]), set()
    for step, sparsity in enumerate((0.2, 0.5, 0.5, 0.8)):
        train(module, step)
        weights: dict[Any, list[float]] = defaultdict(list)
        for place, w in zip(places[kind], module.weight.detach().flatten().tolist(), strict=True):
            weights[group_of(place)].append(abs(w))
        means = {group: -1.0 if group in dropped else float(np.mean(w)) for group, w in weights.items()}
        num = int(np.ceil(sparsity * len(means) - 1e-9))
        dropped = set(sorted(means, key=means.__getitem__)[:num])
        masks.update(Magnitude(), pattern, sparsity, "layer")
        expected = torch.tensor([group_of(place) not in dropped for place in places[kind]])
        assert torch.equal(module.weight != 0, expected.view_as(module.weight)), sparsity


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("n", "m", "axis"), [(2, 4, 1), (4, 8, 1), (1, 2, 1), (2, 4, 0), (1, 3, 0), (1, 2, 2), (2, 3, 2)]
)
def test_n_of_m_is_greedy_dropping_with_at_most_m_minus_n_of_each_m(
    kind: str, n: int, m: int, axis: int, places: dict[str, list[Place]]
) -> None:
    module = seeded(kind)
    layer, pattern = Layer("x", module), NofM(n, m, axis)
    shape = layer.out_first(layer.weight).shape
    if pattern.refuses(shape):
        assert axis >= len(shape) or shape[axis] % m
        return

    def neighbours(place: Place) -> Any:
        index = [place[0], place[1], *place[2]]
        index[axis] //= m
        return tuple(index)

    masks, dropped = Masks([layer]), set()
    groups = [neighbours(place) for place in places[kind]]
    for step, share in enumerate((0.3, 0.7, 0.7, 1.0)):
        train(module, step)
        sparsity = share * pattern.max_sparsity
        size = module.weight.detach().abs().flatten().tolist()
        per_group: dict[Any, int] = defaultdict(int)
        for i in dropped:
            per_group[groups[i]] += 1
        for i in sorted(range(len(size)), key=size.__getitem__):
            if len(dropped) >= sparsity * len(size) - 1e-9:
                break
            if i not in dropped and per_group[groups[i]] < m - n:
                per_group[groups[i]] += 1
                dropped.add(i)
        masks.update(Magnitude(), pattern, sparsity, "global")
        assert set(torch.where(module.weight.flatten() == 0)[0].tolist()) == dropped, share
    assert all(count == m - n for count in per_group.values())


def test_n_of_m_of_equal_scores_protects_the_first() -> None:
    protected = NofM(2, 4).protects(torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 2.0, 2.0]]))
    assert protected.tolist() == [[True, True, False, False, False, True, True, False]]


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (NofM(2, 4), (8, 6)),
        (NofM(2, 4, axis=0), (6, 8)),
        (NofM(2, 4, axis=2), (8, 8)),
        (NofM(2, 4, axis=3), (8, 8, 3, 3)),
        (Block(16, 1), (24, 8)),
        (Block(1, 3), (24, 8)),
        (Head(3), (8, 8)),
        (Head(4, fused=3), (16, 8)),
        (Head(3, axis=1), (9, 8)),
    ],
    ids=str,
)
def test_shapes_that_have_no_such_groups_are_refused_in_words(pattern: Pattern, shape: tuple[int, ...]) -> None:
    assert len((pattern.refuses(torch.Size(shape)) or "").split()) >= 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NofM(4, 4), r"NofM\.n=4: accepted is a whole number in 1..3, below m"),
        (lambda: NofM(0, 4), r"n=0"),
        (lambda: NofM(1.5, 4), r"n=1.5"),
        (lambda: NofM("2", 4), r"n='2'"),
        (lambda: NofM(2, 4, axis=-1), r"axis=-1"),
        (lambda: Block(0, 1), r"Block\.rows=0: accepted is a whole number of output channels from 1"),
        (lambda: Block(4, 0.5), r"columns=0.5"),
        (lambda: Channel(2), r"Channel.axis=2: accepted are 0 and 1. 0 is the output"),
        (lambda: Head(0), r"Head\.num_heads=0: accepted is a whole number of heads from 1"),
        (lambda: Head(4, axis=3), r"axis=3"),
        (lambda: Head(4, fused=0), r"fused=0"),
    ],
)
def test_groups_that_cannot_be_are_refused(make: Callable[[], Pattern], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
