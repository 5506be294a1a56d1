"""Weights of 4 bits in groups: a transformer of two blocks that reads the rows of MNIST images as 28 tokens.

Trained in float, with int8, with weights of 4 bits in groups of 32 inputs (activations in float), and the same with
activations of 8 bits by token; each from the same seed, quantized in the last quarter, and exported. For each scheme
and runtime: accuracy on the test images from the file, against PyTorch's and against the float model's; bytes of the
file against the int8 and the float file; bits per weight, all of the file counted; milliseconds at batch 1 against its
float twin, interleaved, one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.bench.deploy import Net, share
from experiments.nets import Block
from experiments.tasks import data_folder, mnist
from lightning_compress import Scheme, int8, w4_groups, w4a8_groups
from lightning_compress.callbacks import QuantizationAwareTraining
from lightning_compress.deploy.files import Pair, write_files
from lightning_compress.deploy.formats import FORMATS, check_formats
from lightning_compress.deploy.size import weigh
from lightning_compress.forward import Inputs, run_model

_FORMATS = ("onnx", "openvino", "executorch")
# its 28 inputs are no groups of 32
_FIRST = ["net.embed"]
_SCHEMES = {
    "int8": int8(),
    "w4_groups(32)": w4_groups(32, exclude=_FIRST),
    "w4_groups(128)": w4_groups(128, exclude=_FIRST),
    "w4a8_groups(32)": w4a8_groups(32, exclude=_FIRST),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --steps, --images, --formats."""
    parser.add_argument("--data", type=Path, help="folder of mnist70k.npz")
    parser.add_argument("--steps", type=int, default=900, help="training steps of 64 images")
    parser.add_argument("--images", type=int, default=10000, help="test images that each file is asked")
    parser.add_argument("--formats", nargs="*", default=list(_FORMATS), help="formats, those with groups by default")


class Rows(nn.Module):
    """A transformer over the rows of an image.

    Shapes: images of (batch, 28, 28), logits of (batch, 10).
    """

    def __init__(self, dim: int = 128, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(28, dim)
        self.place = nn.Parameter(torch.randn(1, 28, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, 4) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.norm(self.blocks(self.embed(x) + self.place)).mean(1))


def train(x: Tensor, y: Tensor, steps: int, scheme: Scheme | None) -> Net:
    """A model after so many steps of 64 images, quantized in the last quarter if there is a scheme."""
    pl.seed_everything(0)
    model = Net(Rows())
    num = 64 * steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[] if scheme is None else [QuantizationAwareTraining(scheme)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
        )
        trainer.fit(model, DataLoader(TensorDataset(x[:num], y[:num]), 64, shuffle=True, drop_last=True))
    return model.eval()


def measure(name: str, model: Net, x: Tensor, y: Tensor, key: str, folder: Path) -> dict[str, Any]:
    """A row of one scheme in one runtime; the bytes of its float twin stand in it, too."""
    kind = FORMATS[key]
    inputs = Inputs((x,), {})
    answers = run_model(model, inputs).argmax(-1)
    examples = Inputs((x[:64],), {})
    files = write_files(kind, model, examples, folder / f"{name}{kind.suffix}", (1,))
    pair = Pair(kind, files, model, examples)
    found = pair.shipped(inputs).argmax(-1)
    shipped, twin = pair.latency(2.0)
    size, size_float = (weigh(paths[1])[0] for paths in (files.shipped, files.twin))
    kernels = pair.integer_kernels()
    return {
        "scheme": name,
        "runtime": pair.shipped.runtime,
        "accuracy": share(found, y),
        "trained": share(answers, y),
        "deployed minus trained": share(found, y) - share(answers, y),
        "agreement": share(found, answers),
        "KB": size / 1e3,
        "of int8": 0.0,
        "of float": size / size_float,
        "bits per weight": 8 * size / sum(p.numel() for p in model.parameters()),
        "integer kernels": f"{kernels.integer} of {kernels.total}",
        "float ms": twin["1"].ms,
        "ms": shipped["1"].ms,
    }


def run(
    data: Path | None = None, steps: int = 900, images: int = 10000, formats: Sequence[str] = _FORMATS
) -> dict[str, Any]:
    """Headline: float, accuracy of the float model; min_agreement; max_loss, of a file against the float model."""
    check_formats(formats)
    torch.set_num_threads(1)
    read = mnist(data_folder(data))
    x_test, y_test = read.x_test[:images], read.y_test[:images]
    dense = train(read.x_train, read.y_train, steps, None)
    accuracy = share(run_model(dense, Inputs((x_test,), {})).argmax(-1), y_test)
    print(f"float: {accuracy:.4f}", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, scheme in _SCHEMES.items():
            model = train(read.x_train, read.y_train, steps, scheme)
            for key in formats:
                row = measure(name, model, x_test, y_test, key, Path(folder))
                whole = next((x for x in rows if x["runtime"] == row["runtime"]), row)
                row["of int8"] = row["KB"] / whole["KB"]
                rows.append(row)
                print(row, flush=True)
    headline = {
        "float": accuracy,
        "min_agreement": min(row["agreement"] for row in rows),
        "max_loss": max(accuracy - row["accuracy"] for row in rows),
    }
    return {"headline": headline, "rows": rows}
