"""MLPerf Tiny's four nets, trained here in 8 bits, as .tflite files in LiteRT and in TensorFlow Lite Micro.

A row per net: ``accuracy`` of the file in TensorFlow Lite Micro on test examples (of the autoencoder: area under the
ROC curve of the squared error, clips of a speaker who was left out of the training against the others'), bytes of the
file (flash) and of the arena (RAM), and how many of its output codes differ from LiteRT's, in XNNPACK's kernels and in
the reference kernels. ``differs_in`` names the operations whose codes differ from the reference kernels', where both
were given the same codes. ``reference_flash`` and ``reference_arena`` are of MLPerf's own file in the same interpreter.

``--mnist`` trains two nets for digits on all 60,000 images instead, and asks their files for the 10,000 of the test:
a .tflite file of at most 16 kB, and a packed checkpoint of at most 2,579 bytes, whose weights have 4 bits.
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
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from experiments.tasks import Batches, Classifier, Data, data_folder
from experiments.tiny import DIGITS, NETS, Tiny
from lightning_compress.callbacks import Export, QuantizationAwareTraining
from lightning_compress.deploy import litert
from lightning_compress.deploy.formats import check_formats
from lightning_compress.deploy.packed import load_packed, save_packed
from lightning_compress.deploy.tflm import Runner, compare_operations
from lightning_compress.forward import Inputs, run_model
from lightning_compress.phase import Phase
from lightning_compress.quantization import Affine, Scheme, int8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --nets, --examples, --steps, --mnist."""
    parser.add_argument("--data", type=Path, help="folder of fsdd.npz, cifar10_jpeg.npz and mnist70k.npz")
    parser.add_argument("--nets", nargs="*", choices=[*NETS, *DIGITS], help="some of the nets")
    parser.add_argument("--examples", type=int, default=500, help="test images or clips")
    parser.add_argument("--steps", type=int, help="training steps at most, of each net")
    parser.add_argument("--mnist", action="store_true", help="the two nets for digits instead")
    parser.add_argument("--cut", action="store_true", help="with --mnist: a sixth of the training part is the test")


