"""What enforcing masks costs a training step: ours beside torch.nn.utils.prune, ResNet-50-size with Adam at 80 %.

The step is forward, backward and optimizer step of 4 images of 64 x 64, so that the weights weigh most. Dense, ours and
the peer start from the same weights and run in this process, interleaved; medians of CPU time, single-threaded.
Memory is the peak over a step, each in a process of its own whose allocator returns freed memory at once: else the peak
is as much what glibc keeps as what is held.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from experiments.bench.mask_update import peak
from lightning_compress.layers import find_layers
from lightning_compress.pruning import Element, Magnitude, Masks

SPARSITY, BATCH_SIZE = 0.8, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--repeats."""
    parser.add_argument("--repeats", type=int, default=9)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut (He 2015, arXiv:1512.03385)."""

    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = [(num_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or num_in != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(num_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Four times the width, half the size where the stride is 2."""
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.relu(y) if i < 2 else y
        return F.relu(y + self.shortcut(x))


def resnet50() -> nn.Module:
    """25.6 million weights."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    num_in = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(depth):
            blocks.append(Bottleneck(num_in, width, stride if i == 0 else 1))
            num_in = 4 * width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_in, 1000))


def dense(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Nothing."""


def ours(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """int8 masks, multiplied in after the optimizer's step."""
    masks = Masks(find_layers(model)[0])
    masks.update(Magnitude(), Element(), SPARSITY, "global")
    optimizer.register_step_post_hook(partial(_enforce, masks))


def _enforce(masks: Masks, *_: Any) -> None:
    masks.enforce(masks.layers)


def peer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Float masks, multiplied in at every forward; the optimizer goes on with the renamed weights."""
    for layer in find_layers(model)[0]:
        prune.custom_from_mask(layer.module, "weight", layer.weight != 0)


def step_of(method: Callable[..., None], model: nn.Module) -> Callable[[], None]:
    """One training step of a copy of the model under a method."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    method(model, optimizer)
    x, y = torch.randn(BATCH_SIZE, 3, 64, 64), torch.arange(BATCH_SIZE)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


METHODS = {"dense": dense, "ours": ours, "peer": peer}


def pruned() -> nn.Module:
    """The weights from which all start."""
    model = resnet50()
    Masks(find_layers(model)[0]).update(Magnitude(), Element(), SPARSITY, "global")
    return model


def peak_of(method: str) -> int:
    """Peak memory over a step after the first; a median, since Linux counts the pages of a process roughly."""
    torch.set_num_threads(1)
    step = step_of(METHODS[method], pruned())
    step()
    peaks = []
    for _ in range(5):
        peak(reset=True)
        step()
        peaks.append(peak())
    return int(median(peaks))


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a new process; its allocator returns what is freed."""
    thresholds = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with patch.dict(os.environ, thresholds | {"MALLOC_ARENA_MAX": "1"}), executor:
        return executor.submit(function, *args).result()


def run(repeats: int = 9) -> dict[str, Any]:
    """Headline: ours and peer against dense, and our extra peak memory in bytes a weight."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model = pruned()
    num_weights = sum(layer.weight.numel() for layer in find_layers(model)[0])
    peaks = {name: median(in_own_process(peak_of, name) for _ in range(3)) for name in METHODS}
    steps = {name: step_of(method, model) for name, method in METHODS.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if i:  # the first warms up
                taken[name].append(time.process_time() - begin)
    rows = [
        {
            "method": name,
            "step_ms": median(times) * 1e3,
            "ratio": median(t / d for t, d in zip(times, taken["dense"], strict=True)),
            "peak_mb": peaks[name] / 2**20,
        }
        for name, times in taken.items()
    ]
    ratio = {row["method"]: row["ratio"] for row in rows}
    extra = (peaks["ours"] - peaks["dense"]) / num_weights
    return {"headline": {"ours": ratio["ours"], "peer": ratio["peer"], "extra_bytes_per_weight": extra}, "rows": rows}
