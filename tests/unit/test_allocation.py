"""The way from dense to small: what is given up first, and what it costs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.analysis.allocation import Allocation, allocate
from lightning_compress.analysis.cost import file_bytes
from lightning_compress.forward import Inputs
from lightning_compress.quantization import int8
from lightning_compress.tasks.trial import mixed

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


def way(model: nn.Module, **options: Any) -> list[Any]:
    dense = model(X).detach()

    def fidelity(model: nn.Module) -> float:
        return -1000 * float((model(X) - dense).square().mean())

    return allocate(
        model,
        Inputs((X[:2],), {}),
        fidelity,
        lambda model, plan: file_bytes(model, plan, 8, (), options.get("sparsities") is not None),
        shares=(0.25, 0.5),
        **options,
    )


def test_costs_fall_and_every_layer_ends_as_small_as_it_can_be() -> None:
    model = net()
    before = [p.clone() for p in model.parameters()]
    points = way(model, bits={"0": [4], "2": [4, 2]}, sparsities=[0.5, 0.9])
    costs = [point.cost for point in points]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)
    assert points[0].plan == Allocation()
    assert points[-1].plan == Allocation({"0": 0.5, "2": 0.5}, {"0": 4, "2": 2}, {"0": 0.9, "2": 0.9, "4": 0.9})
    for a, b in pairwise(points):  # one step of one layer at a time
        steps = [
            name
            for kind in ("shares", "bits", "sparsities")
            for name, level in getattr(b.plan, kind).items()
            if getattr(a.plan, kind).get(name) != level
        ]
        assert len(steps) == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_costs_no_accuracy_goes_first() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[:16] = 0.0  # half of the second layer's channels say nothing
        model[2].bias[:16] = 0.0
        model[4].weight[:, :16] = 0.0
    points = way(model)
    assert [dict(point.plan.shares) for point in points[1:3]] == [{"2": 0.25}, {"2": 0.5}]
    assert points[2].drop == 0.0
    assert points[-1].drop > 0


def test_fewer_bits_before_channels_that_matter() -> None:
    points = way(net(), bits={"0": [4], "2": [4], "4": [4]})
    assert points[1].plan.bits == {"2": 4}  # the largest layer, and rounding loses little


def test_a_model_without_channels_or_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="no channels that can be removed"):
        way(nn.Sequential(nn.Linear(8, 3)).eval())


@pytest.mark.parametrize(("stored", "held"), [((), 3), ((8,), 8), ((8, 4), 4)])
def test_a_weight_takes_the_fewest_bits_that_its_format_stores(stored: tuple[int, ...], held: int) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    assert file_bytes(model, Allocation(bits={"0": 3}), 8, stored) == 64 * 8 * held / 8 + 4 * 8


def test_zeros_and_few_bits_count_in_what_is_compressed_only() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    sparse = Allocation(sparsities={"0": 0.9})
    assert file_bytes(model, sparse, 8, (8,)) == file_bytes(model, Allocation(), 8, (8,))
    sizes = [
        file_bytes(model, plan, 8, (8,), compressed=True) for plan in (Allocation(), Allocation(bits={"0": 4}), sparse)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_a_mixed_scheme_changes_the_weights_of_the_named_layers_alone() -> None:
    scheme = mixed(int8(exclude=["head"]), {"body.0": 4})
    assert scheme.for_layer("body.0").weight.bits == 4
    assert scheme.for_layer("body.1").weight.bits == 8
    assert scheme.for_layer("body.0").inputs == int8().inputs
    assert list(scheme.exclude) == ["head"]
