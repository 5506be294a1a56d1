"""What fake quantization costs a training step: ours beside torchao's PT2E, ResNet-20 and a ViT of 1.8M parameters.

The step is forward, backward and SGD step of 32 images of 28 x 28, int8 weights and activations, ranges observed as in
training: ours at every second step, the peer's at every step. Float, ours and the peer start from the same weights and
run in this process, interleaved, two steps at a time; medians of CPU time, single-threaded. The rows below ours change
one thing at a time: ranges observed at every step, ranges frozen, and the weights alone.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from experiments.nets import ResNet20, vit
from lightning_compress.quantization.model import quantization_of, quantize_layers
from lightning_compress.quantization.placement import find_placement
from lightning_compress.quantization.schemes import Scheme, int8, w8
from lightning_compress.watch import Watch

NETS: dict[str, Callable[[], nn.Module]] = {"resnet20": ResNet20, "vit": vit}
BATCH_SIZE = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--repeats."""
    parser.add_argument("--repeats", type=int, default=25)


def ours(model: nn.Module, x: torch.Tensor, scheme: Scheme) -> nn.Module:
    """The model as QuantizationAwareTraining has it in its phase."""
    model = copy.deepcopy(model)
    quantization = quantize_layers(model, scheme)
    names = {layer.module_name for layer in quantization.layers}
    with Watch(model) as watch:
        model(x)
    quantization.place(model, find_placement(watch.trace, model, names))
    quantization.observe(True)
    model(x)
    quantization.enable(True)
    quantization.observe(False)
    return model


def pt2e(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The same in torchao's PT2E QAT with its quantizer for x86."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    graph = torch.export.export(copy.deepcopy(model), (x,), strict=True).module()
    return allow_exported_model_train_eval(prepare_qat_pt2e(graph, quantizer))


def stepper(model: nn.Module, x: torch.Tensor, y: torch.Tensor, observed: int = 0) -> Callable[[], float]:
    """A call that trains two steps, of which the first ``observed`` move the ranges: CPU milliseconds a step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    quantization = quantization_of(model)
    model.train()

    def step() -> float:
        begin = time.thread_time()
        for i in range(2):
            if quantization is not None:
                quantization.observe(i < observed)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return (time.thread_time() - begin) * 1e3 / 2

    return step


def run(repeats: int = 25) -> dict[str, Any]:
    """Measure both nets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, headline = [], {}
    try:
        for name, build in NETS.items():
            torch.manual_seed(0)
            model, x, y = build(), torch.randn(BATCH_SIZE, 1, 28, 28), torch.arange(BATCH_SIZE) % 10
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                models = {
                    "float": (copy.deepcopy(model), 0),
                    "ours": (ours(model, x, int8()), 1),
                    "ours, observed always": (ours(model, x, int8()), 2),
                    "ours, ranges frozen": (ours(model, x, int8()), 0),
                    "ours, weights alone": (ours(model, x, w8()), 0),
                    "torchao PT2E": (pt2e(model, x), 0),
                }
            steps = {method: stepper(m, x, y, observed) for method, (m, observed) in models.items()}
            times: dict[str, list[float]] = {method: [] for method in steps}
            for i in range(repeats + 2):
                for method, step in steps.items():
                    taken = step()
                    times[method] += [taken] if i >= 2 else []
            for method in steps:
                ratio = median(a / b for a, b in zip(times[method], times["float"], strict=True))
                rows.append({"net": name, "method": method, "step_ms": median(times[method]), "ratio": ratio})
                if method in ("ours", "torchao PT2E"):
                    headline[name if method == "ours" else f"{name}_pt2e"] = ratio
    finally:
        torch.set_num_threads(threads)
    return {"headline": headline, "rows": rows}
