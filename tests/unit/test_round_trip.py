"""The vectorized affine round trip against torch's fused operation, values and gradients, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.quantization import Affine

from .helpers import noise


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_values_and_gradients_are_those_of_the_fused_operation(
    axis: int | None, symmetric: bool, bits: int, share: float
) -> None:
    x, upstream = noise(24, 10, 7), noise(24, 10, 7, seed=1)
    quantizer = Affine(bits, symmetric)
    scale, zero_point, *_ = qparams = quantizer.fit(x * share, axis)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = quantizer.fake_quantize(ours, qparams)
    if axis is None:
        expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, *quantizer.limits)
    else:
        expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero_point, axis, *quantizer.limits)
    got.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(got, expected)
    assert torch.equal(ours.grad, theirs.grad)
    assert share == 1 or bool((ours.grad == 0).any())


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("size", [1.0, 1e-20, 0.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fitted_values_are_those_of_fit_and_round_trip(axis: int | None, size: float, symmetric: bool) -> None:
    x, quantizer = noise(24, 10, 7) * size, Affine(4, symmetric)
    assert torch.equal(quantizer.fake_quantize_fitted(x, axis), quantizer.fake_quantize(x, quantizer.fit(x, axis)))
    if symmetric:
        leaf = x.clone().requires_grad_()
        quantizer.fake_quantize_fitted(leaf, axis).sum().backward()
        assert torch.equal(leaf.grad, torch.ones_like(x))
