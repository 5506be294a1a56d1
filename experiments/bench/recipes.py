"""The recipes for kinds of model, each on a model of its kind: what the file is worth that it leaves.

Each model is trained in float once; from there the recipe, as ``conf/compression`` has it, compresses it in half as
many steps, and the control trains on for as many. The metric is of test examples from the .onnx file in onnxruntime;
bytes are of that file and of the float model's; milliseconds at batch 1 on one thread.

Needs the environment of ``make test-foreign``.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import experiments.foreign  # noqa: F401  # before anything that imports torchvision

# isort: split
import lightning.pytorch as pl
from torch import nn

from experiments.kinds import KINDS, Batches, Kind, Model, Split
from experiments.tasks import data_folder
from experiments.training import kept, quiet
from lightning_compress import recipe
from lightning_compress.deploy.files import Pair, write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.size import weigh
from lightning_compress.forward import Inputs

_CONTROL = "trained on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --folder, --recipe, --seeds."""
    parser.add_argument("--data", type=Path, help="folder of mnist70k.npz, fsdd.npz and tinyshakespeare.txt")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the trained models")
    parser.add_argument("--recipe", choices=list(KINDS), action="append", dest="names", help="all without it")
    parser.add_argument("--seeds", type=int, default=3)


def fit(kind: Kind, net: nn.Module, data: Split, steps: int, rate: float, seed: int, *, by: str = "") -> Model:
    """A module after so many steps, by a recipe or none."""
    pl.seed_everything(seed, verbose=False)
    model = Model(kind, net, rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=recipe(by, "report=null", "export=null") if by else [],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            gradient_clip_val=1.0,
        )
        trainer.fit(model, Batches(kind, data[0], data[1], steps, seed))
    model.eval()
    return model


def of_file(kind: Kind, model: Model, data: Split) -> dict[str, float]:
    """Metric, kilobytes and milliseconds of the .onnx file."""
    onnx = FORMATS["onnx"]
    example = Inputs((data[2][:4].contiguous(),), {})
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(onnx, model, example, Path(folder) / "model.onnx", (1,))
        pair = Pair(onnx, files, model, example)
        parts = zip(data[2].split(250), data[3].split(250), strict=True)
        metrics = [float(kind.metric(pair.shipped(Inputs((x.contiguous(),), {})), y)) for x, y in parts]
        ms, ms_float = (timed["1"].ms for timed in pair.latency(0.5))
        return {"metric": mean(metrics), "KB": weigh(files.shipped[1])[0] / 1e3, "ms": ms, "float": ms_float}


def measure(name: str, source: Path, folder: Path, seeds: int) -> dict[str, Any]:
    """The row of a recipe."""
    kind = KINDS[name]
    data = kind.load(source)
    pl.seed_everything(0, verbose=False)
    train = partial(fit, kind, data=data, steps=kind.steps, rate=kind.rate, seed=0)
    dense = kept(folder / f"kind-{name}.pt", kind.build, lambda net: train(net))
    before = of_file(kind, Model(kind, dense, 0.0).eval(), data)
    print(name, "float", before, flush=True)
    found: dict[str, list[dict[str, float]]] = {"": [], name: []}
    for seed in range(1, seeds + 1):
        for by, runs in found.items():
            made = fit(kind, copy.deepcopy(dense), data, kind.more, kind.rate / 2, seed, by=by)
            runs.append(of_file(kind, made, data))
            print(by or _CONTROL, seed, runs[-1], flush=True)
    metrics = [run["metric"] for run in found[name]]
    return {
        "recipe": name,
        "model": kind.model,
        "metric": kind.says,
        "float": before["metric"],
        _CONTROL: mean(run["metric"] for run in found[""]),
        "file": mean(metrics),
        "sd": stdev(metrics) if seeds > 1 else math.nan,
        "float KB": before["KB"],
        "KB": mean(run["KB"] for run in found[name]),
        "float ms": before["ms"],
        "ms": mean(run["ms"] for run in found[name]),
    }


def run(
    data: Path | None = None, folder: Path = Path("outputs/bench"), names: list[str] | None = None, seeds: int = 3
) -> dict[str, Any]:
    """Headline: the largest share of its float file that a recipe's file takes."""
    quiet()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [measure(name, data_folder(data), folder, seeds) for name in names or KINDS]
    return {"headline": {"largest": max(row["KB"] / row["float KB"] for row in rows)}, "rows": rows}
