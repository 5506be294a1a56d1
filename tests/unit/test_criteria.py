"""Which: scores of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.layers import Layer, find_layers
from lightning_compress.pruning import (
    LAMP,
    APoZ,
    BatchNormScale,
    Criterion,
    Magnitude,
    MeanActivation,
    Movement,
    Random,
    Taylor,
    Wanda,
)
from lightning_compress.quantization.affine import Affine
from lightning_compress.quantization.fake_quant import upgrade, weights
from lightning_compress.testing import check_criterion

from .helpers import noise, randomized

ALL = [LAMP(), APoZ(), BatchNormScale(), Magnitude(), MeanActivation(), Movement(), Random(), Taylor(), Wanda()]


@pytest.mark.parametrize("criterion", [*ALL, Random(seed=7)])
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
    upgrade([Layer("fc", module)], Affine(2, symmetric=True), "tensor")
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


def lamp(weight: np.ndarray) -> np.ndarray:
    """By a double loop; of equal weights the earlier one counts as the smaller, as in the authors' sort."""
    flat = weight.ravel().astype(np.float64)
    scores = np.empty_like(flat)
    for i, w in enumerate(flat):
        total = 0.0
        for j, u in enumerate(flat):
            if abs(u) > abs(w) or (abs(u) == abs(w) and j >= i):
                total += u * u
        scores[i] = w * w / total if total else 0.0
    return scores.reshape(weight.shape)


@pytest.mark.parametrize("module", [nn.Linear(7, 5), nn.Conv2d(2, 3, 3), nn.ConvTranspose1d(2, 3, 3), nn.GRU(3, 2)])
@pytest.mark.parametrize("digits", [1, 7], ids=["ties and zeros", "distinct"])
def test_lamp_is_the_double_loop(module: nn.Module, digits: int) -> None:
    for layer in find_layers(randomized(module))[0]:
        with torch.no_grad():
            layer.weight.copy_(layer.weight.round(decimals=digits))
        score = LAMP().score(layer).numpy()
        np.testing.assert_allclose(score, lamp(layer.weight.detach().numpy()), rtol=1e-6)
        assert score.max() == 1


def test_lamp_of_weights_of_any_scale_stays_in_order() -> None:
    layer = Layer("fc", nn.Linear(50, 10))
    for scale in (1e-30, 1.0, 1e18):
        with torch.no_grad():
            layer.weight.copy_(noise(10, 50) * scale)
        order = layer.weight.detach().abs().flatten().argsort()
        assert bool((LAMP().score(layer).flatten()[order].diff() > 0).all())


LAYERS = {
    "linear": (nn.Linear(4, 6), (1, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3), (1, 4, 5)),
    "conv2d": (nn.Conv2d(4, 6, 2), (1, 4, 3, 3)),
    "grouped": (nn.Conv2d(4, 6, 2, groups=2), (1, 4, 3, 3)),
    "depthwise": (nn.Conv2d(4, 8, 2, groups=4), (1, 4, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), (1, 4, 3, 3)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 2, groups=2), (1, 4, 3, 3)),
    "depthwise transposed": (nn.ConvTranspose1d(4, 8, 2, groups=4), (1, 4, 3)),
}


def channels_of_weights(module: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The input and the output channel of every weight, found by setting it alone to 1."""
    weight = module.weight
    ins, outs = torch.zeros(2, *weight.shape, dtype=torch.int64)
    module.bias = None
    for index in np.ndindex(*weight.shape):
        with torch.no_grad():
            weight.zero_()[index] = 1.0
        x = torch.ones(shape, requires_grad=True)
        y = module(x)
        y.sum().backward()
        for found, values in ((ins, x.grad[0]), (outs, y[0])):
            found[index] = int(values.reshape(len(values), -1).sum(1).argmax())
    return ins, outs


@pytest.mark.parametrize("kind", LAYERS)
def test_what_was_seen_of_a_channel_reaches_exactly_its_weights(kind: str) -> None:
    module, shape = LAYERS[kind]
    ins, outs = channels_of_weights(module, shape)
    with torch.no_grad():
        module.weight.copy_(noise(*module.weight.shape))
    num_in, num_out = int(ins.max()) + 1, int(outs.max()) + 1
    of_inputs, of_outputs = noise(num_in).square(), noise(num_out, seed=1).abs()
    norm = nn.BatchNorm1d(num_out)
    with torch.no_grad():
        norm.weight.copy_(-of_outputs)
    weight = module.weight.detach()
    expected = weight.abs() * of_inputs.sqrt()[ins]
    torch.testing.assert_close(Wanda().score(Layer("x", module, seen=of_inputs)), expected)
    for criterion in (MeanActivation(), APoZ()):
        assert torch.equal(criterion.score(Layer("x", module, seen=of_outputs)), of_outputs[outs])
    assert torch.equal(BatchNormScale().score(Layer("x", module, norm=norm)), of_outputs[outs])


@pytest.mark.parametrize("criterion", ALL)
def test_layers_of_which_nothing_was_seen_score_zero_or_by_their_weights(criterion: Criterion) -> None:
    score = criterion.score(Layer("x", nn.Conv2d(2, 3, 3)))
    assert bool(torch.isfinite(score).all())


@pytest.mark.parametrize("criterion", [MeanActivation(), APoZ(), Wanda(), BatchNormScale()])
def test_weights_whose_activations_are_not_those_of_a_layer_are_refused_in_words(criterion: Criterion) -> None:
    lstm = nn.LSTM(3, 4)
    assert "a weight of LSTM" in (criterion.refuses(Layer("lstm", lstm, "weight_ih_l0")) or "")
    assert all(criterion.refuses(Layer("x", module)) is None for module, _ in LAYERS.values())


@pytest.mark.parametrize("criterion", ALL)
def test_what_is_not_overridden_raises_and_names_the_criterion(criterion: Criterion) -> None:
    layer, x = Layer("x", nn.Linear(2, 2)), torch.ones(2, 2)
    calls = [
        (criterion.observes_activations, lambda: criterion.observe(layer, x, x)),
        (criterion.observes_gradients, lambda: criterion.observe_gradient(layer, x)),
        (isinstance(criterion, Magnitude), lambda: criterion.score_values(x, x)),
    ]
    for known, call in calls:
        if not known:
            with pytest.raises(TypeError, match=type(criterion).__name__):
                call()
