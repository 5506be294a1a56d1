"""Networks of the size of well-known ones, in plain torch, for measurements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.demo.models import Block as Basic

__all__ = ["Bert", "Block", "ResNet20", "ViT", "mobilenet", "vit"]


class FusedAttention(nn.Module):
    """Queries, keys and values from one linear layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(*x.shape[:2], self.num_heads * self.head_dim))


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and with a shortcut (Dosovitskiy 2020, arXiv:2010.11929)."""

    def __init__(self, dim: int, heads: int, ratio: int = 2) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), FusedAttention(dim, heads), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with a class token, for square images."""

    def __init__(
        self,
        dim: int = 32,
        heads: int = 4,
        depth: int = 2,
        size: int = 16,
        patch: int = 4,
        channels: int = 3,
        ratio: int = 2,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, patch, patch)
        self.cls, self.pos = (
            nn.Parameter(torch.randn(1, 1, dim)),
            nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, dim)),
        )
        self.blocks = nn.ModuleList(Block(dim, heads, ratio) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vit() -> ViT:
    """A vision transformer of 1.8M parameters for grey images of 28x28."""
    net = ViT(dim=192, heads=3, depth=4, size=28, patch=4, channels=1, ratio=4)
    for p in (net.cls, net.pos):
        nn.init.trunc_normal_(p, std=0.02)
    return net


class ResNet20(nn.Module):
    """The residual network of 20 layers and 272k parameters (He 2015, arXiv:1512.03385), for grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        pairs = [(16, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64)]
        self.blocks = nn.Sequential(*(Basic(a, b, 1 if a == b else 2) for a, b in pairs))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Bright(nn.Module):
    """A small convolutional net whose filters begin positive, as smoothing ones are.

    On bright images all of its products have one sign, which is the worst for kernels that add in 16 bits.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for num_in, num_out in ((1, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(num_in, num_out, 3, 2, 1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4))
        with torch.no_grad():
            for module in self.net:
                if isinstance(module, nn.Conv2d):
                    module.weight.abs_()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of four classes for images of 1 x 16 x 16."""
        return self.net(x)


class Rows(nn.Module):
    """A transformer of two blocks of torch's own layers that reads an image row by row."""

    def __init__(self, dim: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(28, dim)
        self.position = nn.Parameter(torch.randn(28, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ten classes for images of 1 x 28 x 28."""
        return self.head(self.blocks(self.embed(x.squeeze(1)) + self.position).mean(1))


class SplitAttention(nn.Module):
    """Queries, keys and values from a linear layer each, attributes as in BERT (Devlin 2018, arXiv:1810.04805)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, dim // heads, dim
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dense, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def heads(self, x: Tensor) -> Tensor:
        """Batch, heads, tokens, channels of a head."""
        return x.view(*x.shape[:2], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        p = (q @ k.transpose(-1, -2) / self.attention_head_size**0.5).softmax(-1)
        y = (p @ v).permute(0, 2, 1, 3).contiguous().view(*x.shape[:2], self.all_head_size)
        return self.norm(x + self.dense(y))


class Bert(nn.Module):
    """Attention and two linear layers a block, norms behind the shortcuts."""

    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 2, vocabulary: int = 50) -> None:
        super().__init__()
        self.word, self.pos, self.norm = nn.Embedding(vocabulary, dim), nn.Embedding(128, dim), nn.LayerNorm(dim)
        self.attention = nn.ModuleList(SplitAttention(dim, heads) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        h = self.norm(self.word(x) + self.pos(torch.arange(x.shape[1])))
        for attention, mlp, norm in zip(self.attention, self.mlp, self.norms, strict=True):
            h = attention(h)
            h = norm(h + mlp(h))
        return self.head(h[:, 0])


class InvertedResidual(nn.Module):
    """Wide in the middle, with one filter a channel there (Sandler 2018, arXiv:1801.04381)."""

    def __init__(self, num_in: int, num_out: int, stride: int, expand: int) -> None:
        super().__init__()
        width, self.residual = num_in * expand, stride == 1 and num_in == num_out
        self.net = nn.Sequential(
            *(nn.Conv2d(num_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()),
            *(nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU6()),
            *(nn.Conv2d(width, num_out, 1, bias=False), nn.BatchNorm2d(num_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        return x + self.net(x) if self.residual else self.net(x)


def mobilenet(rows: tuple[tuple[int, int, int, int], ...] = ((1, 8, 1, 1), (3, 12, 2, 2)), stem: int = 8) -> nn.Module:
    """MobileNetV2; rows of expansion, channels, number of blocks, stride."""
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU6()]
    num_in = stem
    for expand, num_out, depth, stride in rows:
        for i in range(depth):
            layers.append(InvertedResidual(num_in, num_out, stride if i == 0 else 1, expand))
            num_in = num_out
    layers += [nn.Conv2d(num_in, 4 * num_in, 1, bias=False), nn.BatchNorm2d(4 * num_in), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * num_in, 10))
