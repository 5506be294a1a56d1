"""Float files of narrowed networks in each runtime, by the number of channels that is left of 64.

A network of depthwise convolutions (DS-CNN of fsdd) and one of ordinary ones (that of emoji), new weights, batch 1, one
thread, all widths of a runtime interleaved. Times faster than with 64 channels: below 1, fewer channels are slower.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from experiments.arena import TASKS
from lightning_compress.deploy.formats import FORMATS, check_formats
from lightning_compress.deploy.timing import time_together
from lightning_compress.forward import Inputs, run_model, with_batch

NETS = {"depthwise": ("fsdd", (1, 49, 10)), "ordinary": ("emoji", (3, 32, 32))}
DENSE = 64
CHANNELS = (32, 28, 26, 24, 23, 22, 20, 18, 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--formats, --seconds."""
    parser.add_argument("--formats", nargs="*", default=["onnx"], help="onnx without it")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, for each network and format")


def run(formats: list[str] | None = None, seconds: float = 4.0) -> dict[str, Any]:
    """Headline: of depthwise convolutions in onnxruntime, with 22 channels and with 24."""
    formats = formats or ["onnx"]
    check_formats(formats)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for net, (task, shape) in NETS.items():
        example = Inputs((torch.randn(2, *shape),), {})
        for name in formats:
            kind = FORMATS[name]
            calls = []
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for channels in (DENSE, *CHANNELS):
                    model = TASKS[task].build(channels / DENSE).eval()
                    path = Path(folder) / f"{channels}{kind.suffix}"
                    kind.export(model, example, path, **({} if kind.dynamic_batch else {"batch_size": 1}))
                    one = with_batch(example, 1)
                    calls.append(kind.runner(path, run_model(model, one)).prepare(one))
                dense, *narrow = (timed.ms for timed in time_together(calls, seconds))
            row: dict[str, Any] = {"convolutions": net, "format": name, "ms of 64": dense}
            rows.append(row | {str(n): dense / ms for n, ms in zip(CHANNELS, narrow, strict=True)})
    first = rows[0]
    return {"headline": {f"faster_with_{n}": first[str(n)] for n in (22, 24)}, "rows": rows}
