"""Whether memory, step time and checkpoint bytes stay flat over a long run, with each callback and with all together.

A small net trains for 10,000 steps, validated every 20; what a callback does once, such as shrinking the model, it does
in the first 1,500. Each run has a process of its own, and what it has freed goes back before it is weighed. Growth is
from the 2,000th step to the end: of the memory that the process holds, of the median CPU time of a step, validations
left out, and of the bytes of a checkpoint. A step is measured in passes of the plain net, forward and back, which is
timed beside every fifth step: what else the machine does slows both. A checkpoint holds a second state from the first
one on that an AccuracyGuard has found to hold, so the guard beside all the others is given a bound that it can keep
from the start.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.training import quiet
from lightning_compress.callbacks import (
    SET,
    AccuracyGuard,
    ChannelPruning,
    CompressionReport,
    Export,
    FineTuning,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.phase import Phase

STEPS, SETTLED, WINDOWS = 10_000, 0.2, 40
_PLAIN = 5  # steps from one pass of the plain net to the next
BOUNDS = {"memory": 0.02, "step": 0.10, "checkpoint": 0.10}  # growth that is not flat any more

EARLY = Phase(0.05, 0.10)
RECOVER = Phase(0.10, 0.12)
CALIBRATE = Phase(0.12, 0.15)


def quantized() -> list[pl.Callback]:
    """Fake-quantized from the 1,500th step on."""
    return [QuantizationAwareTraining(calibrate=CALIBRATE, phase=Phase(0.15, 1.0))]


CASES: dict[str, Callable[[], list[pl.Callback]]] = {
    "none": list,
    "GradualPruning": lambda: [GradualPruning(0.8, phase=EARLY)],
    "RigL": lambda: [RigL(0.8)],
    "SET": lambda: [SET(0.8)],
    "QuantizationAwareTraining": quantized,
    "PostTrainingQuantization": lambda: [PostTrainingQuantization(calibrate=CALIBRATE)],
    "ChannelPruning": lambda: [ChannelPruning(0.5, phase=EARLY)],
    "LayerPruning": lambda: [LayerPruning(1, max_share=1.0, phase=EARLY)],
    "KnowledgeDistillation": lambda: [KnowledgeDistillation(phase=Phase(0.05, 1.0))],
    "AccuracyGuard": lambda: [AccuracyGuard(0.05, "val_acc"), GradualPruning(0.8, phase=EARLY)],
    "FineTuning": lambda: [GradualPruning(0.8, phase=EARLY), FineTuning(RECOVER, "rewind")],
    "CompressionReport": lambda: [CompressionReport(show=False)],
    "Export": lambda: [Export(["onnx"])],
    "EMA": lambda: [EMAWeightAveraging(), GradualPruning(0.8, phase=EARLY)],
    "all together": lambda: [
        CompressionReport(show=False),
        AccuracyGuard(1.0, "val_acc"),
        GradualPruning(0.8, phase=EARLY),
        FineTuning(RECOVER, "rewind"),
        KnowledgeDistillation(phase=Phase(0.05, 1.0)),
        *quantized(),
        EMAWeightAveraging(),
        Export(["onnx"]),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long, which, and where to draw."""
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", choices=CASES, help="some of the callbacks")
    parser.add_argument("--picture", type=Path, help="also draw the curves to this file (.svg, .png)")


class Net(pl.LightningModule):
    """A multi-layer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(32, 64), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Share of right answers."""
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 1e-3)


