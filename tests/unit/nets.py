"""Networks of many kinds, for what removes channels and blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(*x.shape[:2], self.num_heads * self.head_dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), FusedAttention(dim, heads), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 17, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class SplitAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, dim // heads, dim
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dense, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        p = (q @ k.transpose(-1, -2) / self.attention_head_size**0.5).softmax(-1)
        y = (p @ v).permute(0, 2, 1, 3).contiguous().view(*x.shape[:2], self.all_head_size)
        return self.norm(x + self.dense(y))


class Bert(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 2, vocabulary: int = 50) -> None:
        super().__init__()
        self.word, self.pos, self.norm = nn.Embedding(vocabulary, dim), nn.Embedding(64, dim), nn.LayerNorm(dim)
        self.attention = nn.ModuleList(SplitAttention(dim, heads) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.word(x) + self.pos(torch.arange(x.shape[1])))
        for attention, mlp, norm in zip(self.attention, self.mlp, self.norms, strict=True):
            h = attention(h)
            h = norm(h + mlp(h))
        return self.head(h[:, 0])


class GPT(nn.Module):
    """Input and output embeddings that share one weight, on one and the same axis of channels."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.word, self.block, self.norm = nn.Embedding(50, dim), Block(dim, 4), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 50, bias=False)
        self.head.weight = self.word.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.word(x))))


class InvertedResidual(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int, expand: int) -> None:
        super().__init__()
        width, self.residual = num_in * expand, stride == 1 and num_in == num_out
        self.net = nn.Sequential(
            *(nn.Conv2d(num_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()),
            *(nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU6()),
            *(nn.Conv2d(width, num_out, 1, bias=False), nn.BatchNorm2d(num_out)),
        )

    def forward(self, x: Tensor) -> Tensor:
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


class BasicBlock(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out)
        self.conv2, self.bn2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False), nn.BatchNorm2d(num_out)
        self.down = None if stride == 1 and num_in == num_out else nn.Conv2d(num_in, num_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


def resnet() -> nn.Module:
    stages = [BasicBlock(8, 8, 1), BasicBlock(8, 16, 2), BasicBlock(16, 16, 1)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class ResNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=4), nn.GroupNorm(4, 16)
        self.c, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(F.relu(self.norm(self.b(F.relu(self.a(x))))))).flatten(1))


class Concat(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.c, self.head = nn.Conv2d(16, 16, 3, 1, 1, groups=groups), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(torch.cat([self.a(x), self.b(x)], 1))).mean((2, 3)))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle = nn.Conv2d(3, 16, 1), nn.PixelShuffle(2)
        self.b, self.head = nn.Conv2d(4, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.shuffle(self.a(x))))).mean((2, 3)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.a(x).chunk(2, -1)
        return self.b(value * gate.sigmoid())


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)
        self.raw = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(F.linear(F.relu(self.a(x)), self.raw)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 8, 3), nn.Conv1d(8, 6, 3)
        self.net, self.head = kind(6, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.b(F.relu(self.a(x))).transpose(1, 2))[0][:, -1])


class Detached(nn.Module):
    """A part under no_grad, a part that forward never calls, a norm over channels without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 5)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.c(F.relu(F.layer_norm(self.b(F.relu(self.a(x))), (12,)))) if x.shape[1] else x


def mha() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(50, 32), encoder, nn.Linear(32, 10))


IMAGES, TOKENS, ROWS = torch.Size([4, 3, 16, 16]), torch.Size([4, 12]), torch.Size([4, 8])
NETS: dict[str, tuple[Callable[[], nn.Module], torch.Size]] = {
    "resnet": (resnet, IMAGES),
    "mobilenet": (mobilenet, IMAGES),
    "resnext": (ResNeXt, torch.Size([4, 3, 8, 8])),
    "concat": (Concat, IMAGES),
    "gated": (Gated, ROWS),
    "vit": (ViT, IMAGES),
    "bert": (Bert, TOKENS),
    "mha": (mha, TOKENS),
    "tied": (GPT, TOKENS),
}


def inputs_for(shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(50, shape, generator=generator) if shape == TOKENS else torch.randn(shape, generator=generator)
