"""Networks of branches in the runtimes of phones, whose kernels read and write one scale where values only move."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import int8
from lightning_compress.deploy.reasons import reason_of
from lightning_compress.forward import Inputs

from .helpers import run
from .test_recurrent_files import exported


class Net(nn.Module):
    """A forward that is given, around three convolutions."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.given = forward
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.given(self, x))


class Query(nn.Module):
    """Learned vectors that attend to the input, whose weight is cut into those of queries and of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 8))
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(x.shape[0], -1, -1)
        return self.last(self.attention(queries, x, x, need_weights=False)[0])


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


NETS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "U": (lambda net, x: torch.cat([up(F.relu(net.a(F.max_pool2d(x, 2)))), F.relu(net.b(x))], 1), 16),
    "smooth U": (
        lambda net, x: torch.cat(
            [F.interpolate(net.a(F.max_pool2d(x, 2)), scale_factor=2.0, mode="bilinear"), net.b(x)], 1
        ),
        16,
    ),
    "pyramid": (lambda net, x: up(net.a(F.max_pool2d(x, 2))) + net.b(x), 8),
    "two": (lambda net, x: torch.cat([net.a(x), F.relu(net.b(x))], 1), 16),
    "dense": (lambda net, x: torch.cat([x, F.relu(net.a(x)), net.b(x)], 1), 19),
    "pools": (lambda net, x: torch.cat([F.max_pool2d(net.a(x), 2), F.avg_pool2d(F.relu(net.b(x)), 2)], 1), 16),
    "pool first": (lambda net, x: F.max_pool2d(net.a(x), 2), 8),
    "padded": (lambda net, x: torch.cat([F.pad(net.a(x[:, :, 1:-1, 1:-1]), (1, 1, 1, 1)), net.b(x)], 1), 16),
    "cut": (lambda net, x: torch.cat([(a := F.relu(net.a(x)).chunk(2, 1))[0], net.b(x), a[1]], 1), 16),
    "squeezed": (lambda net, x: F.max_pool2d(torch.cat([F.relu(net.a(x)), F.relu(net.b(x))], 1), 2), 16),
}


@pytest.mark.runtimes
@pytest.mark.parametrize("runtime", ["executorch", "litert"])
@pytest.mark.parametrize("name", [*NETS, "queries"])
def test_the_file_answers_as_the_model(name: str, runtime: str, tmp_path: Path) -> None:
    """Half of these did not load, or were off by up to a fifth of the range."""
    torch.manual_seed(0)
    model = Query() if name == "queries" else Net(*NETS[name])
    x = torch.randn((4, 17, 8) if name == "queries" else (4, 3, 8, 8))
    runner = exported(model, x, tmp_path, int8(), runtime)
    expected = run(model, x)
    assert (runner(Inputs((x,), {})) - expected).abs().max() < 0.03 * (expected.max() - expected.min())


class Largest(nn.Module):
    """The three largest of what a linear layer answers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).topk(3, 1)[0]


@pytest.mark.runtimes
def test_a_kernel_that_is_missing_is_said(tmp_path: Path) -> None:
    """LiteRT's runtime has none for what its converter makes of this."""
    with pytest.raises(ValueError, match="builtin opcode") as caught:
        exported(Largest(), torch.randn(4, 17, 8), tmp_path, int8(), "litert")
    assert reason_of(caught.value).startswith("LiteRT has no kernel for an operation of the model")
