"""What works with what, as a document: ``python -m experiments.foreign.support``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_compress.deploy.formats import FORMATS, Format
from lightning_compress.files import write_whole

__all__ = ["RESULT", "support_of"]

_ROOT = Path(__file__).parents[2]
RESULT = _ROOT / "experiments/results/foreign.json"
_METHODS = {
    "zeros": "prune",
    "8 bits": "quantize",
    "fewer channels": "shrink",
    "fewer blocks": "layers",
    "teacher": "distil",
    "resumed": "resume",
    "onnxruntime": "export",
}
_RUNTIMES = {
    "onnx": "onnxruntime; in a browser, onnxruntime-web",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch with XNNPACK",
    "litert": "LiteRT",
    "torch": "PyTorch, Inductor",
    "tflm": "TensorFlow Lite Micro",
}
_HEAD = """# Support matrix

Written by `python -m experiments.foreign.support`, of what `make test-foreign` found on other people's models and of
what the formats say of themselves in the code.

## Methods by model

One callback each, in a training of its own: `GradualPruning`, `QuantizationAwareTraining`, `ChannelPruning`,
`LayerPruning` and `KnowledgeDistillation`; *resumed* is a run taken up in the middle of pruning, *onnxruntime* the
pruned model as a file that gives its answers.

`-` is refused before training, or finds nothing to remove. `no` was not written, or does not give the model's answers.
A share stands where a method takes less than 99 % of the weights that multiply. Each in words:
[other people's models](foreign.md).
"""
_FILES = """## Formats

`Export` takes these names. Each file is run in its runtime and compared with the model, whatever model it is of.
[What phones, browsers, servers and boards load](guides/deployment.md).

- **weights**: bits that a weight takes in the file. **groups**: sizes of groups of weights with a scale each that its
  kernels take. **activations of 16 bits**: *symmetric* is without a zero point.
- **batch**: *any* is one file for all sizes; otherwise there is a file for each of these. **LSTM**: what its products
  are computed in.
"""


def support_of(result: dict[str, Any]) -> str:
    """The document of a result of ``python -m experiments.bench coverage``, as Markdown."""
    words = _METHODS.values()
    rows = [[row["model"], row["package"], *(_cell(row, word) for word in words)] for row in result["rows"]]
    yes = [f"{sum(row[i] == 'yes' for row in rows)} of {len(rows)}" for i in range(2, 2 + len(_METHODS))]
    methods = _table(["model", "package", *_METHODS], [*rows, ["**all**", "", *yes]])
    kinds = ["format", "file", "runtime", "install", "weights", "groups", "activations of 16 bits", "batch", "LSTM"]
    formats = _table(kinds, [_format(name, kind) for name, kind in FORMATS.items()])
    return "\n".join([_HEAD, methods, _FILES, formats])


def _cell(row: dict[str, Any], key: str) -> str:
    share = row.get({"prune": "pruned", "quantize": "quantized"}.get(key, ""), 1.0)
    word = _word(row.get(key, ""))
    return f"{share:.0%}" if word == "yes" and share < 0.99 else word


def _word(said: str) -> str:
    kind = said.partition(":")[0].partition(";")[0].partition(",")[0]
    if kind == "ok":
        return "yes" if "missed" not in said else "no"
    return {"": "", "refused": "-", "nothing removed": "-"}.get(kind, "no")


def _format(name: str, kind: Format) -> list[str]:
    groups = "multiples of 32" if isinstance(kind.groups, range) else ", ".join(map(str, kind.groups))
    return [
        f"`{name}`",
        f"`{kind.suffix}`",
        _RUNTIMES[name],
        f"`[{kind.extra}]`" if kind.extra else "-",
        ", ".join(map(str, kind.weight_bits)),
        groups or "-",
        {"none": "-", "any": "yes"}.get(kind.wide, kind.wide),
        "any" if kind.dynamic_batch else ", ".join(map(str, kind.batch_sizes)),
        "integers" if kind.integer_lstm else "float",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    write_whole(_ROOT / "docs/support.md", support_of(json.loads(RESULT.read_text())))
