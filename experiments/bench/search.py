"""Searched models against uniform ones of the same bytes: ``task=search budget.bytes=...`` on the demo model.

All start from the same dense model of each seed, lose channels at once, and are trained alike, in int8 or in weights of
four bits; each with and without the dense model as a teacher. The searched ones give up what sensitivities advise; the
uniform ones lose the same share of the channels everywhere, the smallest with which the file meets the budget. Bytes
are of the .onnx file on disk; the metric is that file's in onnxruntime, on MNIST's test images without the 5,000 that
were trained and validated on. Mean and sample deviation over the seeds.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from experiments.tasks import data_folder, mnist
from experiments.training import quiet
from lightning_compress.analysis.allocation import Allocation
from lightning_compress.demo.data import MNIST5k
from lightning_compress.demo.models import ResNet
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.forward import Inputs
from lightning_compress.tasks.search import Search
from lightning_compress.tasks.trial import Candidate

QUIET = ("enable_progress_bar", "enable_model_summary")
METHODS = ("searched", "uniform int8", "uniform w4a8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The budget, how long to train, and where MNIST lies."""
    parser.add_argument("--bytes", type=float, default=20000, dest="size", help="the budget")
    parser.add_argument("--epochs", type=int, default=20, help="of the dense training, and of each fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--data", type=Path, help="folder of mnist70k.npz")


def configuration(seed: int, size: float, epochs: int, folder: Path) -> DictConfig:
    """The search of one seed on the demo model."""
    GlobalHydra.instance().clear()
    overrides = ["experiment=mnist_prune_int8", "compression=none", "logger=none", "task=search", f"seed={seed}"]
    overrides += [f"dir={folder}", f"budget.bytes={size}", f"trainer.max_epochs={epochs}"]
    overrides += [f"+trainer.{name}=false" for name in QUIET]
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        return compose("config", overrides)


def unseen(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The test images of MNIST that are not among those of the demo."""
    data, demo = mnist(folder), MNIST5k()
    demo.setup("fit")
    images = torch.cat([part.tensors[0] for part in (demo.train, demo.val)]).flatten(1).numpy()
    known = {row.tobytes() for row in np.round(images, 3)}
    new = [i for i, row in enumerate(np.round(data.x_test.flatten(1).numpy(), 3)) if row.tobytes() not in known]
    return data.x_test[new].unsqueeze(1), data.y_test[new]


def accuracy(path: Path, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of an .onnx file, in its runtime, in per cent."""
    runner = FORMATS["onnx"].runner(path, torch.zeros(1, 10))
    answers = torch.cat([runner(Inputs((part,), {})).argmax(1) for part in x.split(500)])
    return 100 * float((answers == y).float().mean())


def uniform(search: Search, size: float, folder: Path, bits: int | None) -> Allocation:
    """The same share of all channels, as small as the bytes allow."""
    whole = search.points[-1].plan
    low, high = 0.0, 0.95

    def plan(share: float) -> Allocation:
        return Allocation(dict.fromkeys(whole.shares, share), {} if bits is None else dict.fromkeys(whole.bits, bits))

    for _ in range(6):
        middle = (low + high) / 2
        options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 8}
        fits = search.fit(plan(middle), folder / "probe", False, **options).bytes <= size
        low, high = (low, middle) if fits else (middle, high)
    return plan(high)


def do(job: tuple[int, float, int, Path]) -> list[dict[str, Any]]:
    """All methods of one seed."""
    seed, size, epochs, data = job
    x, y = unseen(data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        search = Search(configuration(seed, size, epochs, folder), {"bytes": size})
        dense = ResNet.load_from_checkpoint(search.cfg.init_from).eval()
        with torch.no_grad():
            reference = 100 * float((dense(x).argmax(1) == y).float().mean())
        found = search.within_file_budgets()
        plans = {"searched": found.plan, "uniform int8": uniform(search, size, folder, None)}
        plans["uniform w4a8"] = uniform(search, size, folder, 4)
        rows = []
        for method, plan in plans.items():
            for teacher in (False, True):
                search.cfg.search.teacher, where = teacher, folder / f"{method} {teacher}"
                candidate = search.fit(plan, where, True)
                tested = accuracy(where / "deploy" / "model.onnx", x, y)
                size_on_disk = (where / "deploy" / "model.onnx").stat().st_size
                rows.append({"method": method, "teacher": teacher, "seed": seed, "dense": reference, "test": tested})
                rows[-1] |= {"on_disk": size_on_disk, "num_tested": len(y), **_plain(candidate)}
    return rows


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {**vars(candidate), "plan": vars(candidate.plan)}


def run(
    size: float = 20000, epochs: int = 20, seeds: int = 3, workers: int = 2, data: Path | None = None
) -> dict[str, Any]:
    """Headline: accuracy of searched and uniform models on unseen images, and the largest file."""
    jobs = [(seed, size, epochs, data_folder(data)) for seed in range(seeds)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), quiet) as pool:
        runs = [row for rows in pool.map(do, jobs) for row in rows]
    rows, headline = [], dict[str, float]()
    for method in METHODS:
        for teacher in (False, True):
            own = [run for run in runs if run["method"] == method and run["teacher"] == teacher]
            tests = [run["test"] for run in own]
            rows.append(
                {
                    "method": method,
                    "teacher": "yes" if teacher else "no",
                    "dense": mean(run["dense"] for run in own),
                    "test": f"{mean(tests):.2f} +- {stdev(tests) if seeds > 1 else math.nan:.2f}",
                    "bytes": max(run["on_disk"] for run in own),
                    "weights": round(mean(run["num_params"] for run in own)),
                    "bits": mean(run["bits"] for run in own),
                    "ms": mean(run["latency_ms"] for run in own),
                    "MACs": round(mean(run["macs"] for run in own)),
                    "by seed": " ".join(f"{test:.2f}" for test in tests),
                }
            )
            headline[f"{method.replace(' ', '_')}{'_taught' if teacher else ''}"] = mean(tests)
    headline |= {"budget": size, "max_bytes": max(run["on_disk"] for run in runs)}
    return {"headline": headline, "rows": rows, "runs": runs}
