"""A searched model against a uniform one of the same bytes: ``task=search budget.bytes=...`` on the demo model.

Both start from the same dense model of each seed, lose channels at once, and are trained alike in int8; the searched
one loses of each group what sensitivities advise, the uniform one the same share of every group, the smallest share
with which its file is no larger than the searched one's budget. Bytes are of the .onnx file on disk, metric and
milliseconds of that file in onnxruntime. The images that are validated on also ranked the groups; nothing else was
chosen on them. Mean and sample deviation over the seeds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from experiments.jobs import quiet
from lightning_compress.tasks.search import Candidate, Search

QUIET = ("enable_progress_bar", "enable_model_summary")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--bytes, --epochs, --seeds."""
    parser.add_argument("--bytes", type=float, default=20000, dest="size", help="the budget")
    parser.add_argument("--epochs", type=int, default=20, help="of the dense training, and of each fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", action="store_true", help="distil from the dense model, both alike")


def configuration(seed: int, size: float, epochs: int, teacher: bool, folder: Path) -> DictConfig:
    """The search of one seed on the demo model."""
    GlobalHydra.instance().clear()
    overrides = ["experiment=mnist_prune_int8", "compression=none", "logger=none", "task=search", f"seed={seed}"]
    overrides += [f"dir={folder}", f"budget.bytes={size}", f"trainer.max_epochs={epochs}", f"search.teacher={teacher}"]
    overrides += [f"+trainer.{name}=false" for name in QUIET]
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        return compose("config", overrides)


def uniform(search: Search, size: float, folder: Path) -> Candidate:
    """The same share of every group, as small as the bytes allow."""
    groups, low, high = list(search.points[-1].shares), 0.0, 0.95

    def shares(share: float) -> dict[str, float]:
        return dict.fromkeys(groups, share)

    for _ in range(6):
        middle = (low + high) / 2
        options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 8}
        fits = search.fit(shares(middle), folder / "probe", False, **options).bytes <= size
        low, high = (low, middle) if fits else (middle, high)
    return search.fit(shares(high), folder / "uniform", True)


def run(size: float = 20000, epochs: int = 20, seeds: int = 3, teacher: bool = False) -> dict[str, Any]:
    """Headline: metric of the searched and the uniform models, and the largest file."""
    quiet()
    found: dict[str, list[Candidate]] = {"searched": [], "uniform": []}
    denses = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            search = Search(configuration(seed, size, epochs, teacher, folder), {"bytes": size})
            denses.append(search.dense)
            found["searched"].append(search.within_file_budgets())
            found["uniform"].append(uniform(search, size, folder))
    rows = []
    for method, candidates in found.items():
        metrics = [c.metric for c in candidates]
        rows.append(
            {
                "method": method,
                "metric": mean(metrics),
                "sd": stdev(metrics) if seeds > 1 else math.nan,
                "dense": mean(denses),
                "bytes": max(c.bytes for c in candidates),
                "ms": mean(c.latency_ms for c in candidates),
                "MACs": mean(c.macs for c in candidates),
                "by seed": " ".join(f"{metric:.4f}" for metric in metrics),
            }
        )
    headline = {row["method"]: row["metric"] for row in rows} | {"budget": size, "max_bytes": rows[0]["bytes"]}
    runs = [{"method": m, "seed": i, **vars(c)} for m, group in found.items() for i, c in enumerate(group)]
    return {"headline": headline, "rows": rows, "runs": runs}
