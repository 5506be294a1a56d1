"""The costs of compression in tables, by CPU, as docs/benchmark.md has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["costs"]

_WORDS = {
    "step_overhead": {
        "ours": "training step of a ResNet-50 with masks against dense",
        "peer": "the same by torch.nn.utils.prune",
        "extra_bytes_per_weight": "bytes of memory a weight beyond dense",
    },
    "mask_update": {
        "reads": "exact global threshold of {item}, in reads of the weights",
        "extra_fraction": "its memory, as a share of the weights'",
    },
    "qat_step": {
        "resnet20": "step of QAT against float, ResNet-20",
        "resnet20_pt2e": "the same by torchao's PT2E",
        "vit": "step of QAT against float, ViT",
        "vit_pt2e": "the same by torchao's PT2E",
    },
    "plan": {"seconds": "seconds to plan a cut of 110 million weights", "copies": "its memory, in copies of the model"},
}


def _markdown(head: Sequence[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *rows])


def _numbers(kept: list[dict[str, Any]]) -> list[list[str]]:
    """A row a number."""
    rows = []
    for one in kept:
        kind, _, size = one["item"].partition(" ")
        for key, words in _WORDS.get(kind, {}).items():
            value = f"{one['headline'][key]:.3g}"
            rows.append([words.format(item=size), value, one["features"], f"`{one['command']}`"])
    return rows


def _files(kept: list[dict[str, Any]]) -> list[list[str]]:
    """A row a runtime, at batch 1 and 64."""
    found: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for one in kept:
        for row in one["rows"] if one["item"] == "deploy" else []:
            found.setdefault((one["features"], row["net"], row["runtime"]), {})[row["batch"]] = row
    return [
        [
            *(net, runtime, features),
            " / ".join(f"{by[batch]['speed-up']:.2f}" for batch in sorted(by)),
            f"{min(row['agreement'] for row in by.values()):.3f}",
            f"{next(iter(by.values()))['conversion s']:.0f}",
        ]
        for (features, net, runtime), by in found.items()
    ]


def costs(path: Path) -> str:
    """Both tables; nothing where nothing was measured."""
    if not path.is_file():
        return ""
    kept = json.loads(path.read_text())
    cpus = ", ".join(sorted({f"{one['cpu']} ({one['commit']}, {one['date']})" for one in kept}))
    numbers = _markdown(["what", "", "CPU features", "command"], _numbers(kept))
    head = ["net", "runtime", "CPU features", "int8 against float, batch 1 / 64", "agreement", "conversion, CPU s"]
    files = _markdown(head, _files(kept))
    says = "Written from `experiments/results/costs.json`, which `python -m experiments.bench costs` makes, on"
    return f"## Costs\n\n{says} {cpus}.\n\n{numbers}\n\n{files}"
