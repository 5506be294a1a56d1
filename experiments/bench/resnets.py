"""Pretrained ResNet-20 and ResNet-56 on CIFAR-10: half the channels, int8, and both.

The images are JPEG and lossy, so the pretrained weights are first adapted to them, for one epoch; that model is kept,
and everything starts from it: the same steps, batches, augmentation and rate for each, the controls among them: the
dense model trained on, and half of the channels chosen at random. Seeds are those of the batches. Accuracy is of all
10,000 test images after the last step, from the .onnx file in onnxruntime; bytes are of that file; milliseconds at
batch 1 on one thread, interleaved with the file of the adapted model.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from experiments.cifar import cifar10, task
from experiments.tasks import Classifier, Data, Task, data_folder
from experiments.training import Budget, accuracy, fit, fitted, kept, num_macs, quiet
from lightning_compress import Phase, int8
from lightning_compress.callbacks import ChannelPruning, KnowledgeDistillation, QuantizationAwareTraining
from lightning_compress.deploy.files import write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.size import weigh
from lightning_compress.deploy.timing import time_together
from lightning_compress.forward import Inputs, run_model
from lightning_compress.pruning import Criterion, Random

_AT_ONCE = Phase(0.0, 0.0)


def teacher() -> KnowledgeDistillation:
    """The adapted model."""
    return KnowledgeDistillation(alpha=0.5, temperature=2.0)


def quantize(start: float) -> QuantizationAwareTraining:
    """Calibrated for a twentieth of the run, and trained in int8 to its end."""
    return QuantizationAwareTraining(int8(), Phase(start, start + 0.05), Phase(start + 0.05, 1.0))


def narrow(round_to: int, criterion: Criterion | None = None) -> ChannelPruning:
    """Half the channels, before the first step."""
    return ChannelPruning(0.5, criterion, phase=_AT_ONCE, round_to=round_to)


# of the multiple of channels that is kept
METHODS: dict[str, Callable[[int], list[pl.Callback]]] = {
    "trained on": lambda _: [],
    "int8": lambda _: [quantize(0.0), teacher()],
    "half the channels": lambda round_to: [narrow(round_to), teacher()],
    "half, at random": lambda round_to: [narrow(round_to, Random()), teacher()],
    "half the channels, int8": lambda round_to: [narrow(round_to), quantize(0.5), teacher()],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --folder, --depth, --method, --seeds, --images, --rate, --round-to, --tune."""
    parser.add_argument("--data", type=Path, help="folder of cifar10_jpeg.npz and resnet*_cifar10.safetensors")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the adapted models")
    parser.add_argument("--depth", type=int, choices=(20, 56), action="append", dest="depths", help="both without it")
    parser.add_argument("--method", choices=list(METHODS), action="append", dest="methods", help="all without it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=25600, help="training images of a run, each seen once")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of every method")
    parser.add_argument("--round-to", type=int, default=8, help="layers keep a multiple of this number of channels")
    parser.add_argument("--tune", action="store_true", help="measure on a sixth of the training part, instead of test")


class OnnxFile:
    """The .onnx file of a model, in onnxruntime.

    Args:
        model: A LightningModule.
        example: Images of a batch.
        folder: Where it is written.
    """

    def __init__(self, model: nn.Module, example: Tensor, folder: Path) -> None:
        kind = FORMATS["onnx"]
        files = write_files(kind, model.eval(), Inputs((example,), {}), folder / "model.onnx", (1,))
        self.runner = kind.runner(files.shipped[1], run_model(model, Inputs((example[:1],), {})))
        self.size = weigh(files.shipped[1])[0]
        self.of_one = self.runner.prepare(Inputs((example[:1],), {}))

    def accuracy(self, data: Data) -> float:
        """Per cent of the test part."""
        parts = zip(data.x_test.split(500), data.y_test.split(500), strict=True)
        right = sum(int((self.runner(Inputs((x.contiguous(),), {})).argmax(-1) == y).sum()) for x, y in parts)
        return 100 * right / len(data.y_test)


