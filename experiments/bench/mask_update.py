"""How much an exact global mask update costs, in reads of the weights: ours beside torch's ways, single-threaded.

One read is the time of summing all weights at memory bandwidth. ``find`` is the exact global threshold at 80 %,
``update`` the threshold and the new masks. All run in this process, interleaved; medians of CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_compress.layers import Layer
from lightning_compress.pruning import Element, Magnitude, Masks
from lightning_compress.pruning.threshold import num_dropped
from lightning_compress.pruning.updates import Streamed

SPARSITY = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--num-params."""
    parser.add_argument("--num-params", type=float, default=25e6, help="weights in all")
    parser.add_argument("--repeats", type=int, default=5)


def make_layers(num_params: int) -> list[Layer]:
    """Weights in tensors of unlike sizes, the largest a tenth of all."""
    shares = [0.1] * 4 + [0.05] * 6 + [0.01] * 25 + [0.001] * 50
    generator = torch.Generator().manual_seed(0)
    layers = []
    for i, share in enumerate(shares):
        module = nn.Linear(1, 1, bias=False)
        size = max(1, int(share / sum(shares) * num_params))
        module.weight = nn.Parameter(
            torch.empty(size, 1).normal_(0, 1 + i % 7, generator=generator), requires_grad=False
        )
        layers.append(Layer(f"layer{i}", module))
    return layers


def peak(reset: bool = False) -> int:
    """Bytes of memory that the process held at most since the last reset, as Linux counts them; code does not count."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    most, code = (int(status.split(f"{key}:")[1].split()[0]) * 1024 for key in ("VmHWM", "RssFile"))
    return most - code


def is_exact(layers: list[Layer], masks: Mapping[str, Tensor]) -> bool:
    """Exactly k are dropped, none larger than a kept one, equal ones in order; to 2e8 also: what torch.sort drops."""
    kept = [masks[layer.name].view(-1).bool() for layer in layers]
    weights = [layer.weight.detach().view(-1) for layer in layers]
    k = num_dropped(SPARSITY, sum(w.numel() for w in weights))
    cut = max(float(w.abs()[~m].max()) for w, m in zip(weights, kept, strict=True) if not m.all())
    least = min(float(w.abs()[m].min()) for w, m in zip(weights, kept, strict=True) if m.any())
    ties = torch.cat([m[w.abs() == cut] for w, m in zip(weights, kept, strict=True)]).int()
    exact = sum(m.numel() - int(m.sum()) for m in kept) == k and cut <= least and bool((ties.diff() >= 0).all())
    if sum(w.numel() for w in weights) <= 2e8:
        expected = torch.ones(sum(w.numel() for w in weights), dtype=torch.bool)
        expected[torch.sort(torch.cat(weights).abs(), stable=True).indices[:k]] = False
        exact &= torch.equal(torch.cat(kept), expected)
    return exact


def run(num_params: float = 25e6, repeats: int = 5) -> dict[str, Any]:
    """Headline: reads, extra_fraction, exact, update_reads."""
    torch.set_num_threads(1)
    layers = make_layers(int(num_params))
    weights = [layer.weight.detach() for layer in layers]
    num = sum(w.numel() for w in weights)
    masks = {layer.name: torch.ones_like(layer.weight, dtype=torch.int8) for layer in layers}
    streamed = Streamed(Magnitude(), layers)
    everywhere = range(len(layers))
    k = num_dropped(SPARSITY, num)
    small = make_layers(1000)
    Masks(small).update(Magnitude(), Element(), SPARSITY, "global")  # what is loaded at a first call does not count
    before = peak(reset=True)
    found = streamed.drop_lowest(everywhere, k)
    extra = peak() - before
    streamed.write(masks, found, everywhere)
    exact = is_exact(layers, masks)

    def flat() -> Tensor:
        return torch.cat([w.view(-1).abs() for w in weights])

    calls: dict[str, Callable[[], Any]] = {
        "one read (sum)": lambda: [w.sum() for w in weights],
        "ours, find": lambda: streamed.drop_lowest(everywhere, k),
        "ours, update": lambda: streamed.write(masks, streamed.drop_lowest(everywhere, k), everywhere),
    }
    peers: dict[str, Callable[[], Any]] = {
        "torch.topk": lambda: torch.topk(flat(), num - k, sorted=False),
        "torch.kthvalue": lambda: flat().kthvalue(k),
        "prune.global_unstructured": lambda: _global_unstructured(weights),
    }
    if num <= 2e8:
        calls |= peers
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats):
        for name, call in calls.items():
            if i and name in peers and i > 1:
                continue  # the slow ones twice
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    read = median(taken["one read (sum)"])
    rows = [{"what": n, "ms": median(t) * 1e3, "reads": median(t) / read} for n, t in taken.items()]
    reads = {row["what"]: row["reads"] for row in rows}
    headline = {
        "reads": reads["ours, find"],
        "extra_fraction": extra / (4 * num),
        "exact": int(exact),
        "update_reads": reads["ours, update"],
        "num_params": num,
    }
    return {"headline": headline, "rows": rows}


def _global_unstructured(weights: list[Tensor]) -> None:
    modules = []
    for w in weights:
        module = nn.Linear(1, 1, bias=False)
        module.weight = nn.Parameter(w, requires_grad=False)
        modules.append((module, "weight"))
    prune.global_unstructured(modules, prune.L1Unstructured, amount=SPARSITY)
