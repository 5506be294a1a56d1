"""Wrong arguments of every public constructor and function: what is given for which parameter, and what is wrong."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

import lightning_compress
from lightning_compress import (
    Phase,
    Scheme,
    callbacks,
    int8,
    load_from_checkpoint,
    load_packed,
    pruning,
    quantization,
    save_packed,
)
from lightning_compress.analysis.allocation import allocate
from lightning_compress.analysis.pareto import frontier
from lightning_compress.analysis.runs import Run, read_runs
from lightning_compress.analysis.sensitivity import hessian_traces, sensitivity
from lightning_compress.checks import shown
from lightning_compress.deploy.closeness import LargestDifference
from lightning_compress.deploy.formats import check_formats
from lightning_compress.deploy.timing import time_together
from lightning_compress.deploy.verify import Comparison
from lightning_compress.distillation import DistillationLoss
from lightning_compress.forward import Inputs
from lightning_compress.layers import Layer
from lightning_compress.quantization.convert import convert

__all__ = ["CASES", "REFUSALS", "REQUIRED", "Case", "fault", "field_of", "parameters_of", "refused"]

REFUSALS = (ValueError, TypeError, ModuleNotFoundError)


class Case(NamedTuple):
    """One wrong argument.

    Args:
        call: A constructor or a function.
        parameter: Its parameter.
        value: What is given for it.
    """

    call: Callable[..., Any]
    parameter: str
    value: Any

    def __str__(self) -> str:
        """As a user would write it."""
        return f"{self.call.__name__}({self.parameter}={shown(self.value)})"


def _metric(model: nn.Module) -> float:
    return 0.0


_NET = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
_RUN = Run("a", 0.9, 1, 1, 1.0, 1, 0.0, "")

# What a call needs beside the wrong argument.
REQUIRED: dict[Callable[..., Any], dict[str, Any]] = {
    pruning.Head: {"num_heads": 4},
    pruning.Masks: {"layers": []},
    pruning.Observation: {"criterion": pruning.Taylor(), "layers": [], "model": _NET},
    lightning_compress.scheme: {"word": "int8"},
    convert: {"model": _NET},
    load_from_checkpoint: {"module_class": pl.LightningModule, "path": "missing.ckpt"},
    load_packed: {"path": "missing.safetensors"},
    save_packed: {"model": {}, "path": "model.safetensors"},
    lightning_compress.save_pack_quantized: {"model": _NET, "folder": "packed"},
    quantization.quantization_of: {"model": _NET},
    sensitivity: {"model": _NET, "evaluate": _metric},
    hessian_traces: {"loss": lambda: _NET(torch.ones(1, 4)).sum(), "layers": [Layer("0", _NET[0])]},
    allocate: {"model": _NET, "inputs": Inputs((torch.ones(1, 4),), {}), "evaluate": _metric, "cost": lambda *_: 0.0},
    frontier: {"metric": "acc", "runs": [_RUN]},
    read_runs: {"folder": "missing"},
    check_formats: {"formats": ["torch"]},
    Comparison: {"model": _NET, "runner": _NET},
    LargestDifference: {},
    time_together: {"calls": [len("").bit_length], "seconds": 0.0},
}

_NUMBER = ("0.5", "half", True, [0.5], math.nan, math.inf, np.float64(0.5), torch.tensor(0.5))
_SHARE = (*_NUMBER, -0.1, 1.1, 50)
_WHOLE = ("3", True, [3], 3.0, 2.5, math.nan, np.int64(3), None)
_FLAG: tuple[Any, ...] = ("false", "no", 0, 1, None, [], np.bool_(True))
_NAMES = ("head", 3, None, {"head"}, [1], [""], [["head"]])
_BY_NAME = (["head"], "head", 0.5, {1: 0.5}, {"head": "x"}, {"head": None})
_PHASE = (0.5, (0.2, 0.6), "0.2-0.6", Phase, {"begin": 0.2})
_CRITERION = ("magnitude", pruning.Magnitude, 1, pruning.Element())
_SCOPE = ("all", "Layer", None, 0, ["layer"])
_SCHEME = ("int9", 8, int8, ["int8"], quantization.Affine())
_PATH = ("", 3, ["out"], True, "a\0b")
_MODEL = ("model", None, nn.Linear, 3)
_FUNCTION = (None, 0.5, "metric")
_BITS = (1, 9, 16, 4.0, "4", None, True, np.int64(4), math.inf)

_GATES = {"gate_checkpoints": _FLAG, "gate_stopping": _FLAG[:3], "strict": _FLAG[:3]}
_LAYERS = {"include": _NAMES, "exclude": _NAMES}
_MASKING = {**_LAYERS, **_GATES, "keep_first": _FLAG[:4], "keep_last": _FLAG[:4]}
_SPARSE = {"sparsity": (*_SHARE, 1.0), "every": (*_WHOLE, 0), "share": (*_SHARE, 0), "scope": _SCOPE, "phase": _PHASE}
_SHRINKING = {**_LAYERS, **_GATES, "criterion": _CRITERION, "phase": _PHASE}

_TABLE: dict[Callable[..., Any], Mapping[str, Sequence[Any]]] = {
    callbacks.GradualPruning: {
        **_MASKING,
        "sparsity": (*_SHARE, pruning.Linear),
        "criterion": _CRITERION,
        "pattern": ("2:4", pruning.NofM, pruning.Magnitude()),
        "scope": _SCOPE,
        "phase": _PHASE,
        "every": (*_WHOLE, 0),
        "targets": _BY_NAME,
        "floor": (*_SHARE, None),
        "rewind": ("start", math.nan, -0.1, 0.5, True),
    },
    callbacks.RigL: {**_MASKING, **_SPARSE, "criterion": _CRITERION},
    callbacks.SET: {**_MASKING, **_SPARSE, "criterion": _CRITERION},
    callbacks.ChannelPruning: {
        **_SHRINKING,
        "sparsity": (*_SHARE, 1.0, None),
        "steps": (*_WHOLE, 0),
        "target": ("flops", "Channels", None, 3),
        "scope": ("layer", None, 1),
        "num_heads": (*_BY_NAME, {"attention": 0}, {"attention": 2.0}),
        "round_to": (*_WHOLE[:-1], 0),  # None is what kernels take
        "floor": (*_SHARE, 1.0),
        "targets": (*_BY_NAME, {"head": 1.0}, {"head": 0.5}),
    },
    callbacks.LayerPruning: {**_SHRINKING, "num_layers": (*_WHOLE, 0), "max_share": (*_SHARE, 0.0)},
    callbacks.QuantizationAwareTraining: {
        **_GATES,
        "scheme": _SCHEME,
        "calibrate": (*_PHASE, Phase(0.5, 0.9)),
        "phase": (*_PHASE, None),
        "freeze": (*_SHARE, 0),
        "learning_rate": (*_NUMBER, 0, -1e-3, None),
        "equalize": (*_FLAG, True),
        "correct_bias": (*_FLAG, True),
    },
    callbacks.PostTrainingQuantization: {
        "scheme": _SCHEME,
        "calibrate": (*_PHASE, None),
        "equalize": _FLAG,
        "correct_bias": _FLAG,
        "strict": _FLAG,
    },
    callbacks.KnowledgeDistillation: {
        "teacher": (3, None, nn.Linear, "", ["a.ckpt"]),
        "alpha": (*_SHARE, None),
        "temperature": (*_NUMBER, 0, -1),
        "loss": ("ce", "KL", None, 0),
        "outputs": (None, 3, ["head"]),
        "features": (3, None, [1], [""], {1: 0.5}, {"head": "x"}, {"head": -1}),
        "phase": (*_PHASE, Phase(0.5, 0.5)),
        "class_axis": _WHOLE,
        "by_hand": _FLAG,
        "strict": _FLAG,
        "weights_only": ("false", 0, "no"),
    },
    callbacks.AccuracyGuard: {
        "max_drop": (*_NUMBER, -0.1, None),
        "monitor": (3, "", ["val_acc"], True),
        "mode": ("higher", "MAX", 1, True),
        "reference": _NUMBER,
        "step": (*_SHARE, 0, 1),
        "bits": (4, "64", None, (2, 4), (16, 4), (4, 4), (4.0,), {4, 3}),
        "patience": (*_WHOLE, -1),
        "resolution": (*_SHARE, 0, 1),
        "margin": (*_NUMBER, 0.02, -0.01),
    },
    callbacks.Export: {
        "formats": ("tflite", ["ONNX"], [], [""], 3, ["onnx", 3], {"onnx"}),
        "dirpath": _PATH,
        "name": ("", "out/model", None, 3),
        "rehearse": _FLAG,
        "min_agreement": _SHARE,
        "max_difference": _SHARE,
        "max_metric_drop": (*_NUMBER, -0.1),
        "max_bytes_ratio": (*_NUMBER, -1, 0),
        "max_latency_ratio": (*_NUMBER, -1, 0),
        "monitor": (3, "", ["val_acc"], True),
        "mode": ("higher", "MAX", 1, True),
        "labels": ("cat", 3, [1], [""]),
        "strict": _FLAG,
    },
    callbacks.CompressionReport: {
        "dirpath": _PATH,
        "monitor": (3, "", ["val_acc"], True),
        "show": _FLAG,
        "mode": ("higher", "MAX", 1, True),
        "control": (3, "", "none.json", ["report.json"], {"val_acc": 0.9}, True),
    },
    callbacks.Recipe: {
        "recipe": (None, 3, "", "prune_int", "none.yaml", ["int8"]),
        "overrides": ("prune.sparsity=0.8", [3], ["prune"], ["prun.sparsity=0.5"], ["prune.sparsit=1"], ["prune=3"]),
    },
    callbacks.FineTuning: {
        "phase": _PHASE,
        "learning_rate": ("fast", *_NUMBER, 0, None, ["rewind"]),
        "freeze": _NAMES,
    },
    Phase: {"begin": (*_NUMBER, -1, None), "end": (*_NUMBER, -1, 2, None), "unit": ("day", "steps", None, 1)},
    Scheme: {
        **_LAYERS,
        "weight": (8, "int8", None, quantization.Affine, quantization.Affine(16)),
        "inputs": (8, "int8", quantization.Affine),
        "observer": ("minmax", None, quantization.MinMax, quantization.Affine()),
        "weight_granularity": ("row", 0, -1, 2.0, None, True, ["channel"]),
        "overrides": (["head"], None, {"head": 4}, {"head": "int8"}, {1: int8()}, {"head": int8(["a"])}),
        "exact_kernels": _FLAG,
    },
    lightning_compress.scheme: {"word": ("w4a9", "INT8", 8, None, ["int8"]), "bits": (4,)},
    int8: {**_LAYERS, "exact_kernels": _FLAG},
    lightning_compress.lsq: {"bits": _BITS},
    lightning_compress.codebook: {"bits": _BITS},
    quantization.Affine: {"bits": (*_BITS[:1], 17, *_BITS[3:]), "symmetric": _FLAG, "top": (0, 64.0, "64", True, 64)},
    quantization.ShortScale: {"bits": _BITS, "symmetric": _FLAG[:3]},
    quantization.PerToken: {"bits": _BITS, "symmetric": _FLAG[:3]},
    quantization.LearnedStep: {"bits": _BITS, "symmetric": _FLAG[:3]},
    quantization.LearnedClip: {"bits": _BITS, "symmetric": _FLAG[:3]},
    quantization.PowerOfTwo: {"bits": _BITS},
    quantization.AdditivePowerOfTwo: {"bits": _BITS},
    quantization.Codebook: {"bits": _BITS},
    quantization.Exponential: {"bits": (*_BITS, 2)},
    quantization.Float8: {"format": ("e3m4", "E4M3", 8, None)},
    quantization.MovingAverage: {"rate": (*_SHARE, 0, None)},
    quantization.Percentile: {"share": (*_SHARE, 0, 99.9)},
    quantization.quantization_of: {"model": _MODEL},
    pruning.Constant: {"final": _SHARE, "initial": _SHARE},
    pruning.Exponential: {"final": _SHARE, "rate": (*_NUMBER, 0, -1)},
    pruning.Rounds: {"num": (*_WHOLE, 0)},
    pruning.LAMP: {"power": _SHARE},
    pruning.Random: {"seed": (*_WHOLE, -1)},
    pruning.NofM: {"n": (*_WHOLE, 0, 4), "m": (*_WHOLE, 0, 1), "axis": (*_WHOLE, -1)},
    pruning.Block: {"rows": (*_WHOLE, 0), "columns": (*_WHOLE, 0)},
    pruning.Channel: {"axis": (2, -1, "0", True, None)},
    pruning.Head: {"num_heads": (*_WHOLE, 0), "axis": (2, None, True), "fused": (*_WHOLE, 0)},
    pruning.Masks: {"layers": (3, "head", [nn.Linear(1, 1)])},
    pruning.Observation: {"criterion": _CRITERION, "layers": (3, [nn.Linear(1, 1)]), "model": _MODEL},
    DistillationLoss: {
        "alpha": _SHARE,
        "temperature": (*_NUMBER, 0),
        "kind": ("ce", None),
        "class_axis": _WHOLE,
        "features": (["head"], {"head": -1}),
    },
    convert: {"model": _MODEL, "activations": ("int4", None, 8), "rounded_weights": _FLAG},
    load_from_checkpoint: {"module_class": ("Net", None, nn.Linear), "path": _PATH, "scheme": (8, "int8", int8)},
    load_packed: {"path": _PATH, "model": ("model", nn.Linear, 3)},
    save_packed: {"path": _PATH, "model": (*_MODEL, [torch.ones(1)])},
    lightning_compress.save_pack_quantized: {"folder": _PATH, "model": _MODEL},
    check_formats: {"formats": ("onnx", ["coreml"], 3, [1])},
    Comparison: {"model": _MODEL, "runner": _FUNCTION},
    LargestDifference: {"relative": _FLAG},
    time_together: {"calls": (3, [3]), "seconds": (*_NUMBER, -1)},
    sensitivity: {
        **_LAYERS,
        "model": _MODEL,
        "evaluate": _FUNCTION,
        "sparsities": (0.5, "0.5", None, [1.5], ["0.5"], [math.nan]),
        "bits": (4, "4", None, [16], [4.5], ["4"]),
        "more_is_better": _FLAG,
        "inputs": (torch.ones(1, 4), "x"),
        "max_bytes": (*_WHOLE, -1),
    },
    hessian_traces: {"loss": _FUNCTION, "layers": (3, [_NET]), "num_samples": (*_WHOLE, 0), "seed": (*_WHOLE, -1)},
    allocate: {
        "model": _MODEL,
        "inputs": (torch.ones(1, 4), None),
        "evaluate": _FUNCTION,
        "cost": _FUNCTION,
        "shares": (0.5, None, [1.5], ["0.5"]),
        "bits": ([8, 4], {"0": 4}, {"0": [16]}, {1: [4]}),
        "sparsities": (0.5, [2]),
        "more_is_better": _FLAG,
    },
    frontier: {
        "metric": (None, "", 3),
        "runs": (None, [3], "runs"),
        "cost": ("weight", None, ["bytes"]),
        "max_drop": (*_NUMBER, -1),
        "more_is_better": _FLAG,
    },
    read_runs: {"folder": _PATH},
}

CASES: list[Case] = [
    Case(call, parameter, value)
    for call, parameters in _TABLE.items()
    for parameter, values in parameters.items()
    for value in values
]

# Parameters that messages call otherwise: as the argument that a user wrote.
_FIELDS = {("scheme", "word"): "scheme", ("DistillationLoss", "kind"): "loss", ("read_runs", "folder"): "runs"}


def field_of(call: Callable[..., Any], parameter: str) -> str:
    """What a message calls a parameter."""
    return _FIELDS.get((call.__name__, parameter), parameter)


def refused(call: Callable[..., Any], arguments: Mapping[str, Any]) -> Exception | None:
    """What a call raises with these arguments beside those that it needs; None if it takes them."""
    try:
        call(**{**REQUIRED.get(call, {}), **arguments})
    except Exception as error:
        return error
    return None


def fault(case: Case, error: Exception | None) -> str:
    """What an error lacks of field, value, what is accepted and how to fix it; empty if nothing."""
    if error is None:
        return "accepted"
    if not isinstance(error, REFUSALS):
        return f"a {type(error).__name__}"
    message = str(error)
    lacks = []
    if not re.search(rf"\b{field_of(case.call, case.parameter)}\b", message):
        lacks.append("the field")
    if not any(shown(part) in message for part in _parts(case.value)):
        lacks.append("the value")
    if not re.search(r"(?i:accepted) (is|are) .*[.?] [A-Z'].*[.?]$", message):
        lacks.append("what is accepted and how to fix it")
    if "\n" in message:
        lacks.append("the end in one line")
    return f"lacks {', '.join(lacks)}" if lacks else ""


def _parts(value: object) -> Iterator[object]:
    """A value, and what in it may be what is wrong."""
    yield value
    if isinstance(value, Mapping):
        yield from (part for item in value.items() for one in item for part in _parts(one))
    elif isinstance(value, list | tuple):
        yield from (part for one in value for part in _parts(one))


def parameters_of(call: Callable[..., Any]) -> list[str]:
    """The parameters of a call that can be given by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(call).parameters.items() if parameter.kind in kinds]
