"""Nets for images: of transformers, timm, torchvision, vit-pytorch and segmentation-models-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .text import net_of
from .wrapped import NUM_SAMPLES, Made, by_keywords, loader, pairs

__all__ = ["MODELS"]

_CLASSES = 4
_SIZE = 32
_VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": _SIZE,
    "patch_size": 8,
    "num_labels": _CLASSES,
}


def images(num: int = NUM_SAMPLES, size: int = _SIZE) -> Tensor:
    """Random images, (num, 3, size, size)."""
    return torch.randn(num, 3, size, size)


def _labels(num: int = NUM_SAMPLES) -> Tensor:
    return torch.randint(0, _CLASSES, (num,))


def _classes(config: str, model: str, **fields: Any) -> Made:
    net = net_of(config, model, **{"num_labels": _CLASSES, **fields})
    return by_keywords(net, {"pixel_values": images(), "labels": _labels()})


def _segformer() -> Made:
    net = net_of(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        hidden_sizes=[16, 32, 64, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 4, 4],
        decoder_hidden_size=64,
        num_labels=_CLASSES,
    )
    labels = torch.randint(0, _CLASSES, (NUM_SAMPLES, _SIZE, _SIZE))
    return by_keywords(net, {"pixel_values": images(), "labels": labels})


def _together(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Images of one size, and the boxes of each as they are."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": [sample["labels"] for sample in samples],
    }


def _boxes(net: nn.Module) -> Made:
    made = by_keywords(net, {"pixel_values": images()})
    samples = [
        {
            "pixel_values": x,
            "labels": {"class_labels": torch.tensor([i % _CLASSES]), "boxes": torch.rand(1, 4) / 2 + 0.2},
        }
        for i, x in enumerate(images())
    ]
    return made._replace(train=loader(samples, _together), val=loader(samples[:16], _together))


def _yolos() -> Made:
    return _boxes(
        net_of("YolosConfig", "YolosForObjectDetection", **_VIT | {"image_size": [32, 32]}, num_detection_tokens=5)
    )


def _detr() -> Made:
    import transformers

    resnet: Any = transformers.ResNetConfig
    backbone = resnet(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"], layer_type="basic"
    )
    return _boxes(
        net_of(
            "DetrConfig",
            "DetrForObjectDetection",
            backbone_config=backbone,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            d_model=64,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            num_queries=5,
            num_labels=_CLASSES,
        )
    )


def _timm(name: str, size: int = _SIZE, **fields: Any) -> Made:
    import timm

    net = timm.create_model(name, pretrained=False, num_classes=_CLASSES, **fields)
    return pairs(net, images(size=size), _labels())


def _mixer() -> Made:
    from timm.models.mlp_mixer import MlpMixer

    net = MlpMixer(_CLASSES, img_size=_SIZE, patch_size=8, num_blocks=2, embed_dim=64)
    return pairs(net, images(), _labels())


def _torchvision(name: str, size: int = _SIZE, **fields: Any) -> Made:
    import torchvision

    return pairs(getattr(torchvision.models, name)(num_classes=_CLASSES, **fields), images(size=size), _labels())


def _smp(name: str, **fields: Any) -> Made:
    import segmentation_models_pytorch as smp

    net = getattr(smp, name)("mobilenet_v2", encoder_weights=None, classes=_CLASSES, **fields)
    return pairs(net, images(), torch.randint(0, _CLASSES, (NUM_SAMPLES, _SIZE, _SIZE)))


def _vit_pytorch(name: str, **fields: Any) -> Made:
    from importlib import import_module

    module = import_module(f"vit_pytorch.{name}")
    kind = {"simple_vit": "SimpleViT", "cct": "CCT", "mobile_vit": "MobileViT"}[name]
    return pairs(getattr(module, kind)(num_classes=_CLASSES, **fields), images(), _labels())


MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "ViT": ("transformers", partial(_classes, "ViTConfig", "ViTForImageClassification", **_VIT)),
    "Swin": (
        "transformers",
        partial(
            _classes,
            "SwinConfig",
            "SwinForImageClassification",
            image_size=_SIZE,
            patch_size=2,
            embed_dim=32,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
    ),
    "ConvNeXt": (
        "transformers",
        partial(
            _classes,
            "ConvNextConfig",
            "ConvNextForImageClassification",
            hidden_sizes=[16, 32, 64, 64],
            depths=[1, 1, 1, 1],
            patch_size=2,
        ),
    ),
    "ResNet": (
        "transformers",
        partial(
            _classes,
            "ResNetConfig",
            "ResNetForImageClassification",
            embedding_size=16,
            hidden_sizes=[32, 64],
            depths=[1, 2],
        ),
    ),
    "MobileViT": (
        "transformers",
        partial(
            _classes,
            "MobileViTConfig",
            "MobileViTForImageClassification",
            image_size=_SIZE,
            hidden_sizes=[32, 48, 64],
            neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 128],
            num_attention_heads=4,
        ),
    ),
    "SegFormer": ("transformers", _segformer),
    "DETR": ("transformers", _detr),
    "YOLOS": ("transformers", _yolos),
    "MobileNetV3": ("timm", partial(_timm, "mobilenetv3_small_050")),
    "EfficientNet": ("timm", partial(_timm, "test_efficientnet")),
    "ByobNet": ("timm", partial(_timm, "test_byobnet")),
    "NFNet": ("timm", partial(_timm, "test_nfnet")),
    "RegNet": ("timm", partial(_timm, "regnetx_002")),
    "MLP-Mixer": ("timm", _mixer),
    "torchvision ViT": (
        "torchvision",
        partial(
            _torchvision,
            "VisionTransformer",
            image_size=_SIZE,
            patch_size=8,
            num_layers=2,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=128,
        ),
    ),
    "torchvision Swin": (
        "torchvision",
        partial(
            _torchvision,
            "SwinTransformer",
            patch_size=[2, 2],
            embed_dim=32,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[4, 4],
        ),
    ),
    "SqueezeNet": ("torchvision", partial(_torchvision, "squeezenet1_1", size=48)),
    "MobileNetV2": ("torchvision", partial(_torchvision, "mobilenet_v2", width_mult=0.5)),
    "ShuffleNet": ("torchvision", partial(_torchvision, "shufflenet_v2_x0_5")),
    "DenseNet": (
        "torchvision",
        partial(_torchvision, "DenseNet", growth_rate=8, block_config=(2, 2), num_init_features=16),
    ),
    "U-Net": ("segmentation-models-pytorch", partial(_smp, "Unet", decoder_channels=(64, 32, 32, 16, 16))),
    "DeepLabV3+": ("segmentation-models-pytorch", partial(_smp, "DeepLabV3Plus", decoder_channels=64)),
    "SimpleViT": (
        "vit-pytorch",
        partial(
            _vit_pytorch,
            "simple_vit",
            image_size=_SIZE,
            patch_size=8,
            dim=64,
            depth=2,
            heads=4,
            mlp_dim=128,
            dim_head=16,
        ),
    ),
    "CCT": (
        "vit-pytorch",
        partial(
            _vit_pytorch,
            "cct",
            img_size=_SIZE,
            embedding_dim=64,
            n_conv_layers=1,
            kernel_size=3,
            num_layers=2,
            num_heads=4,
            mlp_ratio=2,
        ),
    ),
}
