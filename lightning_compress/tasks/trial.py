"""One plan, tried: compressed, trained in fake-quantized values, exported, and measured as its file in its runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lightning_compress.tasks.compose import build_all, start

if TYPE_CHECKING:
    from lightning_compress.analysis.allocation import Allocation
    from lightning_compress.quantization import Scheme

__all__ = ["Candidate", "mixed", "trial"]


@dataclass
class Candidate:
    """A compressed model, as its file was measured in its runtime.

    Args:
        plan: What its layers gave up.
        bytes: Of the file on disk.
        bytes_zstd: Of the file compressed by zstd.
        latency_ms: Median milliseconds of one sample, one thread; None where they are not those of the device.
        macs: Multiply-accumulates of one sample.
        num_params: Weights left.
        bits: Mean bits of a weight.
        sparsity: Share of the weights left that is zero.
        metric: Over the validation data, by the file.
        trained: Whether it was trained, or only calibrated to measure its file.
        metric_drop: How much worse than the dense model in float.
        arena_bytes: RAM that TensorFlow Lite Micro takes to run the file; None in other runtimes.
        deployed_minus_trained: The metric of the file less that of the trained model in PyTorch.
    """

    plan: Allocation
    bytes: int
    bytes_zstd: int
    latency_ms: float | None
    macs: int
    num_params: int
    bits: float
    sparsity: float
    metric: float
    trained: bool
    metric_drop: float = 0.0
    arena_bytes: int | None = None
    deployed_minus_trained: float | None = None

    @property
    def flash(self) -> int:
        """Bytes that a microcontroller keeps the file in."""
        return self.bytes

    @property
    def sram(self) -> int | None:
        """Bytes that it computes in."""
        return self.arena_bytes


def mixed(scheme: Scheme, bits: Mapping[str, int]) -> Scheme:
    """A scheme in which some layers' weights have other bits, with learned steps."""
    from lightning_compress.quantization import LearnedStep

    def with_bits(num: int) -> Scheme:
        return replace(scheme, weight=LearnedStep(num, symmetric=True), include=(), exclude=(), overrides={})

    return replace(scheme, overrides={**{name: with_bits(b) for name, b in bits.items()}, **scheme.overrides})


def trial(
    cfg: DictConfig, plan: Allocation, folder: Path, monitor: str, trained: bool = True, **options: object
) -> Candidate:
    """Try a plan on the model of a configuration.

    Args:
        cfg: The composed configuration, whose ``init_from`` is the dense model.
        plan: What the layers give up.
        folder: Of the report and of the file.
        monitor: The validation metric.
        trained: Whether this is a training that counts: with loggers, and a teacher if asked for.
        options: Of the Trainer.

    Raises:
        RuntimeError: If the model cannot be exported.
    """
    from lightning_compress.analysis.inspect import count_macs, mean_bits, sparsity, weight_layers
    from lightning_compress.callbacks import (
        ChannelPruning,
        CompressionReport,
        Export,
        GradualPruning,
        KnowledgeDistillation,
        QuantizationAwareTraining,
    )
    from lightning_compress.callbacks.examples import example_inputs
    from lightning_compress.phase import Phase
    from lightning_compress.quantization import scheme
    from lightning_compress.quantization.convert import to_float

    callbacks: list[Any] = []
    if plan.shares:
        begin = Phase(0.0, 0.0)
        shares = dict(plan.shares)
        callbacks.append(ChannelPruning(0.0, phase=begin, scope="local", floor=0.0, targets=shares))
    if plan.sparsities:
        zeros = dict(plan.sparsities)
        callbacks.append(
            GradualPruning(max(zeros.values()), phase=Phase(0.0, 0.25), include=list(zeros), targets=zeros)
        )
    quantized = mixed(scheme(cfg.search.scheme), plan.bits)
    callbacks.append(QuantizationAwareTraining(quantized, Phase(0.25, 0.4), Phase(0.4, 1.0)))
    if cfg.search.teacher and trained:
        callbacks.append(KnowledgeDistillation())
    if trained:
        callbacks.append(CompressionReport(dirpath=folder, monitor=monitor, show=False, mode=cfg.search.mode))
    export = Export([cfg.search.format], dirpath=folder / "deploy", monitor=monitor, rehearse=False)
    shown = {"enable_checkpointing": False, "enable_model_summary": False}
    options = {"max_epochs": cfg.search.epochs or cfg.trainer.max_epochs, **shown, **options}
    loggers = build_all(cfg.logger) if trained else False
    trainer, model, data = start(cfg, [*callbacks, export], loggers, **options)
    trainer.fit(model, data)
    if export.failures:
        raise RuntimeError(f"search.format={cfg.search.format!r}: {next(iter(export.failures.values()))}")
    (artifact,) = export.artifacts
    inputs = example_inputs(trainer, model)
    assert inputs is not None  # else there were no file
    weights = weight_layers(model)
    return Candidate(
        plan,
        artifact.bytes,
        artifact.bytes_zstd,
        artifact.latency_ms.get("1"),
        count_macs(to_float(model), inputs)[""],
        sum(p.numel() for p in model.parameters()),
        mean_bits(weights),
        sparsity(weights),
        float(export.metrics[artifact.format][monitor]),
        trained,
        arena_bytes=artifact.arena_bytes,
        deployed_minus_trained=artifact.deployed_minus_trained,
    )
