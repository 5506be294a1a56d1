"""Parts of other people's models, written anew: attentions, norms and experts as they are found in the field."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OwnNorm(nn.Module):
    """A root mean square norm of its own class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class ChannelsFirstNorm(nn.Module):
    """Over the channels of images, with a mean and a variance of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def rotated(x: Tensor) -> Tensor:
    """Rotary positions, by halves of a head."""
    num = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / 10 ** (torch.arange(num) / num)
    angles = torch.cat([angles, angles], -1)
    return x * angles.cos() + torch.cat([-x[..., num:], x[..., :num]], -1) * angles.sin()


def interleaved(x: Tensor) -> Tensor:
    """Rotary positions, by neighbours in a head."""
    num = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / 10 ** (torch.arange(num) / num)
    odd, even = x[..., 1::2], x[..., ::2]
    turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
    return torch.stack(turned, -1).flatten(-2)


class GroupedQueries(nn.Module):
    """Several heads of queries for one of keys and values; their numbers under names of its own."""

    def __init__(self, width: int, queries: int, keys: int, size: int, turn: object = rotated) -> None:
        super().__init__()
        self.nq, self.nk, self.each, self.turn = queries, keys, queries // keys, turn
        self.ask, self.tell = nn.Linear(width, queries * size), nn.Linear(width, 2 * keys * size, bias=False)
        self.out = nn.Linear(queries * size, width)
        self.norm = OwnNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.norm(self.ask(x).view(n, t, self.nq, -1)).transpose(1, 2)
        k, v = (y.reshape(n, t, self.nk, -1).transpose(1, 2) for y in self.tell(x).chunk(2, -1))
        q, k = self.turn(q), self.turn(k)  # type: ignore[operator]
        k, v = (y[:, :, None].expand(-1, -1, self.each, -1, -1).flatten(1, 2) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


class Fused(nn.Module):
    """Queries, keys and values of one layer, laid out in one of several ways."""

    def __init__(self, width: int, heads: int, layout: str) -> None:
        super().__init__()
        self.heads, self.layout, self.inner = heads, layout, width
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.qkv(x)
        if self.layout == "3hd":
            q, k, v = y.view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        elif self.layout == "h3d":
            q, k, v = y.view(n, t, self.heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        elif self.layout == "hd3":
            q, k, v = y.view(n, t, self.heads, -1, 3).permute(4, 0, 2, 1, 3).unbind(0)
        else:
            q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in y.split(self.inner, -1))
        scores = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(n, t, self.inner))


class ByEinsum(nn.Module):
    """Raw weights of three axes, and relative positions."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, heads, size) / 8) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, size, width) / 8)
        self.relative = nn.Embedding(15, heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bhtd", x, w) for w in (self.q, self.k, self.v))
        t = torch.arange(x.shape[1])
        bias = self.relative(t[:, None] - t[None] + 7).permute(2, 0, 1)
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) + bias
        return torch.einsum("bhts,bhsd,hdc->btc", scores.softmax(-1), v, self.o)


class Windows(nn.Module):
    """Attention in windows of an image, moved by half of one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = 4
        self.inner = Fused(width, heads, "3hd")

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        s = self.size
        y = torch.roll(x.permute(0, 2, 3, 1), (-2, -2), (1, 2)).view(n, h // s, s, w // s, s, c)
        y = self.inner(y.transpose(2, 3).reshape(-1, s * s, c))
        y = y.view(n, h // s, w // s, s, s, c).transpose(2, 3).reshape(n, h, w, c)
        return x + torch.roll(y, (2, 2), (1, 2)).permute(0, 3, 1, 2)


class Experts(nn.Module):
    """Experts in one weight of three axes, of which a router mixes all."""

    def __init__(self, width: int, num: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num, width, 2 * inner) / 8)
        self.down = nn.Parameter(torch.randn(num, inner, width) / 8)
        self.router = nn.Linear(width, num)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        gate, up = torch.bmm(x.flatten(0, 1).expand(len(self.up), -1, -1), self.up).chunk(2, -1)
        y = torch.bmm(F.silu(gate) * up, self.down).unflatten(1, x.shape[:2])
        return (y * shares.permute(2, 0, 1)[..., None]).sum(0)


class SeparateExperts(nn.Module):
    """Experts of their own widths, called one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, n), nn.GELU(), nn.Linear(n, width)) for n in (24, 32)
        )
        self.router = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        return sum(expert(x) * shares[..., i : i + 1] for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class Crossing(nn.Module):
    """Queries of one sequence, keys and values of another of another width."""

    def __init__(self, width: int, other: int, heads: int) -> None:
        super().__init__()
        self.h = heads
        self.make, self.q = nn.Linear(width, other), nn.Linear(width, width)
        self.kv, self.out = nn.Linear(other, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        memory = F.relu(self.make(x))
        q = self.q(x).view(n, t, self.h, -1).transpose(1, 2)
        k, v = self.kv(memory).view(n, t, 2, self.h, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Pooled(nn.Module):
    """A part that runs and whose result nobody uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pooler, self.inner = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        self.pooled = torch.tanh(self.pooler(x[:, 0]))
        return self.inner(x)


class Block(nn.Module):
    """A part in a residual stream."""

    def __init__(self, part: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.part, self.norm = part, norm

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(self.norm(x))


class Text(nn.Module):
    """An embedding, two blocks, a head."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList(Block(part, OwnNorm(32)) for part in parts)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Images(nn.Module):
    """A stem, two blocks, a head."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(*parts)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Skips(nn.Module):
    """A small U-Net: skips beside what comes back up, instance and group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.PReLU(16))
        self.b = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.GroupNorm(4, 24), nn.SiLU())
        self.up = nn.ConvTranspose2d(24, 16, 2, 2)
        self.c = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True), nn.ReLU())
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.c(torch.cat([x, self.up(self.b(x))], 1)))


def weight_normed(old: bool) -> nn.Module:
    """Convolutions with a weight norm of one of both kinds."""
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Conv2d(32, 24, 3, padding=1)), nn.ReLU(), norm(nn.Conv2d(24, 32, 3, padding=1)))
