"""What a model is worth and what it weighs, measured on copies while the Trainer is busy."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import zstandard

from lightning_compress.analysis.inspect import count_macs, describe
from lightning_compress.analysis.report import Totals
from lightning_compress.checks import first_line
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.size import weigh
from lightning_compress.deploy.timing import Timed, time_together
from lightning_compress.forward import Inputs, fitting_batch, run_model
from lightning_compress.quantization.convert import to_float

from .evaluate import copied, evaluate, why_not_validated
from .examples import example_inputs, no_inputs
from .standing_in import attached

__all__ = ["measure", "totals"]


def measure(
    trainer: pl.Trainer, pl_module: pl.LightningModule, formats: Sequence[str] = (), timed: bool = False
) -> dict[str, Any]:
    """Metrics and totals of a model as it is now, on copies; ``unmeasured`` says what is None, and why.

    Args:
        trainer: The Trainer of the run, for its validation data.
        pl_module: The model.
        formats: ``bytes`` are of its float file in the first of these formats; of its state_dict without one.
        timed: Also time the model as it is, fake-quantized or not, in PyTorch on the CPU: ``latency``.
    """
    metrics, why = _metrics(trainer, pl_module)
    measured: dict[str, Any] = {"metrics": metrics, "macs_by_layer": {}, "unmeasured": []}
    measured["step"] = trainer.global_step
    if why is not None:
        measured["unmeasured"].append(f"The metric is not measured: {why}")
    try:
        inputs = example_inputs(trainer, pl_module)
        plain = to_float(pl_module)
        measured |= _float_bytes(formats, plain, inputs)
        if inputs is None:
            measured["unmeasured"].append(f"MACs and latency are not measured: {no_inputs(pl_module)}")
        else:
            with attached(trainer, plain):
                measured["macs_by_layer"] = count_macs(plain, inputs)
            if timed:
                timed_model = copied(pl_module).cpu().eval()
                with attached(trainer, timed_model):
                    measured["latency"] = _latency(timed_model, inputs)
    except Exception as error:  # a model that cannot be copied or traced still trains
        measured["unmeasured"].append(f"MACs, latency or bytes could not be measured: {first_line(error)}")
    return measured | describe(pl_module, measured["macs_by_layer"])


def _metrics(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[dict[str, float], str | None]:
    """What validation logs, and why that is nothing."""
    why = why_not_validated(trainer, pl_module)
    if why is not None:
        return {}, why
    try:
        metrics = evaluate(trainer, copied(pl_module))
    except Exception as error:  # a validation that cannot run alone
        return {}, f"validation fails on a copy of the model ({first_line(error)})."
    return (
        metrics,
        None if metrics else "validation logs nothing. Log it in validation_step: self.log('val_loss', loss).",
    )


def _latency(model: pl.LightningModule, inputs: Inputs) -> dict[str, Timed]:
    """Milliseconds by batch size, one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = {size: partial(run_model, model, fitting_batch(model, inputs, size)) for size in (1, 64)}
        return {str(size): time_together([call], seconds=0.05)[0] for size, call in sizes.items()}
    finally:
        torch.set_num_threads(num_threads)


def _float_bytes(formats: Sequence[str], plain: pl.LightningModule, inputs: object) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = Path(folder) / f"float{FORMATS[formats[0]].suffix}"
            FORMATS[formats[0]].export(plain, inputs, path)
            size, packed = weigh(path)
        except Exception:  # no format, or a model that it does not take: Export says so itself at the end
            buffer = io.BytesIO()
            torch.save(plain.state_dict(), buffer)
            data = buffer.getvalue()
            size = len(data)
            packed = len(zstandard.ZstdCompressor(level=10).compress(data))
    return {"bytes": size, "bytes_zstd": packed}


def totals(measured: dict[str, Any], metric: str | None) -> Totals:
    """What of a measurement stands in report.json."""
    return {
        "metric": measured["metrics"].get(metric),
        "num_params": measured.get("num_params"),
        "num_nonzero": measured.get("num_nonzero"),
        "sparsity": measured.get("sparsity"),
        "macs": measured.get("macs"),
        "bytes": measured.get("bytes"),
        "bytes_zstd": measured.get("bytes_zstd"),
    }
