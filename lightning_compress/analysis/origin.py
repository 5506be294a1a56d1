"""What a report is a report of: which model, by which command, from which commit, with which versions, where."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from lightning_compress.deploy.cpu import cpu_features

__all__ = ["origin_of"]

_PACKAGES = ("lightning-compress", "torch", "lightning", "onnxruntime", "openvino", "executorch", "ai-edge-litert")


def origin_of(model: object) -> dict[str, str]:
    """Facts by name, without those that are not known.

    Args:
        model: The LightningModule.

    Returns:
        ``model`` (its class), ``command``, ``commit`` (of the folder that the run was started in; with a + where
        files that git tracks were changed), ``date`` (UTC), ``seed``, ``cpu`` and ``versions``.

    Example:
        >>> from torch import nn
        >>> origin_of(nn.Linear(2, 2))["model"]
        'torch.nn.modules.linear.Linear'
    """
    kind = type(model)
    found = {
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "command": shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seed": os.environ.get("PL_GLOBAL_SEED", ""),  # where Lightning's seed_everything leaves it
        "cpu": " ".join(filter(None, [_cpu_name(), f"({cpu_features()})"])),
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
    }
    return {key: value for key, value in found.items() if value}


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:  # a runtime that is not there
            continue
    return found


def _commit() -> str:
    shown = _git("rev-parse", "--short=12", "HEAD")
    return shown + ("+" if shown and _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    """What git says in the current folder; nothing where there is no git, no repository or no answer in a second."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=1, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
