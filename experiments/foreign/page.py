"""The document of the models of other packages: a table, and below it in words what is not as it could be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["COLUMNS", "COMMAND", "page_of"]

COMMAND = "make test-foreign"
COLUMNS = ("model", "package", "params", "pruned", "quantized", "shrunk_half", "plan_seconds")
WORDS = ("prune", "quantize", "shrink", "load", "resume", "layers", "distil", "export")
_HEAD = f"""# Other people's models

Written by `{COMMAND}`, which trains each model below by itself, with random weights and a small configuration, in an
environment of pinned versions (`experiments/foreign/requirements.txt`). One model:
`python -m experiments.bench coverage --model BERT`.

- **pruned**, **quantized**: share of the trainable weights that multiply which `GradualPruning(0.8)` brings to 80 %
  zeros and `QuantizationAwareTraining` trains in integers. Which weights multiply is counted below autograd; embeddings
  and tied weights are apart.
- **left by half**: parameters that `ChannelPruning(0.5)` leaves; 1.0 where it removes nothing. **plan**: seconds of its
  planning before the first step, on one thread.
- **resume**: a run taken up in the middle of pruning ends bit for bit as one without a break. **load**: the checkpoint
  of the smaller model by `load_from_checkpoint`. **export**: the pruned model as ONNX, judged in onnxruntime.
  **layers**: `LayerPruning(1)`. **distil**: `KnowledgeDistillation("self")` beside pruning.

`-` stands for what is refused before training, an empty cell for what was not tried; the words are below the table.
"""


def page_of(result: dict[str, Any]) -> str:
    """The document of a result of ``python -m experiments.bench coverage``, as Markdown."""
    rows = result["rows"]
    names = ("model", "package", "parameters", "pruned", "quantized", "left by half", "plan")
    words = ("prune", "quantize", "shrink", "resume", "load", "export", "layers", "distil")
    lines = [_line([*names, *words]), _line(["---", "---", *["---:"] * 5, *["---"] * len(words)])]
    for row in rows:
        numbers = [
            f"{row['params']:,}",
            f"{row['pruned']:.3f}",
            f"{row['quantized']:.3f}",
            f"{row['shrunk_half']:.2f}",
            f"{row['plan_seconds']:.1f} s",
        ]
        lines.append(_line([row["model"], row["package"], *numbers, *(_mark(row.get(word, "")) for word in words)]))
    summary = ", ".join(f"{key} {value:.4g}" for key, value in result["headline"].items())
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    missing = f"Not tried in this run: {', '.join(result['missing'])}." if result["missing"] else ""
    parts = [_HEAD, "\n".join(lines), f"{summary}.", f"Versions: {versions}.", missing, "## In words", _words(rows)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mark(word: str) -> str:
    kind = word.partition(":")[0].partition(";")[0]
    return {"refused": "-", "nothing removed": "-", "": ""}.get(kind, kind.partition(",")[0])


def _words(rows: Sequence[dict[str, Any]]) -> str:
    found = []
    for row in rows:
        said = [f"{word}: {row[word]}" for word in ("plain", *WORDS) if row.get(word, "ok") not in ("ok", "")]
        said += [f"not pruned: {x}" for x in row["left"]] + [f"not quantized: {x}" for x in row["left_float"]]
        said += row["unmeasured"]
        if said:
            found.append("\n".join([f"**{row['model']}**", "", *(f"- {_escaped(x)}" for x in said)]))
    return "\n\n".join(found)


def _escaped(text: str) -> str:
    """As it was said: Markdown takes stars, underscores and pipes for its own."""
    return "".join(f"\\{x}" if x in "*_|<>`[]" else x for x in text)
