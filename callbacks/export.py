"""Export the trained model, run every file in its runtime, and compare."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_compress.deploy.cpu import cpu_features
from lightning_compress.deploy.files import (
    Pair,
    is_quantized,
    try_format,
    words_of_caution,
    words_of_doubt,
    write_files,
)
from lightning_compress.deploy.formats import FORMATS, check_formats, installed_formats, pip_command
from lightning_compress.deploy.size import weigh
from lightning_compress.deploy.verify import Artifact, Comparison
from lightning_compress.forward import Inputs, replaced_forward
from lightning_compress.quantization.convert import check_convertible, to_float

from .evaluate import copied, evaluate, example_inputs
from .live_shape import check_strategy

__all__ = ["Export"]

_BATCH_SIZES = (1, 64)


class Export(pl.Callback):
    """Writes the trained model as a file for each runtime, with a float twin beside it, and runs both.

    A quantized model is converted to quantize/dequantize operations with its trained ranges, in the integers that the
    runtime's kernels take. A runtime without a dynamic batch gets a file for batch 1 and one for batch 64. Every file
    runs over the validation data inside its runtime, by the user's own validation step, and is compared with the model
    and timed against its float twin. Formats that are named are rehearsed before the first step: the model as it is
    then is written in float and run once, so that what a runtime cannot take is an error before training and not after.
    An export that fails later is a warning with its reason and stands in the report; training and checkpoints are over
    by then and safe.

    Args:
        formats: Names of the formats: ``"onnx"``, ``"openvino"``, ``"executorch"``, ``"litert"``, ``"torch"``; without
            any or with ``"all"``, all whose packages are installed, and a line says how to install the others.
        dirpath: Folder of the files; ``deploy`` below the Trainer's default_root_dir without one.
        name: Name of the files, without ending.
        rehearse: Whether formats that are named are tried before training.
        min_agreement: Share of validation samples on which a file must give the model's answer; below it is a warning.
        max_difference: Largest difference of a file's outputs from the model's, as a share of their range; above it is
            a warning.

    Raises:
        ValueError: If a format is unknown or a threshold lies outside 0..1; before training starts, if a runtime cannot
            take the model.
        ModuleNotFoundError: If a format's packages are missing, before training starts, with the pip command.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Export(["onnx"])], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        formats: Sequence[str] | None = None,
        dirpath: str | Path | None = None,
        name: str = "model",
        rehearse: bool = True,
        min_agreement: float = 0.99,
        max_difference: float = 0.02,
    ) -> None:
        self._all = formats is None or formats == "all" or list(formats) == ["all"]
        named = [] if self._all or formats is None else formats
        self.formats = installed_formats() if self._all else [named] if isinstance(named, str) else list(named)
        self.dirpath = dirpath
        self.name = name
        self.rehearse = rehearse
        self.min_agreement = min_agreement
        self.max_difference = max_difference
        self.artifacts: list[Artifact] = []
        self.metrics: dict[str, dict[str, float]] = {}
        self.failures: dict[str, str] = {}
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            check_formats(unknown)
        for field in ("min_agreement", "max_difference"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"Export.{field}={value!r}: accepted is a number from 0 to 1, for instance 0.99.")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be written, before training starts."""
        if stage == "fit":
            check_strategy(trainer, self)
            check_formats(self.formats)
            others = [name for name in FORMATS if name not in self.formats]
            if self._all and others:
                rank_zero_info(f"Export leaves out {', '.join(others)}. To have them: {pip_command(others)}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what a runtime cannot take, before the first step."""
        if self._all or not self.rehearse or trainer.global_step:
            return
        refused = self._rehearse(trainer, pl_module) if trainer.is_global_zero else None
        refused = trainer.strategy.broadcast(refused)
        if refused is not None:
            name, reason = refused
            others = ", ".join(map(repr, self.formats[: self.formats.index(name)])) or "none before it"
            raise ValueError(
                f"Export.formats={name!r} cannot take {type(pl_module).__name__}: {reason}. Accepted is a model that "
                f"the format's converter and runtime know ({others} took it). Change that part of the model, leave "
                f"{name!r} out, or train first and see with Export(rehearse=False)."
            )

    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[str, str] | None:
        """The first format that fails, and why."""
        name = self.formats[0]
        with isolate_rng(), TemporaryDirectory() as folder:
            try:
                inputs = _inputs(trainer, pl_module)
                plain = to_float(pl_module)
                check_convertible(plain)
                for name in self.formats:
                    try_format(FORMATS[name], plain, inputs, Path(folder))
            except Exception as error:  # whatever a converter raises
                return name, _reason(error)
        return None

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where the files are written."""
        return Path(self.dirpath) if self.dirpath is not None else Path(trainer.default_root_dir) / "deploy"

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, run and compare."""
        if not trainer.is_global_zero:
            return
        self.artifacts = []
        self.metrics = {}
        self.failures = {}
        for name in self.formats:
            try:
                self.artifacts.append(self._export(trainer, pl_module, name))
            except Exception as error:  # whatever a converter raises must not cost the user the trained model
                self.failures[name] = reason = _reason(error)
                rank_zero_warn(
                    f"Export to {name} failed: {reason}. The trained model and its checkpoints are safe; the cause is "
                    "in the log above or in Export.failures."
                )

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Artifact:
        kind = FORMATS[name]
        inputs = _inputs(trainer, pl_module)
        reference = copy.deepcopy(pl_module).cpu().eval()
        quantized = is_quantized(reference)
        path = self.folder(trainer) / f"{self.name}{kind.suffix}"
        files = write_files(kind, reference, inputs, path, _BATCH_SIZES)
        pair = Pair(kind, files, reference, inputs)
        comparison = Comparison(reference, pair.shipped)
        artifact = Artifact(name, pair.shipped.runtime, str(path), *weigh(path))
        measured = copied(pl_module)
        with replaced_forward(measured, comparison):
            metrics = evaluate(trainer, measured)
        if not comparison.num_calls:
            comparison(*inputs.args, **inputs.kwargs)
            metrics = {}
        self.metrics[name] = metrics
        artifact.max_abs_diff = comparison.max_abs_diff
        artifact.agreement = comparison.agreement
        artifact.max_rel_diff = comparison.max_rel_diff
        artifact.overflowing = files.overflowing
        artifact.cpu = cpu_features()
        artifact.latency_ms, artifact.latency_ms_float = pair.latency()
        artifact.bytes_zstd_float = weigh(files.twin[_BATCH_SIZES[0]])[1]
        artifact.integer_kernels, artifact.num_kernels = pair.integer_kernels()
        artifact.batch = "dynamic" if kind.dynamic_batch else str(_BATCH_SIZES[0])
        artifact.integers = kind.activations if quantized else None
        artifact.warnings = words_of_doubt(artifact, self.min_agreement, self.max_difference)
        artifact.warnings += words_of_caution(artifact) if quantized else []
        for text in artifact.warnings:
            rank_zero_warn(text)
        size = f"{artifact.bytes:,} bytes, {artifact.bytes_zstd:,} as zstd"
        rank_zero_info(f"Export wrote {path}: {size}; run on {artifact.cpu}")
        return artifact


def _inputs(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Inputs:
    inputs = example_inputs(trainer, pl_module)
    if inputs is None:
        raise RuntimeError("the validation step never calls the model's forward and there is no example_input_array")
    return inputs


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
