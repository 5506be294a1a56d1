"""Nets for medical images, of MONAI."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .wrapped import NUM_SAMPLES, Made, pairs

__all__ = ["MODELS"]

_CLASSES = 2


def dice(output: Any, target: Tensor) -> Tensor:
    """MONAI's own loss; of a list of outputs, that of the first."""
    from monai.losses import DiceCELoss

    return DiceCELoss(to_onehot_y=True, softmax=True)(output, target)


def _segments(name: str, num_axes: int, size: int, num: int = NUM_SAMPLES, **fields: Any) -> Made:
    from monai.networks import nets

    net = getattr(nets, name)(**fields)
    x = torch.randn(num, 1, *[size] * num_axes)
    return pairs(net, x, torch.randint(0, _CLASSES, x.shape), dice)


def _densenet() -> Made:
    from monai.networks import nets

    net = nets.DenseNet(2, 1, _CLASSES, init_features=16, growth_rate=8, block_config=(2, 2))
    y = torch.randint(0, _CLASSES, (NUM_SAMPLES,))
    return pairs(net, torch.randn(NUM_SAMPLES, 1, 32, 32), y, nn.functional.cross_entropy)


MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "MONAI UNet": (
        "monai",
        partial(
            _segments,
            "UNet",
            2,
            32,
            spatial_dims=2,
            in_channels=1,
            out_channels=_CLASSES,
            channels=(16, 32, 64),
            strides=(2, 2),
            num_res_units=2,
        ),
    ),
    "UNETR": (
        "monai",
        partial(
            _segments,
            "UNETR",
            2,
            32,
            in_channels=1,
            out_channels=_CLASSES,
            img_size=32,
            feature_size=8,
            hidden_size=64,
            mlp_dim=128,
            num_heads=4,
            spatial_dims=2,
        ),
    ),
    "SwinUNETR": (
        "monai",
        partial(
            _segments,
            "SwinUNETR",
            2,
            64,
            in_channels=1,
            out_channels=_CLASSES,
            feature_size=12,
            depths=(1, 1, 1, 1),
            num_heads=(2, 2, 4, 4),
            window_size=4,
            spatial_dims=2,
        ),
    ),
    "SegResNet": (
        "monai",
        partial(
            _segments,
            "SegResNet",
            3,
            16,
            spatial_dims=3,
            in_channels=1,
            out_channels=_CLASSES,
            init_filters=8,
            blocks_down=(1, 1),
            blocks_up=(1,),
        ),
    ),
    "MONAI DenseNet": ("monai", _densenet),
}
