"""Runs in many processes: each callback with ddp, FSDP2 and the strategies that launch processes themselves.

All of a run's processes must agree bit for bit, and train as one process does with the same global batch: the same
samples in the same order, plain SGD, no batch norm, and last batches that are smaller. ``many`` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

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
from lightning_compress.callbacks.verdict import targets_of
from lightning_compress.phase import Phase
from lightning_compress.pruning import NofM, Taylor, Wanda
from lightning_compress.pruning.sharding import whole
from lightning_compress.quantization.model import quantization_of
from lightning_compress.structure.record import structure_of

from ..harness import differences
from .forks import fork_group
from .plain import Plain, Sharded

EPOCHS = 6
# Sums over a batch are taken in another order; what is rounded to codes may then fall on the other side.
TOLERANCE = 1e-5


class Watching(pl.Callback):
    """Writes what a run leaves behind, and raises where its processes do not agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
        self.losses.append(float(loss) / trainer.world_size)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        mine = left_behind(trainer, pl_module)
        every: list[Any] = [mine] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(every, mine)
        for rank, theirs in enumerate(every):
            assert not differences(mine, theirs), f"rank {rank} differs: {differences(mine, theirs)[:3]}"
        if trainer.is_global_zero:
            found = {"losses": self.losses, "left": mine, "val_loss": float(trainer.callback_metrics["val_loss"])}
            torch.save(found, self.path)


def left_behind(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Weights, shapes, masks, ranges and decisions."""
    quantization = quantization_of(module)
    callbacks = {c.state_key: c.state_dict() for c in trainer.callbacks if not isinstance(c, CompressionReport)}
    for state in callbacks.values():
        for last in ("num_due", "num_taught"):  # what was counted, not decided
            state.pop(last, None)
    return {
        "weights": {name: whole(value) for name, value in module.state_dict().items()},
        "structure": structure_of(module),
        "quantization": None if quantization is None else quantization.state_dict(),
        "callbacks": {key: state for key, state in callbacks.items() if state},
    }


def _prune(*args: Any, **options: Any) -> GradualPruning:
    return GradualPruning(*(args or (0.7,)), **{"phase": Phase(0.2, 0.6), "every": 2, **options})


def _quantize(scheme: str = "int8") -> QuantizationAwareTraining:
    return QuantizationAwareTraining(scheme, Phase(0.6, 0.7), Phase(0.7, 1.0))


CASES: dict[str, Callable[[Path], list[pl.Callback]]] = {
    "GradualPruning": lambda _: [_prune()],
    "GradualPruning(Taylor)": lambda _: [_prune(0.7, Taylor())],
    "GradualPruning(Wanda)": lambda _: [_prune(0.7, Wanda())],
    "GradualPruning(2:4)": lambda _: [_prune(0.5, pattern=NofM(2, 4), exclude=["net.5"])],
    "RigL": lambda _: [RigL(0.7, every=4)],
    "SET": lambda _: [SET(0.7, every=4)],
    "ChannelPruning(Taylor)": lambda _: [ChannelPruning(0.4, Taylor(), Phase(0.2, 0.6), steps=2)],
    "LayerPruning": lambda _: [LayerPruning(1, max_share=1.0, phase=Phase(0.2, 0.6))],
    "QAT(int8)": lambda _: [_quantize()],
    "QAT(w4a8)": lambda _: [_quantize("w4a8")],
    "PTQ": lambda _: [PostTrainingQuantization("int8", Phase(0.5, 1.0))],
    "Distillation": lambda _: [_prune(), KnowledgeDistillation()],
    "FineTuning": lambda _: [_prune(), FineTuning(Phase(0.6, 0.9), freeze=["net.0"])],
    "Guard(sparsity)": lambda _: [_prune(0.9, phase=Phase(0.2, 1.0)), AccuracyGuard(0.3, "val_loss", margin=0.0)],
    "Guard(bits)": lambda _: [_quantize(), AccuracyGuard(0.2, "val_loss", bits=(4, 2), patience=0, margin=0.0)],
    "Report, Export": lambda path: [
        CompressionReport(path / "report", show=False),
        _prune(),
        Export(["onnx"], path / "deploy"),
    ],
    "Channels, prune, QAT": lambda _: [
        ChannelPruning(0.4, phase=Phase(0.1, 0.2), scope="global"),
        _prune(),
        _quantize(),
    ],
}


def fit(case: str, folder: Path, **options: Any) -> tuple[pl.Trainer, Plain]:
    """Train; what was left behind lies in run.pt then."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        log_every_n_steps=4,
        default_root_dir=folder,
        callbacks=[*CASES[case](folder), Watching(folder / "run.pt")],
        **options,
    )
    module = Sharded() if isinstance(trainer.strategy, ModelParallelStrategy) else Plain()
    trainer.fit(module)
    return trainer, module


def fit_alone(case: str, folder: Path) -> None:
    """The same run in this process alone, even if that is one of several."""
    fit(case, folder, devices=1, strategy=SingleDeviceStrategy("cpu"), plugins=[LightningEnvironment()])


