"""Models of other people's packages, small and of random weights: what of each is pruned, quantized and removed.

Each is trained by itself, in a process with limits of time and memory: pruned, quantized, shrunk, without a block,
taught, resumed, loaded and exported. ``pruned`` and ``quantized`` are shares of the trainable weights that multiply,
counted below autograd (``experiments/foreign/multiplied.py``), embeddings and tied weights apart; ``shrunk_half`` is
the share of the parameters that ``ChannelPruning(0.5)`` leaves, 1.0 where it refuses. Needs the environment of
``make test-foreign``; a model whose package is missing is named, and left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import Any

import experiments.foreign  # noqa: F401  # before anything that imports torchvision
from experiments.foreign.models import MODELS
from experiments.foreign.page import COLUMNS, page_of
from experiments.foreign.worker import HANG, try_model
from lightning_compress.files import write_whole

ROOT = Path(__file__).parents[2]
TRIALS = ("plain", "prune", "quantize", "shrink", "load", "resume", "layers", "distil", "export")
_NUMBERS = {"params": 0, "multiplying": 0, "pruned": 0.0, "quantized": 0.0, "shrunk_half": 1.0, "plan_seconds": 0.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, several times for several; what to try; and where rows are kept and written."""
    parser.add_argument("--model", choices=list(MODELS), action="append", dest="models", help="all without it")
    parser.add_argument("--trial", choices=TRIALS[1:], action="append", dest="trials", help="all without it")
    parser.add_argument("--limit", type=float, default=90, help="seconds that a trial may take")
    parser.add_argument("--folder", type=Path, help="keeps the rows; those of unchanged code are not made again")
    parser.add_argument("--write", type=Path, help="also write the table to this document")


def code() -> str:
    """A fingerprint of the code that a row depends on."""
    paths = [
        path
        for part in ("lightning_compress", "callbacks", "experiments/foreign")
        for path in ROOT.glob(f"{part}/**/*.py")
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:16]


def measure(name: str, trials: Sequence[str], limit: float) -> dict[str, Any]:
    """The row of one model."""
    package = MODELS[name][0]
    with tempfile.TemporaryDirectory() as folder:
        facts = try_model(name, ("plain", *trials), limit, Path(folder) / "work")
    words = {trial: facts.get(trial, "") for trial in trials}
    row = {"model": name, "package": package, **{key: facts.get(key, value) for key, value in _NUMBERS.items()}}
    row |= words | {"left": facts.get("left", []), "left_float": facts.get("left_float", [])}
    row |= {"kept_whole": facts.get("kept_whole", []), "unmeasured": facts.get("unmeasured", [])}
    return row | ({"plain": facts["plain"]} if "plain" in facts else {}) | {"seconds": facts["seconds"]}


def kept(name: str, trials: Sequence[str], limit: float, folder: Path | None) -> dict[str, Any]:
    """The row of one model, from its file where code and trials are the same."""
    path = None if folder is None else folder / f"{name.replace(' ', '_')}.json"
    key = f"{code()} {' '.join(trials)}"
    if path is not None and path.is_file():
        known = json.loads(path.read_text())
        if known["key"] == key:
            return known["row"]
    row = measure(name, trials, limit)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key, "row": row}, indent=2))
    return row


def installed(names: Sequence[str]) -> dict[str, str]:
    """Versions of the models' packages that are there."""
    found = {}
    for package in sorted({MODELS[name][0] for name in names}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            print(
                f"{package} is not installed, and its models are left out: make test-foreign installs it.", flush=True
            )
    return found


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The smallest shares, and what must not happen."""
    outcomes = [row[trial] for row in rows for trial in TRIALS if isinstance(row.get(trial), str)]
    return {
        "models": len(rows),
        "packages": len({row["package"] for row in rows}),
        "min_pruned": min(row["pruned"] for row in rows),
        "min_quantized": min(row["quantized"] for row in rows),
        "mean_pruned": mean(row["pruned"] for row in rows),
        "mean_quantized": mean(row["quantized"] for row in rows),
        "num_half": sum(0.3 <= row["shrunk_half"] <= 0.7 for row in rows),
        "num_crashes": sum(word.startswith("crash") for word in outcomes),
        "num_hangs": sum(word.startswith(HANG) for word in outcomes),
    }


def _import_once() -> None:
    """Bring in what every process would import for itself: Lightning, the callbacks, and the writer of ONNX files."""
    import torch

    import experiments.foreign.trials  # noqa: F401

    torch.set_num_threads(1)
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), None, dynamo=True, verbose=False)


def run(
    models: list[str] | None = None,
    trials: list[str] | None = None,
    limit: float = 90,
    folder: Path | None = None,
    write: Path | None = None,
) -> dict[str, Any]:
    """Headline: smallest shares that are pruned and quantized, crashes and hangs."""
    versions = installed(models or list(MODELS))
    names = [name for name in models or MODELS if MODELS[name][0] in versions]
    if not names:
        raise SystemExit("None of the models' packages is installed. make test-foreign installs them.")
    _import_once()

    rows = []
    for name in names:
        rows.append(kept(name, trials or TRIALS[1:], limit, folder))
        print({key: rows[-1][key] for key in COLUMNS if key in rows[-1]}, flush=True)
    missing = [name for name in MODELS if name not in names]
    result: dict[str, Any] = {"headline": headline(rows), "versions": versions, "missing": missing, "rows": rows}
    if write is not None:
        write_whole(write, page_of(result))
    counted = result["headline"]
    return result | {"columns": COLUMNS, "failed": bool(counted["num_crashes"] or counted["num_hangs"])}
