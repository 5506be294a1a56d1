"""Files that answer alike on every x86 CPU: what each remedy against overflowing 16-bit sums costs and cures.

Without VNNI, x86 kernels for uint8 x int8 add two products in 16 bits. Five nets are trained with quantization in the
full range of 8 bits (codes -127..127) and in ours (-64..64), from the same weights on the same batches, and written
for onnxruntime, OpenVINO and Inductor. Beside them stand the two other remedies for onnxruntime: uint8 weights in the
file, and its session option for exact kernels. Every file answers 1,000 images that it was not trained on, on this CPU
and on one with AVX2 alone: the same CPU, which is made to hide the rest (``experiments/avx2.py``), or, where that
cannot be had, a reference that adds pairs with saturation. Milliseconds are medians of interleaved calls, one thread.

What the narrower range costs in accuracy is measured apart: on three tasks, from the same dense models, over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from experiments.avx2 import environment
from experiments.bench import quant_accuracy
from experiments.bench.deploy import train
from experiments.nets import Bright, ResNet20, Rows, vit
from experiments.saturating import saturating
from experiments.tasks import data_folder, mnist
from experiments.training import quiet
from lightning_compress.demo.models import ResNet
from lightning_compress.deploy.cpu import cpu_features
from lightning_compress.deploy.files import write_files
from lightning_compress.deploy.formats import FORMATS, check_formats
from lightning_compress.deploy.size import weigh
from lightning_compress.deploy.timing import time_together
from lightning_compress.forward import Inputs, run_model
from lightning_compress.quantization import int8

NUM = 1000
RUNTIMES = {"onnxruntime": "onnx", "OpenVINO": "openvino", "Inductor": "torch"}
FULL, OURS, UINT8, OPTION = "full range", "-64..64 (ours)", "uint8 weights", "session option"
RANGES = {FULL: int8(exact_kernels=True), OURS: int8()}
_NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "demo": (ResNet, 300),
    "ResNet-20": (ResNet20, 300),
    "ViT": (vit, 900),
    "transformer": (Rows, 900),
    "bright": (Bright, 200),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which nets, over how many seeds, where data and trained models lie."""
    parser.add_argument("--net", choices=list(_NETS), action="append", dest="nets", help="all without it")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the three tasks; 0 leaves them out")
    parser.add_argument("--data", type=Path, help="folder of mnist70k.npz and fsdd.npz")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"), help="keeps the dense models")


def bright(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """White images of 16 x 16 with a grey stroke in one quarter, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (num,), generator=generator)
    x = 1 - 0.05 * torch.rand(num, 1, 16, 16, generator=generator)
    places = torch.randint(0, 3, (num, 2), generator=generator)
    for image, quarter, (a, b) in zip(x, y.tolist(), places.tolist(), strict=True):
        top, left = 8 * (quarter // 2) + a, 8 * (quarter % 2) + b
        image[0, top : top + 4, left : left + 4] -= 0.5
    return x, y


def with_uint8_weights(path: Path, out: Path) -> None:
    """The same ONNX file with its weights' codes moved up by 128: kernels for two unsigned factors add in 32 bits."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        codes = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.data_type != onnx.TensorProto.INT8:
            continue
        for name in (node.input[0], node.input[2]):
            moved = (numpy_helper.to_array(stored[name]).astype("int16") + 128).astype("uint8")
            stored[name].CopyFrom(numpy_helper.from_array(moved, name))
    onnx.save(model, out)


class _Exact:
    """An ONNX file in a session with an option of its own."""

    def __init__(self, path: Path, optimized: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if optimized:
            options.add_session_config_entry("session.x64quantprecision", "1")
        else:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name

    def __call__(self, inputs: Inputs) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: inputs.args[0].numpy()})[0])

    def prepare(self, inputs: Inputs) -> Any:
        feed = {self.name: inputs.args[0].numpy()}
        return lambda: self.session.run(None, feed)


def _answers(runner: Any, x: Tensor, y: Tensor, expected: Tensor) -> dict[str, float]:
    """How the outputs compare with the fake-quantized model's."""
    got = torch.cat([runner(Inputs((part,), {})) for part in x.split(64)])
    return {
        "agreement": float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
        "difference": float((got - expected).abs().max() / (expected.max() - expected.min())),
        "accuracy": float((got.argmax(-1) == y).float().mean()),
    }


def measure(folder: Path) -> list[dict[str, Any]]:
    """All files of a folder on the CPU that this process sees."""
    torch.set_num_threads(1)
    rows = []
    for net in sorted(path.parent for path in folder.glob("*/data.pt")):
        saved = torch.load(net / "data.pt")
        x, y = saved["x"], saved["y"]
        for runtime, key in RUNTIMES.items():
            kind = FORMATS[key]
            runners: dict[str, Any] = {"float": kind.runner(net / f"full_float{kind.suffix}", saved[FULL][:1])}
            runners[FULL] = kind.runner(net / f"full{kind.suffix}", saved[FULL][:1])
            runners[OURS] = kind.runner(net / f"ours{kind.suffix}", saved[OURS][:1])
            if key == "onnx":
                runners[UINT8] = kind.runner(net / "uint8.onnx", saved[FULL][:1])
                runners[OPTION] = _Exact(net / "full.onnx", optimized=True)
            found = {name: _answers(runner, x, y, saved.get(name, saved[FULL])) for name, runner in runners.items()}
            times = {}
            for size in (64,) if key == "torch" else (1, 64):  # Inductor compiles anew for each size
                calls = [runner.prepare(Inputs((x[:size],), {})) for runner in runners.values()]
                times[size] = dict(zip(runners, time_together(calls, 2.0), strict=True))
            for name in list(runners)[1:]:
                speed = {f"speed @{size}": timed["float"].ms / timed[name].ms for size, timed in times.items()}
                rows.append({"net": net.name, "runtime": runtime, "remedy": name, **found[name], **speed})
        exact = _Exact(net / "ours.onnx", optimized=False)
        rows.append({"net": net.name, "runtime": "exact", "remedy": OURS, **_answers(exact, x, y, saved[OURS])})
    return rows