class Sample(pl.Callback):
    """Memory, CPU time of a step and bytes of a checkpoint, once a window; the last callback of a run.

    The time is a median of steps over one of passes of the plain net.

    Args:
        every: Steps of a window.
        path: Of the checkpoint.
    """

    def __init__(self, every: int, path: Path) -> None:
        self.every, self.path = every, path
        self.rows: list[list[float]] = []
        self._times: list[float] = []
        self._plain_times: list[float] = []
        self._begin: float | None = None
        self._net = Net()
        self._batch = next(iter(data(16, 16)))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """The time since the last step, unless a validation or a sample lies between."""
        now = time.process_time()
        if self._begin is not None:
            self._times.append(now - self._begin)
        if trainer.global_step % _PLAIN == 0:
            self._plain_times.append(self._time_plain())
        if trainer.global_step % self.every == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            trainer.save_checkpoint(self.path)
            held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            passes = median(self._times) / median(self._plain_times)
            self.rows.append([trainer.global_step, held, passes, self.path.stat().st_size])
            self._times, self._plain_times = [], []
        self._begin = time.process_time() if trainer.global_step % self.every else None

    def on_validation_start(self, *_: Any) -> None:
        """Leave this step out."""
        self._begin = None

    def _time_plain(self) -> float:
        begin = time.process_time()
        self._net.training_step(self._batch, 0).backward()
        self._net.zero_grad()
        return time.process_time() - begin


def data(num: int, batch_size: int) -> DataLoader[Any]:
    """Random inputs, of the class that a fixed random direction gives them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(32, 4, generator=generator)
    x = torch.randn(num, 32, generator=generator)
    return DataLoader(TensorDataset(x, (x @ directions).argmax(1)), batch_size)


def sample(case: str, steps: int) -> list[list[float]]:
    """The samples of a run: step, bytes of memory, milliseconds, bytes of a checkpoint."""
    quiet()
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        sampling = Sample(max(1, steps // WINDOWS), Path(folder) / "sample.ckpt")
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=20,
            check_val_every_n_epoch=None,
            log_every_n_steps=10,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[*CASES[case](), sampling],
        )
        trainer.fit(Net(), data(800, 16), data(64, 64))
    return sampling.rows


def sample_apart(case: str, steps: int) -> list[list[float]]:
    """The same in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        return executor.submit(sample, case, steps).result()


def growth(rows: list[list[float]], column: int) -> float:
    """From the settled run to its end: between medians of five samples each, as a share."""
    settled = [row[column] for row in rows if row[0] > SETTLED * rows[-1][0]]
    return median(settled[-5:]) / median(settled[:5]) - 1


def run(steps: int = STEPS, only: list[str] | None = None, picture: Path | None = None) -> dict[str, Any]:
    """Headline: the largest growth of each; failed where one is beyond its bound."""
    found = {case: sample_apart(case, steps) for case in track(only or list(CASES), transient=True)}
    rows = []
    for case, samples in found.items():
        shares = {name: growth(samples, i) for i, name in enumerate(BOUNDS, start=1)}
        rows.append(
            {
                "callback": case,
                **{f"{name}_growth": f"{share:+.1%}" for name, share in shares.items()},
                "memory_mb": samples[-1][1] / 2**20,
                "step_passes": samples[-1][2],
                "checkpoint_kb": samples[-1][3] / 1e3,
            }
        )
    worst = {name: max(growth(samples, i) for samples in found.values()) for i, name in enumerate(BOUNDS, start=1)}
    if picture is not None:
        draw(found, picture)
    failed = [name for name, bound in BOUNDS.items() if worst[name] > bound]
    return {"headline": worst, "rows": rows, "failed": failed, "samples": found}


def draw(found: dict[str, list[list[float]]], path: Path) -> None:
    """A curve of each callback, in a panel of each of the three."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    scales = [2**20, 1.0, 1e3]
    names = ["memory [MB]", "step [passes of the plain net]", "checkpoint [kB]"]
    for axes, column, scale, name in zip(panels, (1, 2, 3), scales, names, strict=True):
        for i, (case, samples) in enumerate(found.items()):
            style = {"color": "black", "linewidth": 2.0} if case == "all together" else {"color": f"C{i % 10}"}
            dashes = "-" if i < 10 or case == "all together" else "--"
            steps, values = zip(*((row[0], row[column] / scale) for row in samples), strict=True)
            axes.plot(steps, values, linestyle=dashes, label=case, **{"linewidth": 1.2, **style})
        axes.axvline(SETTLED * samples[-1][0], color="#888888", linewidth=0.8, linestyle=":")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.set_ylabel(name)
    panels[-1].set_xlabel("optimizer step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
