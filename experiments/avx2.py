"""A CPU with AVX2 and no VNNI, wherever one is asked for.

Where the CPU has more, its CPUID instruction is made to say otherwise (``hide_vnni.c``: Linux on x86, CPUs with
``cpuid_fault``), so that torch, onnxruntime and OpenVINO run their AVX2 kernels. ``python -m experiments.avx2 pytest``
runs a command on such a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

from lightning_compress.deploy.cpu import cpu_features

__all__ = ["environment"]

_SEEN = "from lightning_compress.deploy.cpu import cpu_features; print(cpu_features())"


def environment() -> dict[str, str] | None:
    """The variables with which a program sees a CPU with AVX2 alone; None where that cannot be had."""
    if cpu_features() == "x86_64 AVX2":
        return dict(os.environ)
    library = Path(gettempdir(), f"hide_vnni_{os.getuid()}.so")
    source = Path(__file__).with_name("hide_vnni.c")
    masked = {**os.environ, "LD_PRELOAD": str(library)}
    try:
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True
        )
        seen = subprocess.run([sys.executable, "-c", _SEEN], env=masked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no compiler, no such kernel, another system
        return None
    return masked if seen.stdout.strip() == "x86_64 AVX2" else None


def main() -> int:
    """Run a command of this environment's Python as a module."""
    found = environment()
    if found is None:
        raise SystemExit("No CPU with AVX2 alone can be had here: that takes Linux on x86 with cpuid_fault, and cc.")
    return subprocess.run([sys.executable, "-m", *sys.argv[1:]], env=found).returncode


if __name__ == "__main__":
    sys.exit(main())
