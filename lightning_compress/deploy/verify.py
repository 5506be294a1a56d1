"""Proof of a file: compare it in its runtime with the model that it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.checks import check_callable, check_instance
from lightning_compress.deploy.closeness import Agreement, LargestDifference
from lightning_compress.deploy.interface import Taken, filled
from lightning_compress.forward import Inputs, are_alike, map_tensors, run_model, tensors_in

__all__ = ["Artifact", "Comparison", "difference"]


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
        arena_bytes: RAM that TensorFlow Lite Micro takes to run the file; None in other runtimes.
        integers: Type of the activations' codes; None of a float file.
        warnings: What one would not expect of the file, in words.
        max_rel_diff: Largest difference of an output as a share of the range of that output's values.
        overflowing: Layers whose weights a CPU without VNNI cannot multiply exactly in this runtime.
        cpu: The CPU that ran the file, by its instructions.
        judged: What was asked of the file and what it reaches, by name
            (:class:`lightning_compress.deploy.judge.Judgement`).
        deployed_minus_trained: The metric of the file less that of the trained model in PyTorch.
        inputs: Names of the arguments that the file takes.
        left_out: Labels that it does not take, and losses that it does not give.
        float_kernels: Modules of a quantized file that compute in float, with the reason where it is known.
        latency_ms_quartiles: By batch size, the milliseconds that a quarter of the repetitions stayed below, and a
            quarter above.
        latency_ms_float_quartiles: The same of the float file.
        times_faster: By batch size, how often this file's time fits into that of the float file, turn by turn: the
            median and the quartiles.
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
    arena_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    max_rel_diff: float | None = None
    overflowing: list[str] = field(default_factory=list)
    cpu: str = ""
    judged: dict[str, Any] = field(default_factory=dict)
    deployed_minus_trained: float | None = None
    inputs: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    float_kernels: list[str] = field(default_factory=list)
    latency_ms_quartiles: dict[str, list[float]] = field(default_factory=dict)
    latency_ms_float_quartiles: dict[str, list[float]] = field(default_factory=dict)
    times_faster: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def difference(deployed: float | None, trained: float | None) -> float | None:
    """A metric of a file less that of the trained model; None where one is unknown or not finite."""
    if deployed is None or trained is None or not math.isfinite(deployed - trained):
        return None
    return deployed - trained


class Comparison:
    """Stands in for a model's forward, answers with the file's outputs, and counts how far they are from the model's.

    By :class:`lightning_compress.deploy.Agreement` and :class:`lightning_compress.deploy.LargestDifference`.

    Args:
        model: The PyTorch model.
        runner: The file in its runtime.
        example: The arguments that the file was made of: calls with other ones are the model's to answer. Without it,
            all are compared.
        taken: What of a call the file takes, and of the outputs it gives; all without it. A loss that it does not give
            is NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        runner: Callable[[Inputs], Any],
        example: Inputs | None = None,
        taken: Taken | None = None,
    ) -> None:
        check_instance("Comparison.model", model, nn.Module, "an nn.Module")
        check_callable("Comparison.runner", runner, "a function of Inputs")
        check_instance("Comparison.taken", taken, (Taken, type(None)), "what taken_by_file gives, or None")
        self.model = model
        self.runner = runner
        self.example = example if taken is None else taken.inputs
        self.taken = taken
        self.num_calls = 0
        self.num_others = 0
        self._agreement = Agreement()
        # by the number of an output: each has a range of its own
        self._absolute: dict[int, LargestDifference] = {}
        self._relative: dict[int, LargestDifference] = {}

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """The file's outputs for the model's arguments."""
        devices = [x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        inputs = Inputs(*tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, (args, kwargs)))
        # a validation step that casts around the model would have the model less exact than the file
        with torch.autocast("cpu", enabled=False):
            answer = run_model(self.model, inputs)
            asked = inputs if self.taken is None else self.taken.of(self.model, inputs)
            open_axes = getattr(self.runner, "open_axes", ())
            if self.example is not None and not are_alike(asked, self.example, open_axes):
                self.num_others += 1
            else:
                answer = self._compared(answer, tensors_in(self.runner(asked)))
        return map_tensors(lambda x: x.to(devices[0]) if devices else x, answer)

    def _compared(self, expected: Any, given: list[Tensor]) -> Any:
        """The model's outputs with the file's in their places."""
        self.num_calls += 1
        outputs = tensors_in(expected)
        places: Sequence[int] = range(len(outputs))
        if self.taken is not None and len(given) < len(outputs):
            places = self.taken.outputs
        instead = [torch.full_like(x, math.nan) if x.is_floating_point() else x for x in outputs]
        for i, b in zip(places, given, strict=True):
            a = outputs[i]
            instead[i] = b
            if a.is_floating_point() and a.numel():
                self._agreement.update(b.float(), a.float())
                self._absolute.setdefault(i, LargestDifference()).update(b.float(), a.float())
                self._relative.setdefault(i, LargestDifference(relative=True)).update(b.float(), a.float())
        return filled(expected, instead)

    @property
    def max_abs_diff(self) -> float:
        """Largest difference seen; 0 before any."""
        return _worst([float(x.compute()) for x in self._absolute.values()])

    @property
    def max_rel_diff(self) -> float | None:
        """Largest difference as a share of the range of the output in which it was seen; None before any."""
        return _worst([float(x.compute()) for x in self._relative.values()]) if self._relative else None

    @property
    def agreement(self) -> float | None:
        """Share of samples with the same answer; None before any."""
        return float(self._agreement.compute()) if self._relative else None


def _worst(values: Sequence[float]) -> float:
    """The largest value, NaN before all others; 0 of none."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)
