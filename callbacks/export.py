"""Export the trained model, run every file in its runtime, and compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_compress.checks import check_flag, check_names, check_one_of, check_path, check_text, refusal
from lightning_compress.deploy.files import try_format, words_of_doubt
from lightning_compress.deploy.formats import FORMATS, check_formats, installed_formats, pip_command
from lightning_compress.deploy.interface import taken_by_file
from lightning_compress.deploy.judge import Limits, judge, worst
from lightning_compress.deploy.reasons import reason_of
from lightning_compress.deploy.verify import Artifact, difference
from lightning_compress.metrics import MODES, Mode, more_is_better, pick_metric
from lightning_compress.quantization.convert import check_convertible, float_twin

from .evaluate import copied, evaluate
from .examples import example_inputs, no_inputs
from .judgement import settle_mode
from .live_shape import check_strategy
from .outputs import new_folder, output_folder
from .proof import metadata_of, prove
from .verdict import end_with_verdict

__all__ = ["Export"]

_LIMITS = {"agreement": "Export.min_agreement"} | {
    name: f"Export.max_{name}" for name in ("difference", "metric_drop", "bytes_ratio", "latency_ratio")
}
_NAME = "the name of a file without folder and ending, such as 'model'"


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
        formats: Names of the formats: ``"onnx"``, ``"openvino"``, ``"executorch"``, ``"litert"``, ``"torch"`` and, for
            microcontrollers, ``"tflm"``; without any or with ``"all"``, all whose packages are installed but the last,
            whose interpreter is slow here, and a line says how to install the others.
        dirpath: Folder of the files, tried before training; without one ``deploy`` in the logger's folder of the run,
            or where there is none in the Trainer's default_root_dir. Files of an earlier run stay: the new ones then
            stand in ``version_1`` beside them. A run that is resumed writes where it would have written.
        name: Name of the files, without ending.
        rehearse: Whether formats that are named are tried before training.
        min_agreement: Share of validation samples on which a file must give the model's answer.
        max_difference: Largest difference of a file's outputs from the model's, as a share of their range.
        max_metric_drop: How much worse a file's validation metric may be than the trained model's in PyTorch, in the
            metric's own unit.
        max_bytes_ratio: Bytes of a file after zstd as a share of those of its float twin.
        max_latency_ratio: Milliseconds of a file as a share of those of its float twin, at the batch size where that is
            largest; a quantized file that is slower than its twin is a warning without it.
        monitor: The validation metric that is compared; an accuracy or the like without one, else the validation loss.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is; told by the metric's name without one.
        labels: Names of the classes, which then stand in the file where its format has a place for them.
        strict: Whether a target that is missed is an error when ``fit`` or ``validate`` ends, after all is written;
            else it is a warning.

    The files and each limit that is not None are targets: what misses one is a warning, a row of the report and the
    metric ``compress/targets_missed``.

    Raises:
        TargetMissed: Out of ``Trainer.fit`` and ``validate``, with ``strict=True``.
        ValueError: If a format is unknown or a limit out of its range; before training starts, if a runtime cannot
            take the model or the folder cannot be written to.
        ModuleNotFoundError: If a format's packages are missing, before training starts, with the pip command.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Export(["onnx"])], logger=False, enable_checkpointing=False)
    """

    leaves = ("artifacts", "metrics", "failures", "trained", "_folder")

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
        self,
        formats: Sequence[str] | None = None,
        dirpath: str | Path | None = None,
        name: str = "model",
        rehearse: bool = True,
        min_agreement: float | None = 0.99,
        max_difference: float | None = 0.02,
        max_metric_drop: float | None = None,
        max_bytes_ratio: float | None = None,
        max_latency_ratio: float | None = None,
        monitor: str | None = None,
        mode: Mode | None = None,
        labels: Sequence[str] | None = None,
        strict: bool = False,
    ) -> None:
        named = ["all"] if formats is None else [formats] if isinstance(formats, str) else formats
        check_names("Export.formats", named, f"a list of {', '.join(map(repr, FORMATS))}, or 'all'")
        if not named:
            raise refusal("Export.formats", named, "a list of one format at least", "Name one, or leave Export out.")
        self._all = list(named) == ["all"]
        self.formats = installed_formats() if self._all else list(named)
        self.dirpath = dirpath
        self.name = name
        self.rehearse = rehearse
        self.limits = Limits(min_agreement, max_difference, max_metric_drop, max_bytes_ratio, max_latency_ratio)
        self.monitor = monitor
        self.mode = mode
        self.labels = labels
        self.strict = strict
        self.trained: dict[str, float] = {}
        self.artifacts: list[Artifact] = []
        self.metrics: dict[str, dict[str, float]] = {}
        self.failures: dict[str, str] = {}
        self._folder: Path | None = None
        self._known: str | None = None  # the folder that a resumed run had
        for one in self.formats:
            check_one_of("Export.formats", one, FORMATS, "Without any, all that are installed are written.")
        if dirpath is not None:
            check_path("Export.dirpath", dirpath, "the path of a folder, or None")
        check_text("Export.name", name, _NAME)
        if Path(name).name != name:
            raise refusal("Export.name", name, _NAME, "Give the folder as dirpath.")
        check_flag("Export.rehearse", rehearse)
        self.limits.check(_LIMITS)
        check_flag("Export.strict", strict)
        check_one_of("Export.mode", mode, MODES, "Take 'max' if higher is better.")
        if monitor is not None:
            check_text("Export.monitor", monitor, "a metric's name, or None")
            settle_mode("Export", monitor, mode, decides=max_metric_drop is not None)
        if labels is not None:
            check_names("Export.labels", labels, "a list of the classes' names, in their order")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be written, before training starts."""
        if stage == "fit":
            self.artifacts = []
            self.failures = {}
        if stage == "fit" or self._writes_in(stage):
            check_strategy(trainer, self)
            end_with_verdict(trainer)
            check_formats(self.formats)
            self._known = None
            self._folder = output_folder(trainer, "Export.dirpath", self.dirpath, "deploy")
            others = [name for name, kind in FORMATS.items() if name not in self.formats and not kind.board]
            if self._all and others:
                rank_zero_info(f"Export leaves out {', '.join(others)}. To have them: {pip_command(others)}")

    @property
    def state_key(self) -> str:
        """Tells this callback's state from another's with other files."""
        return self._generate_state_key(
            formats=self.formats, dirpath=None if self.dirpath is None else str(self.dirpath), name=self.name
        )

    def state_dict(self) -> dict[str, str | None]:
        """Where the files will stand."""
        return {"folder": None if self._folder is None else str(self._folder)}

    def load_state_dict(self, state_dict: dict[str, str | None]) -> None:
        """Write there, in a run that is resumed."""
        self._known = state_dict["folder"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the folder."""
        files = [f"{self.name}{FORMATS[name].suffix}" for name in self.formats]
        self._folder = new_folder(self, self.folder(trainer), files, self._known)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what a runtime cannot take, before the first step."""
        if not self.rehearse or trainer.global_step:
            return
        refused = self._rehearse(trainer, pl_module) if trainer.is_global_zero else None
        refused = trainer.strategy.broadcast(refused)
        if refused is not None:
            raise ValueError(refused)

    def _rehearse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
        """Why the model cannot be written; of formats that nobody named only whether there is something to write."""
        formats = [] if self._all else self.formats
        name = self.formats[0] if formats else ""
        with isolate_rng(), TemporaryDirectory() as folder:
            try:
                inputs = example_inputs(trainer, pl_module)
                if inputs is None:
                    return f"Export needs an example of the model's inputs: {no_inputs(pl_module)}"
                plain = float_twin(pl_module)
                check_convertible(plain)
                for name in formats:
                    try_format(FORMATS[name], plain, taken_by_file(plain, inputs).inputs, Path(folder))
            except Exception as error:  # whatever a converter raises
                return self._refusal(name, pl_module, error) if formats else None
        return None

    def _refusal(self, name: str, pl_module: pl.LightningModule, error: Exception) -> str:
        others = ", ".join(map(repr, self.formats[: self.formats.index(name)])) or "none before it"
        return (
            f"Export.formats={name!r} cannot take {type(pl_module).__name__}: {reason_of(error)}. Accepted is a model "
            f"that the format's converter and runtime know ({others} took it). Change that part of the model, leave "
            f"{name!r} out, or train first and see with Export(rehearse=False)."
        )

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where the files are written."""
        return self._folder or output_folder(trainer, "Export.dirpath", self.dirpath, "deploy")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, run and compare; all processes know what became of it."""
        found = self._write(trainer, pl_module) if trainer.is_global_zero else None
        found = trainer.strategy.broadcast(found)
        assert found is not None
        self.artifacts, self.metrics, self.failures, self.trained = found

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Any, ...]:
        self.artifacts = []
        self.metrics = {}
        self.failures = {}
        try:
            self.trained = evaluate(trainer, copied(pl_module))
        except Exception:  # a validation that cannot run alone
            self.trained = {}
        for number, name in enumerate(self.formats, start=1):
            file = f"{self.name}{FORMATS[name].suffix}"
            rank_zero_info(f"Export {number} of {len(self.formats)}: {file} is written, validated and timed")
            try:
                self.artifacts.append(self._export(trainer, pl_module, name))
            except Exception as error:  # whatever a converter raises must not cost the user the trained model
                self.failures[name] = reason = reason_of(error)
                rank_zero_warn(
                    f"Export to {name} failed in {self._folder}: {reason}. The trained model and its checkpoints are "
                    "safe; the cause is in the log above or in Export.failures."
                )
        return self.artifacts, self.metrics, self.failures, self.trained

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write after a ``trainer.validate`` without a ``fit`` before it, too: it may have quantized the model."""
        if self._writes_in(stage):
            self.on_fit_start(trainer, pl_module)
            self.on_fit_end(trainer, pl_module)

    def _writes_in(self, stage: str) -> bool:
        return stage == "validate" and not self.artifacts and not self.failures

    def asked(self) -> dict[str, float | str]:
        """The number of formats, and the limits that are set."""
        return {"files": float(len(self.formats)), **self.limits.asked()}

    def stands(self) -> dict[str, float | str]:
        """How many are written, and the worst of what they reach."""
        found: dict[str, float | str] = {"files": float(len(self.artifacts))}
        for name in self.limits.asked():
            reached = worst(self.artifacts, name)[0] if self.artifacts else None
            found[name] = "unknown" if reached is None else reached
        return found

    @property
    def reached(self) -> bool:
        """Whether all files are written and within their limits."""
        return not self.shortfalls() and len(self.artifacts) == len(self.formats)

    def shortfalls(self) -> dict[str, str]:
        """What files miss, and which is the worst; how many are missing."""
        missed = {}
        if len(self.artifacts) < len(self.formats):
            missed["files"] = "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())
        for name in self.limits.asked():
            if any(artifact.judged[name]["ok"] is False for artifact in self.artifacts):
                missed[name] = worst(self.artifacts, name)[1]
        return missed

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Artifact:
        path = self.folder(trainer) / f"{self.name}{FORMATS[name].suffix}"
        metadata = metadata_of(trainer, pl_module, self.labels)
        artifact, metrics = prove(trainer, pl_module, name, path, metadata)
        self.metrics[name] = metrics
        metric = self.monitor or pick_metric(list(self.trained))
        artifact.metric = metrics.get(metric or "")
        artifact.deployed_minus_trained = difference(artifact.metric, self.trained.get(metric or ""))
        artifact.judged = judge(artifact, self.limits, self._drop(artifact.deployed_minus_trained, metric))
        # what the limits say of it is the verdict's to warn of
        for text in [*words_of_doubt(artifact, 0, math.inf), *artifact.warnings]:
            rank_zero_warn(text)
        artifact.warnings = words_of_doubt(artifact, *self._doubt()) + artifact.warnings
        size = f"{artifact.bytes:,} bytes, {artifact.bytes_zstd:,} as zstd"
        size += "" if artifact.arena_bytes is None else f", {artifact.arena_bytes:,} bytes of arena"
        rank_zero_info(f"Export wrote {path}: {size}; run on {artifact.cpu}")
        return artifact

    def _doubt(self) -> tuple[float, float]:
        limits = self.limits
        return limits.agreement or 0, math.inf if limits.difference is None else limits.difference

    def _drop(self, change: float | None, metric: str | None) -> float | None:
        """How much worse the file's metric is."""
        if change is None or metric is None:
            return None
        mode = self.mode or ("max" if more_is_better(metric) else "min")
        return -change if mode == "max" else change
