"""Export the trained model, run every file in its runtime, and compare."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compress.deploy.formats import FORMATS, Format, check_formats
from lightning_compress.deploy.forward import Inputs, replaced_forward, run_model, with_batch
from lightning_compress.deploy.size import weigh
from lightning_compress.deploy.verify import Artifact, Comparison, time_together
from lightning_compress.quantization.convert import convert, to_float
from lightning_compress.quantization.prepare import prepared

from .evaluate import copied, evaluate, example_inputs
from .structure import check_strategy

__all__ = ["Export"]

_BATCH_SIZES = (1, 64)


class Export(pl.Callback):
    """Writes the trained model as a file for each runtime, with a float twin beside it, and runs both.

    A quantized model is converted to quantize/dequantize operations with its trained ranges. Every file runs over the
    validation data inside its runtime, by the user's own validation step, and is compared with the model and timed
    against its float twin. An export that fails is a warning with its reason and stands in the report; training and
    checkpoints are over by then and safe.

    Args:
        formats: Names of the formats; ``"onnx"``.
        dirpath: Folder of the files; ``deploy`` below the Trainer's default_root_dir without one.
        name: Name of the files, without ending.

    Raises:
        ValueError: If a format is unknown.
        ModuleNotFoundError: If a format's packages are missing, before training starts, with the pip command.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Export(["onnx"])], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, formats: Sequence[str] = ("onnx",), dirpath: str | Path | None = None, name: str = "model"
    ) -> None:
        self.formats = [formats] if isinstance(formats, str) else list(formats)
        self.dirpath = dirpath
        self.name = name
        self.artifacts: list[Artifact] = []
        self.metrics: dict[str, dict[str, float]] = {}
        self.failures: dict[str, str] = {}
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            check_formats(unknown)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be written, before training starts."""
        if stage == "fit":
            check_strategy(trainer, self)
            check_formats(self.formats)

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where the files are written."""
        return Path(self.dirpath) if self.dirpath is not None else Path(trainer.default_root_dir) / "deploy"

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, run and compare."""
        if not trainer.is_global_zero:
            return
        self.artifacts, self.metrics, self.failures = [], {}, {}
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
        inputs = example_inputs(trainer, pl_module)
        if inputs is None:
            raise RuntimeError(
                "the validation step never calls the model's forward and there is no example_input_array"
            )
        reference = copy.deepcopy(pl_module).cpu().eval()
        path = self.folder(trainer) / f"{self.name}{kind.suffix}"
        quantized = prepared(reference) is not None and prepared(reference).enabled  # type: ignore[union-attr]
        twin = path.with_name(f"{self.name}_float{kind.suffix}")
        kind.export(to_float(reference), inputs, twin)
        kind.export(convert(reference) if quantized else to_float(reference), inputs, path)
        runner = kind.runner(path, run_model(reference, inputs))
        comparison = Comparison(reference, runner)
        artifact = Artifact(name, runner.runtime, str(path), *weigh(path))
        measured = copied(pl_module)
        with replaced_forward(measured, comparison):
            metrics = evaluate(trainer, measured)
        if not comparison.num_calls:
            comparison(*inputs.args, **inputs.kwargs)
            metrics = {}
        self.metrics[name] = metrics
        artifact.max_abs_diff, artifact.agreement = comparison.max_abs_diff, comparison.agreement
        artifact.latency_ms, artifact.latency_ms_float = self._latency(kind, [path, twin], reference, inputs)
        rank_zero_info(f"Export wrote {path}: {artifact.bytes:,} bytes, {artifact.bytes_zstd:,} as zstd")
        return artifact

    def _latency(self, kind: Format, paths: list[Path], reference: Any, inputs: Inputs) -> list[dict[str, float]]:
        latency: list[dict[str, float]] = [{} for _ in paths]
        runners = [kind.runner(path, run_model(reference, inputs)) for path in paths]
        for size in _BATCH_SIZES:
            calls = [runner.prepare(with_batch(inputs, size)) for runner in runners]
            for taken, ms in zip(latency, time_together(calls), strict=True):
                taken[str(size)] = round(ms, 4)
        return latency


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