class Net(Classifier):
    """A net, by cross-entropy; one that gives back as many values as it takes, by the squared error."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch of (inputs, classes)."""
        y = self(batch[0])
        return F.mse_loss(y, batch[0]) if y.shape == batch[0].shape else F.cross_entropy(y, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """A few training examples, for callbacks that watch."""
        self(batch[0])


def train(tiny: Tiny, data: Data, scheme: Scheme, folder: Path, steps: int | None = None) -> tuple[Net, Export]:
    """A net after its epochs, quantized in the second half of them, and its file."""
    pl.seed_everything(0, verbose=False)
    model, export = Net(tiny.build(), tiny.learning_rate, tiny.weight_decay), Export(["tflm"], dirpath=folder)
    trainer = pl.Trainer(
        max_epochs=tiny.epochs,
        max_steps=tiny.steps if steps is None else steps,
        accelerator="cpu",
        callbacks=[QuantizationAwareTraining(scheme, Phase(0.5, 0.52), Phase(0.52, 1.0)), export],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    y = data.y_train if len(data.y_train) else torch.zeros(len(data.x_train))
    few = Batches(data.x_train[:64], y[:64], 64, 0, lambda x, generator: tiny.prepare(x))
    trainer.fit(model, Batches(data.x_train, y, tiny.batch_size, 0, tiny.prepare), few)
    if export.failures:
        raise RuntimeError(f"{export.failures}")
    return model.eval(), export


def score(x: Tensor, outputs: Tensor, y: Tensor) -> float:
    """Share of right answers; of an autoencoder, the area under the curve of the squared error of each clip."""
    if outputs.shape == x.shape:
        return float(binary_auroc((x - outputs).square().mean(1).view(len(y), -1).mean(1), y))
    return float((outputs.argmax(1) == y).float().mean())


def measure(name: str, tiny: Tiny, data: Data, folder: Path, num: int, steps: int | None) -> dict[str, Any]:
    """Train a net, and a row of its file; of digits all 10,000 are asked of it."""
    model, export = train(tiny, data, int8(exact_kernels=True), folder, steps)
    order = torch.randperm(len(data.y_test), generator=torch.Generator().manual_seed(0))
    order = order if name in DIGITS else order[:num]
    each = len(data.x_test) // len(data.y_test)
    x = data.x_test.unflatten(0, (len(data.y_test), each))[order].flatten(0, 1)
    x, y = tiny.prepare(x), data.y_test[order]
    inputs = Inputs((x,), {})
    expected = run_model(model, inputs)
    (file,) = export.artifacts
    runner = Runner(Path(file.path), expected)
    few = Inputs((x[:num],), {})
    near, same = (runner.compare(few, reference) for reference in (False, True))
    row = {
        "net": name,
        "accuracy": score(x, runner(inputs), y),
        "flash_bytes": file.bytes,
        "arena_bytes": file.arena_bytes,
        "max_code_diff": near.largest,
        "differing_codes": near.differing,
        "max_code_diff_reference": same.largest,
        "differing_codes_reference": same.differing,
        "num_codes": near.num,
        "accuracy_litert": score(x, litert.Runner(runner.path, expected)(inputs), y),
        "accuracy_trained": score(x, expected, y),
        "reference_flash": tiny.reference[0],
        "reference_arena": tiny.reference[1],
        "integer_kernels": f"{file.integer_kernels} of {file.num_kernels}",
        "bytes_zstd": file.bytes_zstd,
    }
    found = compare_operations(runner.path, Inputs((x[:20],), {}))
    row["differs_in"] = ", ".join(f"{key} {n.differing}/{n.num}" for key, n in found.items() if n.differing) or "none"
    print({key: value for key, value in row.items() if value is not None}, flush=True)
    return row


def pack(name: str, tiny: Tiny, data: Data, folder: Path, steps: int | None) -> dict[str, Any]:
    """Train a net with weights of 4 bits, and a row of its packed checkpoint, read again."""
    model, export = train(tiny, data, Scheme(Affine(4, symmetric=True), Affine(8)), folder, steps)
    path = folder / "packed.safetensors"
    save_packed(model, path)
    again = Net(tiny.build(), 0.1, 0.0).eval()
    load_packed(path, again)
    inputs = Inputs((data.x_test,), {})
    accuracy, trained = (score(data.x_test, run_model(net, inputs), data.y_test) for net in (again, model))
    row = dict.fromkeys(["net", "accuracy", "flash_bytes", "arena_bytes", "max_code_diff", "differing_codes"])
    row |= {"net": name, "accuracy": accuracy, "flash_bytes": path.stat().st_size, "accuracy_trained": trained}
    print(row | {"tflite_zstd": export.artifacts[0].bytes_zstd}, flush=True)
    return row


def run(
    data: Path | None = None,
    nets: Sequence[str] | None = None,
    examples: int = 500,
    steps: int | None = None,
    mnist: bool = False,
    cut: bool = False,
) -> dict[str, Any]:
    """Headline: the largest difference from XNNPACK's codes, and the least accuracy."""
    check_formats(["tflm"])
    torch.set_num_threads(1)
    folder = data_folder(data)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, name in enumerate(nets or (DIGITS if mnist else NETS)):
            tiny = (NETS | DIGITS)[name]
            images = tiny.load(folder)
            images = images.cut(0) if cut else images
            where = Path(out, str(i))
            rows.append(
                pack(name, tiny, images, where, steps)
                if tiny.packed
                else measure(name, tiny, images, where, examples, steps)
            )
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [dict.fromkeys(columns) | row for row in rows]
    differences = [row["max_code_diff"] for row in rows if row["max_code_diff"] is not None]
    accuracies = [row["accuracy"] for row in rows]
    return {"headline": {"max_code_diff": max(differences, default=0), "min_accuracy": min(accuracies)}, "rows": rows}
