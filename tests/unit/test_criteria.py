"""Which: scores of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.layers import Layer, find_layers
from lightning_compress.pruning import Criterion, Magnitude, Random
from lightning_compress.quantization.fake_quant import upgrade, weights
from lightning_compress.quantization.quantizers import Affine
from lightning_compress.testing import check_criterion


@pytest.mark.parametrize("criterion", [Magnitude(), Random(), Random(seed=7)])
def test_the_contract_is_kept(criterion: Criterion) -> None:
    check_criterion(criterion)


@pytest.mark.parametrize("module", [nn.Linear(3, 5), nn.Conv2d(2, 3, 3), nn.ConvTranspose1d(2, 3, 3), nn.GRU(3, 4)])
def test_magnitude_is_the_absolute_weight(module: nn.Module) -> None:
    for layer in find_layers(module)[0]:
        score = Magnitude().score(layer)
        np.testing.assert_array_equal(score.numpy(), np.abs(layer.weight.detach().numpy()))
        assert not score.requires_grad


def test_magnitude_scores_the_stored_weight_of_a_quantized_layer() -> None:
    module = nn.Linear(4, 4)
    stored = module.weight.detach().clone()
    upgrade([Layer("fc", module)], Affine(2, symmetric=True), per_channel=False)
    weights(module)["weight"].enabled = True
    assert torch.equal(Magnitude().score(Layer("fc", module)), stored.abs())


def test_random_is_the_same_for_the_same_seed_and_name_whatever_the_weight() -> None:
    first, second = Layer("fc", nn.Linear(8, 8)), Layer("fc", nn.Linear(8, 8))
    assert torch.equal(Random(3).score(first), Random(3).score(second))


def test_random_is_uniform_noise() -> None:
    scores = Random().score(Layer("fc", nn.Linear(200, 100)))
    histogram = torch.histc(scores, 10, 0, 1) / scores.numel()
    assert float((histogram - 0.1).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, "net.1"), (1, "net.1")), ((0, "net.1"), (0, "net.2")), ((0, "net.12"), (0, "net.21"))],
)
def test_random_differs_between_seeds_and_layers(first: tuple[int, str], second: tuple[int, str]) -> None:
    scores = [Random(seed).score(Layer(name, nn.Linear(8, 8))) for seed, name in (first, second)]
    assert int((scores[0] == scores[1]).sum()) < 8
