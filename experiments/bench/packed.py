"""Packed checkpoints: bytes of a large pruned one beside other formats, and how small a network can be sent.

resnet50: a 90 % pruned ResNet-50-size checkpoint as it is stored here and elsewhere, against its dense ``.pt`` file.
The same state dict each time: convolutions and the last layer pruned together by magnitude, norms and buffers dense.
COO and CSR are torch's layouts in a ``.pt`` file, CSR with 32-bit indices. Every way is decoded again and compared bit
for bit. Single-threaded, from memory to memory but for ours, which goes through the file; medians.

lenet300, lenet5: the networks of Deep Compression (Han 2016, arXiv:1510.00149) on MNIST. A dense model is trained, then
pruned and quantized in one fit by our callbacks, and packed. Its control is the same dense model trained on for as many
epochs, at the same rate, on the same batches. The dense LeNet-5, trained on, teaches both networks; a second control is
taught by it too, and not compressed. The file is read in a fresh process and tested there, once, on the whole test
part; its bytes, all of them, are compared with four a parameter. What a recipe says was chosen on a sixth of the
training part, one seed. Mean and sample deviation over the seeds.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from rich.progress import track
from torch import nn

from experiments.bench.step_overhead import resnet50
from experiments.jobs import trained
from experiments.layouts import is_same, ways
from experiments.tasks import LENET5, TASKS, Data, Task, data_folder
from experiments.training import Budget, accuracy, fit, kept, quiet, train
from lightning_compress.callbacks import GradualPruning, KnowledgeDistillation, QuantizationAwareTraining
from lightning_compress.deploy.packed import load_packed, save_packed
from lightning_compress.layers import find_layers
from lightning_compress.phase import Phase
from lightning_compress.pruning import LAMP, Element, Magnitude, Masks
from lightning_compress.quantization import Codebook, Scheme

SPARSITY = 0.9
_MEASURED = ("bytes", "ratio", "error", "dense_error", "taught_error", "error_before_packing")
_COLUMNS = ("file", "mb", "times smaller", "exact", "encode_s", "decode_s", "error", "dense error", "taught dense")


@dataclass(frozen=True)
class Recipe:
    """How a network is compressed.

    Args:
        task: The network, its data, and its dense training.
        sparsity: Share of the weights that are dropped.
        bits: Bits of an index into a layer's codebook.
        epochs: Epochs of compression, and of the control.
        rate: Learning rate at the start of these.
        alpha: Weight of the teacher.
        temperature: Of its answers; its square scales the gradient, at which a LeNet-5 diverges sooner.
    """

    task: Task
    sparsity: float
    bits: int
    epochs: int
    rate: float
    alpha: float = 0.9
    temperature: float = 4.0


TEACHER = "lenet5"
RECIPES = {
    "lenet300": Recipe(TASKS["lenet300"], 0.935, 3, 12, 0.05),
    "lenet5": Recipe(LENET5, 0.935, 3, 16, 0.02, temperature=2.0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to run, and where data and trained models lie."""
    parser.add_argument("--net", choices=["resnet50", *RECIPES], action="append", dest="nets", help="all without it")
    parser.add_argument("--repeats", type=int, default=5, help="of the timings of resnet50")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--data", type=Path, help="folder of mnist70k.npz")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the dense models")


def _formats(repeats: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Headline and rows of resnet50."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Sparse (CSR tensor|invariant)")
    model = resnet50()
    masks = Masks(find_layers(model)[0])
    masks.update(Magnitude(), Element(), SPARSITY, "global")
    state = {name: value.detach() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    signed = {n: v * torch.randn(v.shape, generator=generator).sign() if v.dim() > 1 else v for n, v in state.items()}
    found = {name: (state, *way) for name, way in ways().items()}
    found["ours, zeros of either sign"] = (signed, *ways()["ours"])
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    sizes, exact = {}, {}
    for _ in range(repeats):
        for name, (value, encode, decode) in found.items():
            begin = time.perf_counter()
            data = encode(value)
            middle = time.perf_counter()
            decoded = decode(data)
            taken[name].append((middle - begin, time.perf_counter() - middle))
            sizes[name], exact[name] = len(data), is_same(decoded, value)
    rows = [
        {
            "file": name,
            "mb": sizes[name] / 1e6,
            "times smaller": sizes[".pt"] / sizes[name],
            "exact": int(exact[name]),
            "encode_s": median(t for t, _ in times),
            "decode_s": median(t for _, t in times),
            "error": "-",
            "dense error": "-",
            "taught dense": "-",
        }
        for name, times in taken.items()
    ]
    ours = next(row for row in rows if row["file"] == "ours")
    headline: dict[str, Any] = {key: ours[key] for key in ("exact", "encode_s", "decode_s")}
    return {"resnet50_ratio": sizes["ours"] / sizes[".pt"], **headline}, rows


def compressed(model: nn.Module, teacher: nn.Module, budget: Budget, recipe: Recipe) -> nn.Module:
    """Half of the run to prune, then quantized to a codebook a layer; taught all along."""
    scheme = Scheme(weight=Codebook(recipe.bits), inputs=None, weight_granularity="tensor")
    callbacks = [
        GradualPruning(recipe.sparsity, LAMP(power=0.5), phase=Phase(0.0, 0.5)),
        QuantizationAwareTraining(scheme, calibrate=Phase(0.5, 0.6), phase=Phase(0.6, 1.0)),
        KnowledgeDistillation(teacher, recipe.alpha, recipe.temperature),
    ]
    return fit(model, budget, callbacks)


def tested(net: str, path: str, folder: str) -> float:
    """Error in per cent of a packed file; called in a fresh process."""
    task = RECIPES[net].task
    model = task.build()
    load_packed(path, model)
    return 100 - accuracy(model, task.load(Path(folder)))


@dataclass(frozen=True)
class Job:
    """One network of one seed; with ``cut`` all on the training part, for tuning."""

    net: str
    seed: int
    data: Path
    folder: Path
    cut: bool = False

    @property
    def recipe(self) -> Recipe:
        """How it is compressed."""
        return RECIPES[self.net]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.net}-{self.seed}{'-cut' if self.cut else ''}"

    def load(self) -> Data:
        """What it is trained and tested on."""
        data = self.recipe.task.load(self.data)
        return data.cut(self.seed) if self.cut else data


