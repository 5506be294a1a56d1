"""Evaluations that are kept in a file: a task that was killed goes on with those that are missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_compress.files import write_whole

__all__ = ["Remembered"]


class Remembered:
    """Evaluates a model once; what was evaluated before is read from a file, by the weights that it is of.

    Args:
        evaluate: Gives the metric of a model.
        path: The file. One that is not such a file, or of other data, is written anew.
        of: What else the metric depends on, such as the data, in words.
    """

    def __init__(self, evaluate: Callable[[nn.Module], float], path: Path, of: str) -> None:
        self.evaluate = evaluate
        self.path = path
        self.of = of
        self.metrics = _read(path, of)

    def __call__(self, model: nn.Module) -> float:
        """The metric of a model."""
        key = _digest(model)
        if key not in self.metrics:
            self.metrics[key] = self.evaluate(model)
            self._write()
        return self.metrics[key]

    def forget(self) -> None:
        """Remove the file, once what it was for is written."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        from lightning_compress.callbacks.outputs import written

        written(self.path, lambda: write_whole(self.path, json.dumps({"of": self.of, "metrics": self.metrics})))


def _read(path: Path, of: str) -> dict[str, float]:
    try:
        state = json.loads(path.read_text())
        return {str(k): float(v) for k, v in state["metrics"].items()} if state["of"] == of else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none, or one that is cut or foreign
        return {}


def _digest(model: nn.Module) -> str:
    """Tells any two models of one architecture apart whose weights or buffers differ."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