def prepare(net: str, data: Path, folder: Path) -> dict[str, Any]:
    """Train a net in both ranges, write its files, and keep what the models answer; bytes of the ONNX files."""
    build, steps = _NETS[net]
    if net == "bright":
        (x, y), (x_test, y_test) = bright(64 * steps, 0), bright(NUM, 1)
    else:
        images = mnist(data)
        x, y = images.x_train.unsqueeze(1), images.y_train
        x_test, y_test = images.x_test[:NUM].unsqueeze(1), images.y_test[:NUM]
    folder.mkdir()
    saved: dict[str, Any] = {"x": x_test.clone(), "y": y_test.clone()}  # not the whole data set behind them
    bytes_: dict[str, Any] = {}
    references = {}
    for name, scheme in RANGES.items():
        pl.seed_everything(1, verbose=False)
        model = train(build(), x, y, steps, [], scheme)
        inputs = Inputs((x_test,), {})
        saved[name] = run_model(model, inputs)
        references[name] = model
        stem = "full" if name == FULL else "ours"
        for key in RUNTIMES.values():
            write_files(FORMATS[key], model, Inputs((x_test[:64],), {}), folder / f"{stem}{FORMATS[key].suffix}")
        bytes_[name] = weigh(folder / f"{stem}.onnx")
    with_uint8_weights(folder / "full.onnx", folder / "uint8.onnx")
    bytes_[UINT8], bytes_[OPTION] = weigh(folder / "uint8.onnx"), bytes_[FULL]
    torch.save(saved, folder / "data.pt")
    return {"bytes": bytes_, "models": references, "x": x_test, "y": y_test, "saved": saved}


def _reference(net: str, made: dict[str, Any]) -> list[dict[str, Any]]:
    """Both ranges by the arithmetic of AVX2, where no such CPU can be had."""
    rows = []
    for name, model in made["models"].items():
        found = saturating(model)
        answers = _answers(
            lambda inputs, found=found: run_model(found, inputs), made["x"], made["y"], made["saved"][name]
        )
        rows.append({"net": net, "runtime": "reference", "remedy": name, **answers})
    return rows


def cost(seeds: int, data: Path | None, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """What the narrower range costs, in points: full range minus ours, each pair from the same dense model."""
    found = quant_accuracy.run(schemes=["int8", "int8 exact"], seeds=seeds, data=data, folder=folder)
    by = {(run["task"], run["method"], run["seed"]): run["accuracy"] for run in found["runs"]}
    rows, all_costs = [], []
    for task in sorted({task for task, _, _ in by}):
        costs = [by[task, "int8 exact", seed] - by[task, "int8", seed] for seed in range(seeds)]
        error = stdev(costs) / seeds**0.5 if seeds > 1 else float("nan")
        rows.append(
            {
                "task": task,
                FULL: mean(by[task, "int8 exact", seed] for seed in range(seeds)),
                OURS: mean(by[task, "int8", seed] for seed in range(seeds)),
                "cost": mean(costs),
                "standard error": error,
            }
        )
        all_costs += costs
    return mean(all_costs), rows


def run(
    nets: list[str] | None = None,
    seeds: int = 5,
    data: Path | None = None,
    folder: Path = Path("outputs/bench"),
) -> dict[str, Any]:
    """Headline: min_agreement_avx2, max_rel_diff_avx2, agreement_exact, int8_accuracy_cost."""
    check_formats(list(RUNTIMES.values()))
    quiet()
    torch.set_num_threads(1)
    masked = environment()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        made = {net: prepare(net, data_folder(data), Path(name, net)) for net in nets or list(_NETS)}
        for cpu, variables in (("AVX2", masked), ("this", None)):
            if cpu == "AVX2" and masked is None:
                rows += [{"cpu": "AVX2", **row} for net in made for row in _reference(net, made[net])]
                continue
            out = Path(name, "rows.json")
            # or Inductor would take what it compiled for the other CPU
            own = {**(variables or os.environ), "TORCHINDUCTOR_CACHE_DIR": str(Path(name, f"inductor_{cpu}"))}
            subprocess.run([sys.executable, "-m", __name__, name, str(out)], env=own, check=True)
            rows += [{"cpu": cpu, **row} for row in json.loads(out.read_text())]
    for row in rows:
        weighed = made[row["net"]]["bytes"][row["remedy"]]
        row |= {"bytes": weighed[0], "zstd": weighed[1]}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key, "") for key in columns} for row in rows]
    ours = [row for row in rows if row["cpu"] == "AVX2" and row["remedy"] == OURS and row["runtime"] != "exact"]
    headline = {
        "min_agreement_avx2": min(row["agreement"] for row in ours),
        "max_rel_diff_avx2": max(row["difference"] for row in ours),
        "agreement_exact": min(row["agreement"] for row in rows if row["runtime"] == "exact"),
    }
    costs: list[dict[str, Any]] = []
    if seeds:
        headline["int8_accuracy_cost"], costs = cost(seeds, data, folder)
        print(*costs, sep="\n")
    avx2 = "hidden" if masked is not None else "reference"
    return {"headline": headline, "rows": rows, "cost": costs, "cpu": cpu_features(), "avx2": avx2}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(Path(sys.argv[1]))))
