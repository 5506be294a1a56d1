"""The mean error of quantized weights, taken out of the biases."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.quantization import Affine, Scheme
from lightning_compress.quantization.convert import convert
from lightning_compress.quantization.correct import BiasCorrection
from lightning_compress.quantization.model import ModelQuantization, quantize_layers

from .helpers import largest_difference, noise, randomized, run, trace
from .test_equalize import Separable, Transposed

SCHEME = Scheme(Affine(4, symmetric=True), None, weight_granularity="tensor")
X = noise(16, 3, 8, 8).abs()  # as behind a rectifier: of a mean that is not 0


def correct(model: nn.Module, *batches: Tensor, scheme: Scheme = SCHEME) -> tuple[ModelQuantization, BiasCorrection]:
    """Quantize the model's weights and correct its biases."""
    quantization = quantize_layers(model.eval(), scheme)
    quantization.place(model, trace(model, batches[0], scheme=scheme))
    correction = BiasCorrection(quantization.layers, quantization.folded(model))
    quantization.observe(True)
    for batch in batches:
        run(model, batch)
    quantization.observe(False)
    correction.remove()
    correction.apply()
    quantization.enable(True)
    return quantization, correction


def mean_error(found: Tensor, expected: Tensor) -> Tensor:
    axis = 1 if found.dim() == 4 else -1
    return (found - expected).movedim(axis, 0).flatten(1).mean(1)


SINGLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 5), (32, 8)),
    "linear of three axes": (lambda: nn.Sequential(nn.Linear(8, 5)), (6, 5, 8)),
    "convolution": (lambda: nn.Conv2d(3, 6, 3, 2, 1), X.shape),
    "grouped": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3, padding_mode="circular"), X.shape),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 3, 2), X.shape),
    "convolution, norm": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)), X.shape),
    "bias and norm": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)), X.shape),
}


@pytest.mark.parametrize("name", list(SINGLE))
def test_the_mean_of_what_a_layer_puts_out_is_exact(name: str) -> None:
    build, shape = SINGLE[name]
    model, x = randomized(build()).eval(), noise(*shape).abs()
    expected, plain = run(model, x), copy.deepcopy(model)
    quantize_layers(plain, SCHEME).enable(True)
    assert float(mean_error(run(plain, x), expected).abs().max()) > 1e-2
    correct(model, *x.split(4))
    assert float(mean_error(run(model, x), expected).abs().max()) < 1e-5


@pytest.mark.parametrize("build", [Separable, Transposed])
def test_the_mean_error_of_a_net_shrinks(build: Callable[[], nn.Module]) -> None:
    before, after = [], []
    for seed in range(5):
        model = randomized(build(), seed).eval()
        plain, expected = copy.deepcopy(model), run(model, X)
        quantize_layers(plain, SCHEME).enable(True)
        before.append(float(mean_error(run(plain, X), expected).norm()))
        correct(model, *X.split(4))
        after.append(float(mean_error(run(model, X), expected).norm()))
    assert sum(after) < 0.6 * sum(before)


def test_batches_count_by_their_examples() -> None:
    whole, parts = (randomized(nn.Linear(8, 5)) for _ in range(2))
    x = noise(10, 8).abs()
    correct(whole, x)
    correct(parts, x[:7], x[7:])
    assert largest_difference(whole.state_dict(), parts.state_dict()) < 1e-6


def test_layers_without_a_bias_and_layers_of_other_kinds_are_listed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.idle = nn.Linear(8, 8, bias=False), nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))[0]

    model = Net()
    before = copy.deepcopy(model.state_dict())
    _, correction = correct(model, noise(2, 3, 8))
    assert correction.left == {
        "a": "neither a bias nor a folded batch norm",
        "b.weight_ih_l0": "neither a linear layer nor a convolution",
        "b.weight_hh_l0": "neither a linear layer nor a convolution",
        "idle": "it was not called",
    }
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_corrected_model_converts_to_what_it_computes() -> None:
    model = randomized(Separable()).eval()
    correct(model, *X.split(4), scheme=Scheme(Affine(4, symmetric=True)))
    found = run(convert(model), X)
    assert largest_difference(found, run(model, X)) < 0.05 * float(found.abs().max())


def test_measuring_changes_no_value_and_leaves_no_hook() -> None:
    model = randomized(Separable()).eval()
    expected = run(model, X)
    correction = BiasCorrection(quantize_layers(model, SCHEME).layers, {})
    assert torch.equal(run(model, X), expected)
    correction.remove()
    assert not any(module._forward_hooks for module in model.modules())
