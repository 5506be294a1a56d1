"""Integer kernels of our files beside those of onnxruntime's ``quantize_static`` on the same float file.

A row per net and runtime: how many of the operations that read a stored weight run in integers, as report.json counts
them. ``quantize_static`` writes QDQ, weights per channel, uint8 activations where the runtime is on x86, calibrated on
the same batch. ``difference`` says why an operation is in float in our file. The nets are those of ``tests/zoo.py``
and of ``experiments/kernel_nets.py``, with random weights. The exit status is 1 if one of our files has fewer.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from experiments.kernel_nets import NETS
from lightning_compress.deploy.files import write_files
from lightning_compress.deploy.formats import FORMATS, check_formats
from lightning_compress.forward import Inputs, run_model
from lightning_compress.quantization.model import quantization_of, quantize_layers
from lightning_compress.quantization.placement import find_placement
from lightning_compress.quantization.schemes import int8
from lightning_compress.watch import Watch

RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which nets and runtimes."""
    parser.add_argument("--net", action="append", dest="nets", help="name of a net, several times for several")
    parser.add_argument("--runtime", choices=list(RUNTIMES), action="append", dest="runtimes", help="both without it")


def all_nets() -> dict[str, Callable[[], tuple[nn.Module, Inputs]]]:
    """Every net with the arguments of one call."""
    zoo = import_module("tests.zoo")

    def of_zoo(kind: Any) -> tuple[nn.Module, Inputs]:
        model = kind()
        model.configure_model()
        tensors = model.tensors()
        if kind is zoo.GAN:
            tensors = tensors[1:]
        return model, Inputs(tensors if kind is zoo.Transformer else tensors[:1], {})

    def of_kinds(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Inputs]:
        x = torch.randn(shape) if len(shape) > 2 else torch.arange(shape[0] * shape[1]).view(shape) % 20
        return build(), Inputs((x,), {})

    found: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
        f"zoo: {name}": partial(of_zoo, kind) for name, kind in zoo.MODULES.items()
    }
    return found | {name: partial(of_kinds, *net) for name, net in NETS.items()}


def quantized(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The model as PostTrainingQuantization leaves it, with the ranges of one batch."""
    found = quantize_layers(model, int8())
    with torch.no_grad():
        with Watch(model) as watch:
            model(*inputs.args)
        found.place(model, find_placement(watch.trace, model, {layer.module_name for layer in found.layers}))
        found.observe(True)
        model(*inputs.args)
    found.observe(False)
    found.enable(True)
    return model


def quantize_static(float_file: Path, out: Path, inputs: Inputs) -> None:
    """What onnxruntime's own tool makes of a float file."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    session = onnxruntime.InferenceSession(str(float_file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    tensors = [x for x in tree_leaves(tuple(inputs)) if isinstance(x, Tensor)]

    class Reader(CalibrationDataReader):
        left = [{name: x.numpy() for name, x in zip(names, tensors, strict=True)}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    quantize(
        str(float_file),
        str(out),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def measure(net: str, build: Callable[[], tuple[nn.Module, Inputs]], runtimes: list[str]) -> list[dict[str, Any]]:
    """The rows of one net."""
    torch.manual_seed(0)
    model, inputs = build()
    model = quantized(model.eval(), inputs)
    expected = run_model(model, inputs)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = write_files(FORMATS["onnx"], model, inputs, Path(folder, "net.onnx"), (1,))
        except Exception:  # a forward that looks at its data has no file, in float neither
            print(f"{net}: has no ONNX file, in float neither")
            return []
        theirs_file = Path(folder, "theirs.onnx")
        try:
            quantize_static(files.twin[1], theirs_file, inputs)
        except Exception as error:  # what the peer does not take is a row, too
            print(f"{net}: quantize_static fails with {error}")
        for runtime in runtimes:
            kind = FORMATS[RUNTIMES[runtime]]
            runner = kind.runner
            if kind.suffix != ".onnx":
                files = write_files(kind, model, inputs, Path(folder, f"net{kind.suffix}"), (1,))
            ours = runner(files.shipped[1], expected)
            kernels = ours.integer_kernels()
            theirs = _peer(theirs_file, runner, expected)
            row = {"net": net, "runtime": runtime, "ours": kernels.integer, "of": kernels.total}
            row |= {"quantize_static": theirs, "agreement": _agreement(ours(inputs), expected)}
            named = _in_float(model)
            words = [f"{num} {kind}" for kind, num in Counter(kind for _, kind in ours.float_kernels()).items()]
            row["difference"] = ", ".join(words) + "".join(f"; {name}: {reason}" for name, reason in named.items())
            # what is in float for a reason that is said is no kernel that was not found
            rows.append(row | {"fewer": max(theirs - kernels.integer - len(named), 0)})
    return rows


def _peer(file: Path, runner: Any, expected: Any) -> int:
    """Integer kernels of the peer's file; none of one that it could not write, or that the runtime does not load."""
    try:
        return runner(file, expected).integer_kernels().integer
    except Exception as error:
        print(f"{file.stem}: {type(error).__name__}")
        return 0


def _agreement(got: Any, expected: Any) -> float:
    """One minus the largest difference from the fake-quantized model, as a share of the outputs' range."""
    pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
    return min(1 - float((a - b).abs().max() / (b.max() - b.min())) for a, b in pairs if isinstance(b, Tensor))


def _in_float(model: nn.Module) -> dict[str, str]:
    """The layers that report.json and the terminal name as left in float, with the reason."""
    quantization = quantization_of(model)
    assert quantization is not None
    return quantization.skipped | quantization.without_data()


def run(nets: list[str] | None = None, runtimes: list[str] | None = None) -> dict[str, Any]:
    """Count; the headline has the number of nets, and of rows in which ours are fewer, as many and more."""
    check_formats([RUNTIMES[name] for name in runtimes or RUNTIMES])
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for net, build in all_nets().items():
            if not nets or net in nets:
                rows += measure(net, build, runtimes or list(RUNTIMES))
    gained = [row["ours"] - row["quantize_static"] for row in rows]
    headline = {"nets": len({row["net"] for row in rows}), "fewer": sum(row["fewer"] > 0 for row in rows)}
    headline["fewer, named"] = sum(d < 0 for d in gained) - headline["fewer"]
    headline |= {"as many": sum(d == 0 for d in gained), "more": sum(d > 0 for d in gained)}
    return {"headline": headline, "rows": rows, "failed": headline["fewer"] > 0}