def compare(one: Path, many: Path) -> str:
    """How far the run of many processes is from that of one, in words; raises where it is too far."""
    expected, found = (torch.load(folder / "run.pt", weights_only=False) for folder in (one, many))
    apart = max(abs(x - y) for x, y in zip(expected["losses"], found["losses"], strict=True))
    assert apart <= TOLERANCE, f"the losses are up to {apart:.1e} apart"
    assert _decisions(expected["left"]) == _decisions(found["left"]), "other decisions than one process takes"
    return f"{apart:.0e}"


def _decisions(left: dict[str, Any]) -> dict[str, Any]:
    """What was decided: shapes, what is zero, where activations are quantized, and what a guard said."""
    guard = left["callbacks"].get("AccuracyGuard", {"history": []})
    quantization = left["quantization"] or {}
    return {
        "structure": left["structure"],
        "zeros": {name: (value == 0).tolist() for name, value in left["weights"].items()},
        "placement": quantization.get("placement"),
        "guard": [{key: row[key] for key in row if key != "value"} for row in guard["history"]],
    }


# Strategies with options; those of DDP change when and how gradients are exchanged.
OPTIONS: dict[str, Callable[[int], Strategy]] = {
    "fsdp2": lambda num: ModelParallelStrategy(num, 1),
    "unused": lambda _: DDPStrategy(find_unused_parameters=True),
    "static": lambda _: DDPStrategy(static_graph=True),
    "views": lambda _: DDPStrategy(gradient_as_bucket_view=True),
    "hook": lambda _: DDPStrategy(ddp_comm_hook=allreduce_hook),
}


def in_group(case: str, strategy: str, num: int, folder: Path) -> str:
    """What a case came to in a group of processes: the largest difference of a loss to one process, or "refused"."""
    path = folder / _slug(f"{strategy}_{num} {case}")

    def run(rank: int) -> None:
        fit(case, path, devices=num, strategy=OPTIONS[strategy](num) if strategy in OPTIONS else strategy)

    results = fork_group(num, run, path / "ranks")
    if strategy == "fsdp2" and all("strategy=ModelParallelStrategy" in result for result in results):
        assert not (path / "run.pt").exists()
        return "refused"
    assert set(results) == {"ok"}, "\n".join(results)
    return compare(alone(case, folder), path)


def alone(case: str, folder: Path) -> Path:
    """The folder of the run of a case in one process, which is trained once."""
    path = folder / _slug(f"alone {case}")
    if not (path / "run.pt").exists():
        # In a process of its own, too: one that has trained cannot be forked safely.
        assert fork_group(1, lambda _: fit_alone(case, path), path / "ranks") == ["ok"], (
            path / "ranks/rank0"
        ).read_text()
    return path


def by_launching(case: str, strategy: str, num: int, folder: Path) -> str:
    """The same in processes that the Trainer launches; this one must have all that they have."""
    path = folder / _slug(f"{strategy}_{num} {case}")
    trainer, module = fit(case, path, devices=num, strategy=strategy)
    found = torch.load(path / "run.pt", weights_only=False)
    here = left_behind(trainer, module)
    assert not differences(found["left"], here), differences(found["left"], here)[:3]
    targets = targets_of(trainer)
    assert targets
    assert not any(row["missed"] for row in targets), targets
    for callback in trainer.callbacks:
        assert getattr(callback, "reached", True), type(callback).__name__
        if isinstance(callback, CompressionReport):
            assert callback.report is not None
            assert callback.report["targets"] == targets
            assert Path(callback.report["packed"]["path"]).is_file()  # type: ignore[index]
        if isinstance(callback, Export):
            assert [Path(artifact.path).is_file() for artifact in callback.artifacts] == [True]
    validated = trainer.validate(module, verbose=False)[0]["val_loss"]
    if case != "PTQ":  # which quantizes behind the last validation
        assert abs(validated - found["val_loss"]) <= TOLERANCE, (validated, found["val_loss"])
    trainer.save_checkpoint(path / "end.ckpt")
    saved = torch.load(path / "end.ckpt", weights_only=True)
    assert not differences(saved["state_dict"], here["weights"])
    return compare(alone(case, folder), path)


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)


COLUMNS = {
    "ddp 2": (in_group, "ddp", 2),
    "ddp 4": (in_group, "ddp", 4),
    "fsdp2 2": (in_group, "fsdp2", 2),
    "fsdp2 4": (in_group, "fsdp2", 4),
    "unused 2": (in_group, "unused", 2),
    "static 2": (in_group, "static", 2),
    "views 2": (in_group, "views", 2),
    "hook 2": (in_group, "hook", 2),
    "ddp_fork 2": (by_launching, "ddp_fork", 2),
    "ddp_spawn 2": (by_launching, "ddp_spawn", 2),
}


def outcome(column: str, case: str, folder: Path) -> str:
    """What became of a case, in a word."""
    call, strategy, num = COLUMNS[column]
    return call(case, strategy, num, folder)
