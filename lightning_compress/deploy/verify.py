"""Proof of a file: compare it in its runtime with the model it was made from, and time it against its float twin."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.forward import Inputs, run_model

__all__ = ["Artifact", "Comparison", "time_together"]


@dataclass
class Artifact:
    """An exported file and its proof; the fields are those of report.json.

    Args:
        format: Name of the format.
        runtime: The runtime that ran it.
        path: Where the file lies.
        bytes: Size on disk.
        bytes_zstd: Size compressed by zstd.
        metric: The validation metric, computed from the file's outputs in its runtime.
        max_abs_diff: Largest difference of an output from the PyTorch model.
        agreement: Share of samples with the same answer as the PyTorch model.
        latency_ms: Median milliseconds by batch size, one thread.
        latency_ms_float: The same of the float file.
        bytes_zstd_float: Bytes of the float file compressed by zstd.
        integer_kernels: How many of the operations that read a stored weight run in integer kernels.
        num_kernels: How many such operations there are.
        batch: ``"dynamic"``, or the batch size of the file; a file for another size lies beside it.
        integers: Type of the activations' codes; None of a float file.
        warnings: What one would not expect of the file, in words.
        max_rel_diff: Largest difference of an output as a share of the range of that output's values.
        overflowing: Layers whose weights a CPU without VNNI cannot multiply exactly in this runtime.
        cpu: The CPU that ran the file, by its instructions.
    """

    format: str
    runtime: str
    path: str
    bytes: int
    bytes_zstd: int
    metric: float | None = None
    max_abs_diff: float | None = None
    agreement: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    latency_ms_float: dict[str, float] = field(default_factory=dict)
    bytes_zstd_float: int | None = None
    integer_kernels: int | None = None
    num_kernels: int | None = None
    batch: str = "dynamic"
    integers: str | None = None
    warnings: list[str] = field(default_factory=list)
    max_rel_diff: float | None = None
    overflowing: list[str] = field(default_factory=list)
    cpu: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


class Comparison:
    """Stands in for a model's forward, answers with the file's outputs, and counts how far they are from the model's.

    The answer of a sample is the index of its largest value along the axis of classes: the second of an output with
    four axes or more (images, whose pixels have an answer each), else the last. With a single value there, two answers
    agree when they differ by less than 1 % of the largest.

    Args:
        model: The PyTorch model.
        runner: The file in its runtime.
    """

    def __init__(self, model: nn.Module, runner: Callable[[Inputs], Any]) -> None:
        self.model = model
        self.runner = runner
        self.num_calls = 0
        self._same = self._num = 0
        self._outputs: dict[int, _Output] = {}

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """The file's outputs for the model's arguments."""
        devices = [x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        inputs = Inputs(*tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, (args, kwargs)))
        expected = run_model(self.model, inputs)
        got = self.runner(inputs)
        self.num_calls += 1
        for i, (a, b) in enumerate(zip(tree_leaves(expected), tree_leaves(got), strict=True)):
            if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
                self._count(a.float(), b.float())
                self._outputs.setdefault(i, _Output()).see(a.float(), b.float())
        return tree_map(lambda x: x.to(devices[0]) if devices and isinstance(x, Tensor) else x, got)

    def _count(self, a: Tensor, b: Tensor) -> None:
        axis = 1 if a.dim() >= 4 else -1
        if a.dim() and a.shape[axis] > 1:
            same = a.argmax(axis) == b.argmax(axis)
        else:
            same = (a - b).abs() <= 0.01 * a.abs().max()
        self._same += int(same.sum())
        self._num += same.numel()

    @property
    def max_abs_diff(self) -> float:
        """Largest difference seen; 0 before any."""
        return _worst([output.diff for output in self._outputs.values()])

    @property
    def max_rel_diff(self) -> float | None:
        """Largest difference as a share of the range of the output in which it was seen; None before any."""
        return _worst([output.share for output in self._outputs.values()]) if self._outputs else None

    @property
    def agreement(self) -> float | None:
        """Share of samples with the same answer; None before any."""
        return self._same / self._num if self._num else None


def _worst(values: Sequence[float]) -> float:
    """The largest value, NaN before all others; 0 of none."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


class _Output:
    """One of the model's outputs over all calls: its range, and how far the file was from it."""

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf
        self.diff = 0.0

    def see(self, expected: Tensor, got: Tensor) -> None:
        self.diff = _worst([self.diff, float((expected - got).abs().max())])
        self.low = min(self.low, float(expected.min()))
        self.high = max(self.high, float(expected.max()))

    @property
    def share(self) -> float:
        if self.diff == 0:
            return 0.0
        return self.diff / (self.high - self.low) if self.high > self.low else math.inf


def time_together(calls: Sequence[Callable[[], Any]], seconds: float = 1.0) -> list[float]:
    """Median milliseconds of each call, interleaved so that a noisy machine disturbs all alike.

    Args:
        calls: What to time.
        seconds: Time to spend in all; each call runs 5 times at least.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    with torch.no_grad():
        while time.perf_counter() < end or len(times[0]) < 5:
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                taken.append((time.perf_counter() - start) * 1e3)
    return [median(taken) for taken in times]
