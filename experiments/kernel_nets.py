"""Small nets of many kinds, with one call each, whose integer kernels are counted.

Each has something that a way of finding integer kernels can trip over.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NETS"]


class Silu(nn.Module):
    """Seven convolutions with batch norm and SiLU, by the function or by the module."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        widths = [3, 8, 8, 16, 16, 16, 8, 8]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.act: Any = F.silu if functional else nn.SiLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.act(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """An inverted bottleneck with hard-swish and squeeze-excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()
        )
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Hardsigmoid()
        self.down, self.up = nn.Conv2d(wide, 4, 1), nn.Conv2d(4, wide, 1)
        self.project = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = y * self.gate(self.up(self.act(self.down(self.pool(y)))))
        return x + self.project(y)


class DenseNet(nn.Module):
    """Layers that read all before them, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, 1, 1) for i in range(3))
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


class UNet(nn.Module):
    """Down and up again, by a function or by a transposed convolution, with a shortcut that is concatenated."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.middle = nn.Conv2d(16, 16, 3, 1, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2) if mode == "transposed" else None
        self.mode = mode
        self.last, self.head = nn.Conv2d(24, 8, 3, 1, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        b = F.relu(self.middle(F.relu(self.down(a))))
        b = self.up(b) if self.up is not None else F.interpolate(b, scale_factor=2, mode=self.mode)
        return self.head(F.gelu(self.last(torch.cat([a, b], 1))))


class PixelShuffle(nn.Module):
    """Super-resolution: PReLU, and a pixel shuffle before or behind the last convolution."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.PReLU(8), nn.Conv2d(8, 8, 3, 1, 1), nn.PReLU(8))
        self.net.extend([nn.Conv2d(8, 12, 3, 1, 1), nn.PixelShuffle(2)])
        if last:
            self.net.append(nn.Conv2d(3, 3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Functional(nn.Module):
    """Convolutions whose values go through functions before they are added, multiplied or given out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.silu(self.b(x)) + F.gelu(self.c(x))
        x = x * torch.sigmoid(self.gate(x))
        return F.leaky_relu(self.head(x))


class Attention(nn.Module):
    """Attention written with functions, on a weight that is read by a function, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (y(x).unflatten(-1, (2, 8)).transpose(1, 2) for y in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.linear(x, self.embed.weight)


class Twice(nn.Module):
    """A convolution that is called twice, and a call by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.norm = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(input=x))
        x = self.shared(input=F.elu(self.shared(input=x)))
        return self.head(input=self.norm(x).mean((2, 3)))


class Standardized(nn.Conv2d):
    """A convolution that multiplies by what it computes from its weight (arXiv:1903.10520)."""

    def forward(self, input: Tensor) -> Tensor:  # the name is that of torch
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, w, self.bias, self.stride, self.padding)


def _chain(d: int) -> nn.Module:
    conv, norm = (getattr(nn, f"{kind}{d}d") for kind in ("Conv", "BatchNorm"))
    layers: list[nn.Module] = [conv(3, 8, 3, padding=1), norm(8), nn.ReLU()]
    layers += [conv(8, 8, 3, padding=1), norm(8), nn.SiLU(), conv(8, 4, 1)]
    return nn.Sequential(*layers)


def _transposed() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 1, 1), nn.PReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.PReLU()]
    layers += [nn.Conv2d(8, 8, 3, 1, 1), nn.PReLU(), nn.ConvTranspose2d(8, 8, 2, 2), nn.PReLU()]
    layers += [nn.ConvTranspose2d(8, 8, 2, 2), nn.PReLU(), nn.Conv2d(8, 3, 3, 1, 1)]
    return nn.Sequential(*layers)


def _mobile() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()]
    blocks = [SqueezeExcite(8) for _ in range(3)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.Hardswish())


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 16), encoder, nn.Linear(16, 4))


def _gelu() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 3, 1, 1, groups=8)]
    return nn.Sequential(*layers, nn.GELU(), nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))


def _upsampled() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.GELU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, 1, 1),
    ]
    return nn.Sequential(*layers, nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3))


def _standardized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), Standardized(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


IMAGES, TOKENS, ROWS = (8, 3, 16, 16), (8, 6), (8, 5, 6)
_Net = tuple[Callable[[], nn.Module], tuple[int, ...]]
NETS: dict[str, _Net] = {
    "conv-bn-silu": (lambda: Silu(False), IMAGES),
    "functional silu": (lambda: Silu(True), IMAGES),
    "prelu + pixel shuffle": (lambda: PixelShuffle(False), IMAGES),
    "pixel shuffle + conv": (lambda: PixelShuffle(True), IMAGES),
    "prelu + transposed conv": (_transposed, IMAGES),
    "gelu + groupnorm": (_gelu, IMAGES),
    "hard-swish + squeeze-excite": (_mobile, IMAGES),
    "functions + residual + gate": (Functional, IMAGES),
    "concat (densenet)": (DenseNet, IMAGES),
    "unet, nearest": (lambda: UNet("nearest"), IMAGES),
    "unet, bilinear": (lambda: UNet("bilinear"), IMAGES),
    "unet, transposed conv": (lambda: UNet("transposed"), IMAGES),
    "conv 1d": (lambda: _chain(1), (8, 3, 16)),
    "conv 3d": (lambda: _chain(3), (8, 3, 6, 6, 6)),
    "transformer encoder": (_encoder, ROWS),
    "attention by functions": (Attention, TOKENS),
    "called twice, by keyword": (Twice, IMAGES),
    "weight standardization": (_standardized, IMAGES),
    "upsample + conv": (_upsampled, IMAGES),
}
