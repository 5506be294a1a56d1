"""Networks of many kinds, for what removes channels and blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.nets import Bert, Block, ViT, mobilenet


class GPT(nn.Module):
    """Input and output embeddings that share one weight, on one and the same axis of channels."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.word, self.block, self.norm = nn.Embedding(50, dim), Block(dim, 4), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 50, bias=False)
        self.head.weight = self.word.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.word(x))))


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
