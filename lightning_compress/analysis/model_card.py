"""MODEL_CARD.md: what lies beside it, in words for who gets the files and has not seen the run (Mitchell 2018).

The sections are those of model cards (arXiv:1810.03993) that a run can answer; what the model is for and what it was
trained on only its author knows, and is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_compress.analysis.latency import LATENCY_LEGEND, latency_table
from lightning_compress.analysis.legend import legend_of_bytes, legend_of_models
from lightning_compress.analysis.report import (
    TARGET_HEADERS,
    Report,
    describe_missed,
    headers,
    summary_rows,
    target_rows,
)
from lightning_compress.files import write_whole

__all__ = ["how_to_load", "write_model_card"]

_LOAD = {
    ".onnx": """import onnxruntime

session = onnxruntime.InferenceSession({path!r})
outputs = session.run(None, {{{inputs}}})""",
    ".xml": """import openvino

model = openvino.compile_model({path!r}, "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
outputs = model([{names}])""",
    ".tflite": """from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter({path!r})
interpreter.allocate_tensors()
interpreter.get_input_details(), interpreter.get_output_details()  # shapes, types, scales and zero points""",
    ".pte": """from executorch.runtime import Runtime

method = Runtime.get().load_program({path!r}).load_method("forward")
outputs = method.execute([{names}])""",
    ".pt2": """import torch
import torch.ao.quantization.fx._decomposed  # the quantize and dequantize operations

torch._inductor.config.freezing = True  # weights as constants: without it the integer kernels are not found
model = torch.compile(torch.export.load({path!r}).module(), dynamic=False)
with torch.no_grad():
    outputs = model({names})""",
    ".safetensors": """from lightning_compress import load_packed

load_packed({path!r}, model)  # an instance of the class above""",
}

_METRIC = "The metric of a file is computed from its own outputs in its runtime."


def how_to_load(path: str, inputs: Sequence[str] = ()) -> str:
    """A few lines of Python that load a file; empty for one of an unknown kind.

    Args:
        path: The file.
        inputs: Names of the arguments that it takes.

    Example:
        >>> print(how_to_load("model.onnx", ["x"]))
        import onnxruntime
        <BLANKLINE>
        session = onnxruntime.InferenceSession('model.onnx')
        outputs = session.run(None, {'x': x})
    """
    names = list(inputs) or ["x"]
    lines = _LOAD.get(Path(path).suffix, "")
    return lines.format(path=path, inputs=", ".join(f"{name!r}: {name}" for name in names), names=", ".join(names))


def write_model_card(report: Report, path: Path) -> None:
    """Write the card.

    Args:
        report: Of the run.
        path: Where to; files are named by where they lie from there.
    """
    write_whole(path, "\n".join(_lines(report, path.parent)) + "\n")


def _lines(report: Report, folder: Path) -> list[str]:
    origin = report.get("origin", {})
    lines = [f"# {origin.get('model', 'A compressed model').rpartition('.')[2]}, compressed", ""]
    if report["targets"]:
        lines += [*_table(TARGET_HEADERS, target_rows(report)), ""]
    lines += [f"- {key}: {value}" for key, value in origin.items()]
    lines += ["", "For what, trained on what, not for what: to be written by its author.", ""]
    lines += ["## What it is worth", "", *_table(headers(report), summary_rows(report)), "", _METRIC, ""]
    lines += [*(f"- {name}: {words}" for name, words in [*legend_of_bytes(report), *legend_of_models(report)]), ""]
    names, rows = latency_table(report)
    if rows:
        lines += ["## How fast it is", "", *_table(names, rows), "", LATENCY_LEGEND, ""]
    lines += ["## Files", ""]
    for artifact in report["artifacts"]:
        lines += _of_file(artifact, folder)
    if report["packed"] is not None:
        lines += _file(
            report["packed"]["path"], folder, [], f"{report['packed']['bytes']:,} bytes; weights for PyTorch."
        )
    missed = [describe_missed(row) for row in report["targets"] if row["missed"]]
    said = [*missed, *report["warnings"]]
    if said:
        lines += ["## What to know", "", *(f"- {text}" for text in said), ""]
    return lines[:-1]


def _of_file(artifact: dict[str, Any], folder: Path) -> list[str]:
    words = [f"{artifact['bytes']:,} bytes for {artifact['runtime']}, batch {artifact.get('batch') or '1'}"]
    if artifact.get("num_kernels"):
        words.append(f"{artifact['integer_kernels']} of {artifact['num_kernels']} operations with weights in integers")
    if artifact.get("agreement") is not None:
        words.append(f"{artifact['agreement']:.2%} of the answers are those of the trained model")
    return _file(artifact["path"], folder, artifact.get("inputs") or [], "; ".join(words) + ".")


def _file(path: str, folder: Path, inputs: Sequence[str], words: str) -> list[str]:
    inside = Path(path).is_relative_to(folder)
    shown = str(Path(path).relative_to(folder) if inside else path)
    return [f"### {shown}", "", words, "", "```python", how_to_load(shown, inputs), "```", ""]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows)]
