"""Channels are followed through other people's architectures, and half of them can go."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.structure.axes import Axis, leaves_of, place_of, product_of, side_by_side, split_in_two, unite
from lightning_compress.structure.choose import Limits, drop_lowest
from lightning_compress.structure.cuts import record_of
from lightning_compress.structure.groups import couple
from lightning_compress.structure.proof import prove_groups
from lightning_compress.structure.record import apply_record

from . import attentions as parts

WORDS = torch.arange(16).view(2, 8) % 20
PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str]]] = {
    "grouped queries": (lambda: parts.Text(parts.GroupedQueries(32, 4, 2, 8)), WORDS, {"ask", "tell", "out"}),
    "one key for all": (lambda: parts.Text(parts.GroupedQueries(32, 4, 1, 8)), WORDS, {"ask", "out"}),
    "interleaved": (
        lambda: parts.Text(parts.GroupedQueries(32, 4, 4, 8, parts.interleaved)),
        WORDS,
        {"ask", "tell", "out"},
    ),
    **{
        f"fused {layout}": (lambda layout=layout: parts.Text(parts.Fused(32, 4, layout)), WORDS, {"qkv", "out"})
        for layout in ("3hd", "h3d", "hd3", "split")
    },
    "einsum": (lambda: parts.Text(parts.ByEinsum(32, 4, 8)), WORDS, {"q", "k", "v", "o", "relative"}),
    "experts": (lambda: parts.Text(parts.Experts(32, 4, 24)), WORDS, {"up", "down"}),
    "separate experts": (lambda: parts.Text(parts.SeparateExperts(32)), WORDS, {"experts.0.0", "experts.1.0"}),
    "cross attention": (lambda: parts.Text(parts.Crossing(32, 24, 4)), WORDS, {"make", "q", "kv", "out"}),
    "pooler": (lambda: parts.Text(parts.Pooled(32)), WORDS, {"pooler", "inner"}),
    "windows": (lambda: parts.Images(parts.Windows(32, 4)), PICTURES, {"inner.qkv", "inner.out"}),
    "channels first": (lambda: parts.Images(parts.ChannelsFirstNorm(32), nn.Conv2d(32, 32, 1)), PICTURES, {"1"}),
    "skips": (parts.Skips, PICTURES, {"a.0", "b.0", "up", "c.0"}),
    "weight norm": (lambda: parts.Images(parts.weight_normed(old=False)), PICTURES, {"0", "2"}),
    "old weight norm": (lambda: parts.Images(parts.weight_normed(old=True)), PICTURES, {"0", "2"}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", list(MODELS))
def test_half_of_every_architecture_goes(name: str) -> None:
    make, x, smaller = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
        with torch.no_grad():
            model(x)
        before = {n: p.numel() for n, p in model.named_parameters()}
        coupling = couple(copy.deepcopy(model), lambda m: m(x))
        coupling = prove_groups(model, lambda m: m(x), coupling, Limits())
        left_alone = [why for name, why in coupling.skipped.items() if "router" not in name]
        assert set(left_alone) <= {"an output layer", "it has a single output channel"}, coupling.skipped
        in_order = {group.name: torch.arange(len(group.sizes)).float() for group in coupling.groups}
        drops = drop_lowest(coupling.groups, in_order, 0.5, Limits(scope="local"))
        apply_record(model, record_of(model, coupling.groups, drops))
        assert model(x).shape[0] == 2
    after = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(after.values()) < 0.65 * sum(before.values())
    for part in smaller:
        own = [n for n in before if f".{part}." in f".{n}." and before[n] > 32]
        assert own, part
        assert all(after[n] <= 0.55 * before[n] for n in own), {n: (before[n], after[n]) for n in own}


def test_a_reason_names_the_line_of_the_model() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).sort(-1).values)

    x = torch.randn(2, 4)
    coupling = couple(Sorted(), lambda m: m(x))
    assert not coupling.groups
    line = Sorted.forward.__code__.co_firstlineno + 1
    assert coupling.skipped["a"] == f"sort is taken over its channels in unit/test_follow.py:{line}"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=2, max_size=4), st.data())
def test_places_are_those_of_arrays_that_are_arranged_alike(sizes: list[int], data: st.DataObject) -> None:
    """Against torch: an axis of products and sums numbers its positions as views and concatenations do."""
    leaves = [Axis(size) for size in sizes]
    tags = [torch.arange(size) for size in sizes]
    axis, values = leaves[0], tags[0][:, None].expand(-1, len(sizes)).clone().fill_(-1)
    values[:, 0] = tags[0]
    for i in range(1, len(sizes)):
        own = torch.full((sizes[i], len(sizes)), -1)
        own[:, i] = tags[i]
        if data.draw(st.booleans()):
            axis = product_of([axis, leaves[i]])
            values = torch.maximum(values[:, None], own[None]).flatten(0, 1)
        else:
            axis = side_by_side([axis, leaves[i]])
            values = torch.cat([values, own])
    assert axis.size == len(values)
    for i, leaf in enumerate(leaves):
        (place,) = place_of(axis, leaf)
        assert torch.equal(place, values[:, i])


def test_axes_that_are_divided_differently_are_refined() -> None:
    hidden, other = Axis(24), Axis(24)
    assert split_in_two(hidden, 4) is not None
    assert split_in_two(other, 12) is not None
    unite(hidden, other)
    assert [leaf.size for leaf in leaves_of(hidden)] == [4, 3, 2]
    assert list(leaves_of(hidden)) == list(leaves_of(other))
    six, clash = Axis(6), Axis(6)
    assert split_in_two(six, 2) is not None
    assert split_in_two(clash, 3) is not None
    unite(six, clash)
    assert all(leaf.why for axis in (six, clash) for leaf in leaves_of(axis))
