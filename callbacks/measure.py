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
from lightning.pytorch.utilities import rank_zero_warn

from lightning_compress.analysis.inspect import count_macs, describe
from lightning_compress.analysis.report import Totals
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.deploy.size import weigh
from lightning_compress.deploy.verify import time_together
from lightning_compress.forward import Inputs, run_model, with_batch
from lightning_compress.quantization.convert import to_float

from .evaluate import copied, evaluate, example_inputs

__all__ = ["measure", "totals"]


def measure(
    trainer: pl.Trainer, pl_module: pl.LightningModule, formats: Sequence[str] = (), timed: bool = False
) -> dict[str, Any]:
    """Metrics and totals of a model as it is now, on copies; what cannot be measured is None, with a warning.

    Args:
        trainer: The Trainer of the run, for its validation data.
        pl_module: The model.
        formats: ``bytes`` are of its float file in the first of these formats; of its state_dict without one.
        timed: Also time the model as it is, fake-quantized or not, in PyTorch on the CPU: ``latency_ms``.
    """
    measured: dict[str, Any] = {"metrics": {}, "macs_by_layer": {}}
    try:
        measured["metrics"] = evaluate(trainer, copied(pl_module))
        inputs = example_inputs(trainer, pl_module)
        plain = to_float(pl_module)
        if inputs is not None:
            measured["macs_by_layer"] = count_macs(plain, inputs)
        measured |= _float_bytes(formats, plain, inputs)
        if timed and inputs is not None:
            measured["latency_ms"] = _latency(copied(pl_module).cpu().eval(), inputs)
    except Exception as error:  # a model that cannot be copied or traced still trains
        rank_zero_warn(f"CompressionReport could not measure the model: {type(error).__name__}: {error}")
    return measured | describe(pl_module, measured["macs_by_layer"])


def _latency(model: pl.LightningModule, inputs: Inputs) -> dict[str, float]:
    """Median milliseconds by batch size, one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = {size: partial(run_model, model, with_batch(inputs, size)) for size in (1, 64)}
        return {str(size): round(time_together([call], seconds=0.05)[0], 4) for size, call in sizes.items()}
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
