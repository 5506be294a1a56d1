"""Int8 files of a ResNet-20 (272k) and a ViT (1.8M) in five runtimes, against the float file in the same runtime.

Both are trained briefly on MNIST with quantization-aware training, and exported. For each runtime: milliseconds at
batch 1 and 64, interleaved with the float file, one thread; how many operations with stored weights run in integer
kernels; the share of 1,000 test images with the same answer as the fake-quantized model; bytes after zstd against the
float file; CPU seconds of the conversion, of both files and all batch sizes.
Then a ResNet-20 that was pruned to 80 % and quantized in one fit runs as .tflite and .pte over the same images, and
LSTM and GRU that read an image row by row run in onnxruntime.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.nets import ResNet20, vit
from experiments.tasks import data_folder, mnist
from lightning_compress.callbacks import GradualPruning, QuantizationAwareTraining
from lightning_compress.demo.models import Classifier
from lightning_compress.deploy.cpu import cpu_features
from lightning_compress.deploy.files import Pair, write_files
from lightning_compress.deploy.formats import FORMATS, check_formats
from lightning_compress.deploy.size import weigh
from lightning_compress.forward import Inputs, run_model
from lightning_compress.quantization import Scheme

NUM_IMAGES = 1000
PHONES_AND_SERVERS = [name for name, kind in FORMATS.items() if not kind.board]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --steps, --formats."""
    parser.add_argument("--data", type=Path, help="folder of mnist70k.npz")
    parser.add_argument(
        "--steps", type=int, default=300, help="training steps of 64 images, four times as many for the ViT"
    )
    parser.add_argument(
        "--net", action="append", dest="nets", help="ResNet-20, ViT, pruned, LSTM or GRU; all without it"
    )
    parser.add_argument("--formats", nargs="*", default=PHONES_AND_SERVERS, help="formats, all but tflm by default")


class Rows(nn.Module):
    """A recurrent layer over the rows of an image, and a linear layer on its last output."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], hidden: int) -> None:
        super().__init__()
        self.recurrent = kind(28, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, batch by classes."""
        return self.head(self.recurrent(x.squeeze(1))[0][:, -1])


class Net(Classifier):
    """A plain network to classify with; a transformer is trained by AdamW."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(0.05)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits, batch by classes."""
        return self.net(x)

    def configure_optimizers(self) -> Any:
        """A cosine a step."""
        found = super().configure_optimizers()
        if isinstance(self.net, ResNet20):
            return found
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(
    net: nn.Module, x: Tensor, y: Tensor, steps: int, callbacks: Sequence[Any], scheme: Scheme | None = None
) -> Net:
    """A model after so many steps of 64 examples, quantized in the last quarter."""
    pl.seed_everything(0)
    model, num = Net(net), 64 * steps
    loader = DataLoader(TensorDataset(x[:num], y[:num]), 64, shuffle=True, drop_last=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[*callbacks, QuantizationAwareTraining(scheme)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
        )
        trainer.fit(model, loader)
    return model.eval()


def share(a: Tensor, b: Tensor) -> float:
    """Share that is equal."""
    return float((a == b).float().mean())


def measure(name: str, model: Net, x: Tensor, y: Tensor, formats: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """A row for each format and batch size."""
    inputs, rows = Inputs((x,), {}), []
    expected = run_model(model, inputs)
    answers = expected.argmax(-1)
    examples = Inputs((x[:64],), {})
    for key in formats:
        kind = FORMATS[key]
        begin = time.process_time()
        files = write_files(kind, model, examples, folder / f"{name}{kind.suffix}")
        seconds = time.process_time() - begin
        pair = Pair(kind, files, model, examples)
        outputs = pair.shipped(inputs)
        found = outputs.argmax(-1)
        shipped, twin = pair.latency(3.0)
        kernels = pair.integer_kernels()
        sizes = [weigh(paths[1]) for paths in (files.shipped, files.twin)]
        for batch in shipped:
            rows.append(
                {
                    "net": name,
                    "runtime": pair.shipped.runtime,
                    "batch": int(batch),
                    "float ms": twin[batch].ms,
                    "int8 ms": shipped[batch].ms,
                    "speed-up": twin[batch].ms / shipped[batch].ms,
                    "integer kernels": f"{kernels.integer} of {kernels.total}",
                    "agreement": share(found, answers),
                    "difference, of range": float((outputs - expected).abs().max() / (expected.max() - expected.min())),
                    "accuracy": share(found, y),
                    "PyTorch": share(answers, y),
                    "deployed minus trained": share(found, y) - share(answers, y),
                    "cpu": cpu_features(),
                    "conversion s": seconds,
                    "KB": sizes[0][0] / 1e3,
                    "KB zstd": sizes[0][1] / 1e3,
                    "of float zstd": sizes[0][1] / sizes[1][1],
                }
            )
            print(rows[-1], flush=True)
    return rows


def run(
    data: Path | None = None,
    steps: int = 300,
    formats: Sequence[str] = tuple(PHONES_AND_SERVERS),
    nets: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Headline: cells, min_speedup, min_agreement, max_bytes_ratio."""
    check_formats(formats)
    torch.set_num_threads(1)
    images = mnist(data_folder(data))
    x, x_test = images.x_train.unsqueeze(1), images.x_test.unsqueeze(1)[:NUM_IMAGES]
    y, y_test = images.y_train, images.y_test[:NUM_IMAGES]
    phone = [key for key in formats if key in ("executorch", "litert")]
    onnx = [key for key in formats if key == "onnx"]
    plans: list[tuple[str, str, Any, int, list[Any], list[str]]] = [
        ("ResNet-20", "ResNet-20", ResNet20, steps, [], list(formats)),
        ("ViT", "ViT", vit, 4 * steps, [], list(formats)),
        ("pruned", "ResNet-20, .8 pruned", ResNet20, steps, [GradualPruning(0.8)], phone),
    ]
    for hidden in (128, 512):
        for kind in (nn.LSTM, nn.GRU):
            name = kind.__name__
            plans.append((name, f"{name}, {hidden}", partial(Rows, kind, hidden), steps, [], onnx))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for key, name, build, num, callbacks, kinds in plans:
            if kinds and (not nets or key in nets):
                rows += measure(name, train(build(), x, y, num, callbacks), x_test, y_test, kinds, Path(folder))
    whole = [row for row in rows if row["net"] in ("ResNet-20", "ViT")] or rows
    return {
        "headline": {
            "cells": len(whole),
            "min_speedup": min(row["speed-up"] for row in whole),
            "min_agreement": min(row["agreement"] for row in whole),
            "max_bytes_ratio": max(row["of float zstd"] for row in whole),
        },
        "rows": rows,
    }
