"""The nets of MLPerf Tiny have its sizes, and their data are what the loaders say."""

from __future__ import annotations

import pytest
import torch

from experiments.tiny import NETS, moved, turned

# weights of convolutions and linear layers in mlcommons/tiny v1.0, with our number of classes
SIZES = {
    "DS-CNN": 64 * 40 + 4 * (64 * 9 + 64 * 64) + 64 * 10,
    "ResNet-8": 3 * 144 + 2 * 2304 + 4608 + 9216 + 512 + 18432 + 36864 + 2048 + 640,
    "autoencoder": 2 * 640 * 128 + 6 * 128 * 128 + 2 * 128 * 8,
    "MobileNetV1 .25": 216 + 9 * (8 + 16 + 2 * 32 + 2 * 64 + 6 * 128 + 256) + 3 * 65536 - 384 + 512,
}
INPUTS = {"DS-CNN": (1, 47, 10), "ResNet-8": (3, 32, 32), "autoencoder": (640,), "MobileNetV1 .25": (3, 96, 96)}


@pytest.mark.parametrize("name", NETS)
def test_a_net_has_the_weights_of_its_reference(name: str) -> None:
    net = NETS[name].build().eval()
    assert sum(p.numel() for p in net.parameters() if p.dim() > 1) == SIZES[name]
    with torch.no_grad():
        assert len(net(torch.zeros(2, *INPUTS[name]))) == 2


def test_augmented_digits_keep_their_ink_and_what_is_behind_it() -> None:
    x = torch.full((8, 1, 28, 28), -0.42)
    x[:, :, 10:18, 10:18] = 2.8
    generator = torch.Generator().manual_seed(0)
    for change in (moved, turned):
        y = change(x, generator)
        assert y.shape == x.shape
        assert not torch.equal(y, x)
        assert float(y.min()) == pytest.approx(-0.42, abs=1e-5)
        assert float((y + 0.42).sum()) == pytest.approx(float((x + 0.42).sum()), rel=0.25)
