"""What planning a cut costs: seconds and memory for models of up to 110 million parameters, with all proofs.

Transformers of the width and depth named lose half of their channels: the groups are found, proven, chosen and proven
again. Single-threaded CPU time; the memory is the growth of the process' peak over the model itself, each model in a
process of its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from typing import Any

import torch

from experiments.nets import Bert
from lightning_compress.copies import copy_module
from lightning_compress.structure.choose import Drops, Limits, num_channels
from lightning_compress.structure.groups import couple
from lightning_compress.structure.proof import choose_channels, prove_groups

SIZES = {"4 blocks of 256": (256, 4, 4), "8 blocks of 512": (512, 8, 8), "12 blocks of 768": (768, 12, 12)}
_VOCABULARY = 30522


def run() -> dict[str, Any]:
    """Headline: seconds and peak memory, in copies of the model, of the largest."""
    rows = []
    for name in SIZES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (name,)))
        print(rows[-1], flush=True)
    return {"headline": {"seconds": rows[-1]["seconds"], "copies": rows[-1]["memory / model"]}, "rows": rows}


def measure(name: str) -> dict[str, Any]:
    """Plan for one model."""
    torch.set_num_threads(1)
    dim, heads, depth = SIZES[name]
    model = Bert(dim, heads, depth, _VOCABULARY).eval()
    x = torch.randint(_VOCABULARY, (2, 16))
    megabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def forward(model: torch.nn.Module) -> Any:
        return model(x)

    begin = time.process_time()
    coupling = prove_groups(model, forward, couple(copy_module(model), forward), Limits())
    scores = {name: p.detach().abs() for name, p in model.named_parameters() if p.dim() > 1}
    total = sum(int(group.sizes.sum()) for group in coupling.groups)

    def reached(drops: Drops, record: Any) -> bool:
        return num_channels(coupling.groups, drops) <= total / 2

    limits = Limits(scope="balanced")
    enough = choose_channels(model, forward, coupling, scores, limits, reached)[2]
    assert enough, coupling.skipped
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(coupling.groups),
        "seconds": time.process_time() - begin,
        "MB": peak - before,
        "memory / model": (peak - before) / megabytes,
    }
