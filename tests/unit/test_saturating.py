"""The reference of kernels that add pairs of products in 16 bits, against numpy and against exact kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from experiments.saturating import saturating
from lightning_compress import convert, int8
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.model import quantization_of

from .helpers import largest_difference, noise, quantize, randomized, run
from .test_placement import Residual

NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (6, 5)),
    "conv": (Residual, (3, 2, 8, 8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv1d(4, 2, 2)), (3, 3, 9)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1)), (3, 4, 6, 6)),
}


@pytest.mark.parametrize("net", NETS)
def test_codes_that_fit_are_added_exactly(net: str) -> None:
    make, shape = NETS[net]
    model, x = randomized(make()).eval(), noise(*shape)
    quantize(model, x)
    exact, ours = run(convert(model), x), run(saturating(model), x)
    assert ours.shape == exact.shape
    # rounding of a tie, one step of a code at most
    assert largest_difference(ours, exact) <= 0.02 * float(exact.max() - exact.min())


def test_the_full_range_saturates_as_numpy_says() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)).eval(), 1 + 0.1 * noise(8, 6).abs()
    with torch.no_grad():
        model[0].weight.copy_(noise(4, 6).abs() + 0.5)
    quantize(model, x, scheme=int8(exact_kernels=True))
    converted = convert(model)
    found = quantization_of(converted)
    assert found is not None
    written = weights(converted[0])["weight"]
    (read,) = (activation.quantize for activation in found.activations.values())
    codes = np.clip(np.round(x.numpy() / read.scale) + read.zero_point, 0, 255)
    products = codes[:, None, :] * written.codes.numpy().astype(float)
    sums = np.clip(products.reshape(8, 4, 3, 2).sum(-1), -(2**15), 2**15 - 1).sum(-1)
    expected = (sums - read.zero_point * written.codes.sum(1).numpy()) * read.scale * written.scale.numpy()
    got = run(saturating(model), x)
    assert np.allclose(got.numpy(), expected + model[0].bias.detach().numpy(), atol=1e-4)
    assert largest_difference(got, run(converted, x)) > 1.0