def dense(job: Job) -> nn.Module:
    """The dense model, from its file where there is one."""
    return trained(job.recipe.task, job.seed, job.load(), job.folder, job.cut)


def _budget(job: Job) -> Budget:
    return Budget(job.recipe.task, job.load(), job.seed + 1000, job.recipe.epochs, job.recipe.rate)


def control(job: Job) -> nn.Module:
    """The dense model trained on, from its file where there is one."""
    path = job.folder / f"{job.name}-{job.recipe.epochs}-at-{job.recipe.rate:g}.pt"
    return kept(path, lambda: dense(job), lambda model: train(model, _budget(job))).eval()


def make_control(job: Job) -> None:
    """Train what is missing; what breaks here breaks again, and is said, where the control is needed."""
    with suppress(Exception):
        control(job)


def do(job: Job) -> dict[str, Any]:
    """Controls, and the network compressed, packed and tested; a run that breaks is a row, not the end of the table."""
    begin, measured, failure = time.perf_counter(), dict.fromkeys(_MEASURED, math.nan), ""
    try:
        measured = _measured(job)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - begin
    return {"net": job.net, "seed": job.seed, **measured, "seconds": seconds, "failure": failure}


def _measured(job: Job) -> dict[str, float]:
    data, task = job.load(), job.recipe.task
    teacher = control(replace(job, net=TEACHER))
    taught = fit(dense(job), _budget(job), [KnowledgeDistillation(teacher, job.recipe.alpha, job.recipe.temperature)])
    model = compressed(dense(job), teacher, _budget(job), job.recipe)
    path = job.folder / f"{job.name}.safetensors"
    save_packed(model, path)
    if job.cut:  # another process would not know the cut
        fresh = task.build()
        load_packed(path, fresh)
        error = 100 - accuracy(fresh, data)
    else:
        code = "import sys; from experiments.bench.packed import tested; print(tested(*sys.argv[1:]))"
        command = [sys.executable, "-c", code, job.net, str(path), str(job.data)]
        error = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    raw = 4 * sum(p.numel() for p in model.parameters())
    return {
        "bytes": path.stat().st_size,
        "ratio": raw / path.stat().st_size,
        "error": error,
        "dense_error": 100 - accuracy(control(job), data),
        "taught_error": 100 - accuracy(taught, data),
        "error_before_packing": 100 - accuracy(model, data),
    }


def _spread(values: list[float]) -> float:
    known = len(values) > 1 and all(map(math.isfinite, values))  # a run that broke leaves no spread
    return stdev(values) if known else math.nan


def run(
    nets: list[str] | None = None,
    repeats: int = 5,
    seeds: int = 3,
    workers: int = 2,
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
) -> dict[str, Any]:
    """Headline: resnet50_ratio, exact, encode_s, decode_s of ours; ratio, error and the control's error of the nets."""
    chosen = nets or ["resnet50", *RECIPES]
    trained = [net for net in chosen if net in RECIPES]
    headline, rows = _formats(repeats) if "resnet50" in chosen else ({}, [])
    jobs = [Job(net, seed, data_folder(data), folder) for net in trained for seed in range(seeds)]
    for job in jobs:
        job.load()  # what is missing is said before anything is trained
    needed = dict.fromkeys([*(replace(job, net=TEACHER) for job in jobs), *jobs])
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), quiet) as pool:
        list(track(pool.map(make_control, needed), "controls", len(needed)))
        runs = list(track(pool.map(do, jobs), "networks", len(jobs)))
    for net in trained:
        own = [run for run in runs if run["net"] == net]
        values = {key: [run[key] for run in own] for key in ("ratio", "bytes", "error", "dense_error", "taught_error")}
        keys = ("ratio", "error", "dense_error", "taught_error")
        headline |= {f"{net}_{key}": mean(values[key]) for key in keys}
        headline |= {f"{net}_{key}_sd": _spread(values[key]) for key in keys}
        rows.append(
            {
                **dict.fromkeys(_COLUMNS, "-"),
                "file": f"{net}, ours",
                "mb": mean(values["bytes"]) / 1e6,
                "times smaller": mean(values["ratio"]),
                "error": f"{mean(values['error']):.3f} +- {_spread(values['error']):.3f}",
                "dense error": f"{mean(values['dense_error']):.3f} +- {_spread(values['dense_error']):.3f}",
                "taught dense": f"{mean(values['taught_error']):.3f} +- {_spread(values['taught_error']):.3f}",
            }
        )
    failures = [run for run in runs if run["failure"]]
    return {"headline": headline, "rows": rows, "failures": failures, "runs": runs}
