"""NVIDIA ModelOpt's FastNAS: a search for the widths of layers, scored on the data, before the training."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import modelopt.torch.prune as mtp
import torch
from modelopt.torch.prune.fastnas import FastNASConfig
from torch import nn

from experiments.training import Budget, num_macs, train

BATCH, NUM_SCORED = 64, 1024  # examples of the training part that a candidate is scored on
DIVISOR = 4  # as others leave channels
RATIOS = tuple(share / 16 for share in range(1, 17))


def _space() -> dict[str, Any]:
    """Its own rules with widths that suit small networks; by default a layer keeps a multiple of 32 channels."""
    rules: dict[str, Any] = FastNASConfig().model_dump()
    for kind in rules.values():
        for rule in kind.values() if isinstance(kind, dict) else ():
            for name in rule or {}:
                if name.endswith("_divisor"):
                    rule[name] = DIVISOR
                if name.endswith("_ratio"):
                    rule[name] = RATIOS
    return rules


def searched(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """The best candidate with so many times fewer multiplications, trained."""
    task, data = budget.task, budget.data
    # it refuses channels last
    model = model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    xs, ys = data.x_train[:NUM_SCORED].split(BATCH), data.y_train[:NUM_SCORED].split(BATCH)

    @torch.no_grad()
    def score(candidate: nn.Module) -> float:
        candidate.eval()
        found = sum(float(task.metric.sum_of(candidate(x), y)) for x, y in zip(xs, ys, strict=True))
        return found if task.metric.higher else -found

    example = data.x_train[:1].contiguous()
    random.seed(budget.seed)
    torch.manual_seed(budget.seed)
    with tempfile.TemporaryDirectory() as folder:
        narrowed, _ = mtp.prune(
            model,
            mode=[("fastnas", _space())],
            constraints={"flops": 2 * num_macs(model, example) / fewer},  # it counts a multiplication as two
            dummy_input=example,
            config={
                "data_loader": list(zip(xs, ys, strict=True)),
                "score_func": score,
                "collect_func": lambda batch: batch[0],
                "checkpoint": str(Path(folder) / "search.pth"),
            },
        )
    return train(narrowed, budget)
