"""Runs of which one process dies: the others must end too, and soon, where nobody ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_compress.callbacks import (
    AccuracyGuard,
    ChannelPruning,
    CompressionReport,
    GradualPruning,
    KnowledgeDistillation,
    QuantizationAwareTraining,
)
from lightning_compress.layers import Layer
from lightning_compress.phase import Phase
from lightning_compress.pruning import Criterion

from .forks import fork_group
from .plain import Plain, Sharded

STEP = 20  # batches, of 36
LONGEST = 60  # seconds that the others go on for; it is one or two, on a machine that is not busy


@dataclass(frozen=True)
class Failing(Criterion):
    """Scores that one process cannot give."""

    rank: int = 0

    def score(self, layer: Layer) -> Tensor:
        if int(os.environ["RANK"]) == self.rank:
            raise _UnsendableError(lambda: None)
        return layer.weight.detach().abs()


class _UnsendableError(Exception):
    """An error that no other process can be sent."""

    def __str__(self) -> str:
        return "no score"


class Dying(pl.Callback):
    """Ends one process after some batches, or when training or the fit ends."""

    def __init__(self, rank: int, die: Callable[[], None], hook: str = "on_train_batch_end") -> None:
        self.rank, self.die, self.num = rank, die, 0
        setattr(self, hook, self._count)
        self._at = STEP if hook == "on_train_batch_end" else 1

    def _count(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.num += 1
        if trainer.global_rank == self.rank and self.num == self._at:
            (Path(trainer.default_root_dir) / "died").write_text(str(time.time()))
            self.die()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def fail() -> None:
    raise RuntimeError("this process fails")


def everything(folder: Path) -> list[pl.Callback]:
    return [
        CompressionReport(folder / "report", show=False),
        ChannelPruning(0.4, phase=Phase(0.1, 0.2)),
        GradualPruning(0.5, phase=Phase(0.2, 0.4), every=2),
        QuantizationAwareTraining("int8", Phase(0.4, 0.5), Phase(0.5, 1.0)),
        KnowledgeDistillation(),
    ]


def sparse(criterion: Criterion | None = None) -> GradualPruning:
    return GradualPruning(0.5, criterion, phase=Phase(0.2, 0.6))


def guarded(folder: Path) -> list[pl.Callback]:
    return [GradualPruning(0.9, phase=Phase(0.2, 1.0)), AccuracyGuard(0.3, "val_loss", margin=0.0)]


@dataclass(frozen=True)
class Death:
    """What runs, which process of it dies first, and the end of what that says."""

    callbacks: Callable[[Path], list[pl.Callback]]
    rank: int
    last: str


def _dies(rank: int, die: Callable[[], None], last: str, hook: str = "on_train_batch_end") -> Death:
    return Death(lambda path: [*everything(path), Dying(rank, die, hook)], rank, last)


FAILS = "RuntimeError: this process fails"
DEATHS: dict[str, Death] = {
    "rank 1 is killed": _dies(1, kill, "killed"),
    "rank 0 is killed": _dies(0, kill, "killed"),
    "rank 0 is killed where fit ends": _dies(0, kill, "killed", "on_fit_end"),
    "rank 1 fails": _dies(1, fail, FAILS),
    "rank 0 fails": _dies(0, fail, FAILS),
    "rank 1 fails where training ends": _dies(1, fail, FAILS, "on_train_end"),
    "rank 0 fails where the run ends": _dies(0, fail, FAILS, "teardown"),
    "rank 1 is interrupted": _dies(1, interrupt, "SystemExit: 1"),
    "rank 1 fails, guarded": Death(lambda path: [*guarded(path), Dying(1, fail)], 1, FAILS),
    "rank 1 fails, sharded": Death(lambda _: [sparse(), Dying(1, fail)], 1, FAILS),
    "rank 0 is interrupted, sharded": Death(lambda _: [sparse(), Dying(0, interrupt)], 0, "SystemExit: 1"),
    "a criterion fails on rank 1": Death(lambda _: [sparse(Failing(1))], 1, "no score"),
    "a criterion fails on rank 0, for both": Death(lambda _: [ChannelPruning(0.4, Failing(0))], 1, "no score"),
}


def run(name: str, folder: Path, rank: int = 0) -> None:
    """What each of two processes does."""
    pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1) if name.endswith("sharded") else "ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=DEATHS[name].callbacks(folder),
    ).fit(Sharded() if name.endswith("sharded") else Plain())


def died(name: str, folder: Path) -> str:
    """How the two processes ended, in words; raises where one hangs, or both take the run for one that succeeded."""
    own = folder / f"death{list(DEATHS).index(name)}"
    results = fork_group(2, partial(run, name, own), own / "ranks")
    seconds = time.time() - float((own / "died").read_text()) if (own / "died").exists() else 0.0
    death = DEATHS[name]
    assert "hangs" not in results, results
    assert seconds < LONGEST, seconds
    assert results[death.rank].strip().endswith(death.last), results[death.rank]
    last = [result.strip().splitlines()[-1] for result in results]
    return f"{seconds:.0f} s; " + "; ".join(f"rank {rank}: {words[:40]}" for rank, words in enumerate(last))


# How two processes are started, by those who also watch over them.
LAUNCHERS: dict[str, list[str]] = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"],
    "Lightning": [],
}


def ended(launcher: str, folder: Path) -> str:
    """How long a command goes on when one of its processes is killed, and with which status it ends."""
    own = folder / launcher
    own.mkdir()
    command = [sys.executable, *LAUNCHERS[launcher], "-m", "tests.behaviour.dying", "rank 1 is killed", str(own)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0, done.stderr[-2000:]
    seconds = time.time() - float((own / "died").read_text())
    assert seconds < LONGEST, seconds
    return f"{seconds:.0f} s, status {done.returncode}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]))