def row(depth: int, method: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """The mean of the runs, and the deviation of their accuracies."""
    accuracies = [run["accuracy"] for run in runs]
    deviation = stdev(accuracies) if len(runs) > 1 else float("nan")
    return {"net": f"ResNet-{depth}", "method": method} | {
        "accuracy": mean(accuracies),
        "sd": deviation,
        "deployed minus trained": mean(run["accuracy"] - run["trained"] for run in runs),
        "M MACs": mean(run["macs"] for run in runs) / 1e6,
        **{key: mean(run[key] for run in runs) for key in ("KB", "ms", "times the adapted", "seconds")},
        "each": " ".join(f"{value:.2f}" for value in accuracies),
    }


def measure(model: nn.Module, data: Data, adapted: OnnxFile | None, folder: Path) -> dict[str, float]:
    """What a model is, and what its file does, beside the file of the adapted model."""
    example = data.x_test[:2].contiguous()
    file = OnnxFile(model, example, folder)
    ms, dense = (timed.ms for timed in time_together([file.of_one, (adapted or file).of_one], 1.0))
    found = {"accuracy": file.accuracy(data), "KB": file.size / 1e3, "ms": ms, "times the adapted": dense / ms}
    found |= {"trained": accuracy(model, data), "macs": num_macs(model, data.x_test[:1])}
    print(found, flush=True)
    return found


def runs_of(
    net: Task,
    adapted: nn.Module,
    methods: Mapping[str, Callable[[], list[pl.Callback]]],
    data: Data,
    seeds: int,
    images: int,
) -> dict[str, Any]:
    """What was measured of each method and seed, from one adapted model."""
    with tempfile.TemporaryDirectory() as at, tempfile.TemporaryDirectory() as elsewhere:
        start = Classifier(copy.deepcopy(adapted), 0.0, 0.0)
        beside = OnnxFile(start, data.x_test[:2].contiguous(), Path(elsewhere))
        found: dict[str, list[dict[str, float]]] = {
            "adapted": [measure(start, data, beside, Path(at)) | {"seconds": 0.0}]
        }
        for name, make in methods.items():
            found[name] = []
            for seed in range(seeds):
                begin = time.perf_counter()
                order = torch.randperm(len(data.y_train), generator=torch.Generator().manual_seed(seed))[:images]
                part = replace(data, x_train=data.x_train[order], y_train=data.y_train[order])
                budget = Budget(net, part, 1000 + seed, net.compress_epochs, net.compress_rate)
                model = fitted(copy.deepcopy(adapted), budget, make())
                seconds = {"seconds": time.perf_counter() - begin}
                print(f"{net.name}, {name}, seed {seed}", flush=True)
                found[name].append(measure(model, data, beside, Path(at)) | seconds)
    return found


def run(  # noqa: PLR0913  # the options of the command
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
    depths: list[int] | None = None,
    methods: list[str] | None = None,
    seeds: int = 3,
    images: int = 25600,
    rate: float = 0.02,
    round_to: int = 8,
    tune: bool = False,
) -> dict[str, Any]:
    """Headline: by net, accuracy of the adapted model, and of half the channels in int8."""
    quiet()
    source = data_folder(data)
    folder.mkdir(parents=True, exist_ok=True)
    whole = cifar10(source)
    whole = whole.cut(0) if tune else whole
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for depth in depths or (20, 56):
        net = task(depth, source, rate)
        budget = Budget(net, whole, 0, net.epochs, net.learning_rate)
        adapt = partial(fit, budget=budget, callbacks=[])
        adapted = kept(folder / f"{net.name}{'-cut' if tune else ''}.pt", net.build, adapt)
        chosen = {name: partial(METHODS[name], round_to) for name in methods or METHODS}
        found = runs_of(net, adapted, chosen, whole, seeds, images)
        rows += [row(depth, name, runs) for name, runs in found.items()]
        headline[f"resnet{depth}_adapted"] = rows[-len(found)]["accuracy"]
        headline[f"resnet{depth}_last"] = rows[-1]["accuracy"]
    return {"headline": headline, "rows": rows}
