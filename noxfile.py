"""Unit tests and the demo by Python version, with the lowest and the newest versions of what is needed: ``make nox``.

One session: ``nox -s "tests-3.10(lowest)"``; what stands behind ``--`` goes to pytest instead of the unit tests. On
Linux torch from PyPI takes several GB for each Python.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
# what tests need; checkers need newer versions of the same packages
CHECKERS = ("ruff", "mypy", "import-linter", "codespell")
TOOLS = [need for need in PROJECT["optional-dependencies"]["dev"] if not need.startswith(CHECKERS)]
# an old version without a wheel for a Python is older than that Python
WHEELS = ("numpy", "matplotlib", "onnx", "onnxruntime", "zstandard", "safetensors", "torch")
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
# deprecations inside of versions that nobody mends any more
OLD = ("-W", "default::DeprecationWarning", "-W", "default::FutureWarning")
DEMO = ("demo", "logger=none", "trainer.max_epochs=2", "control=false")


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
@nox.parametrize("versions", ["lowest", "newest"], ids=["lowest", "newest"])
def tests(session: nox.Session, versions: str) -> None:
    """Unit tests, or what is named, and the demo, shortened."""
    wheels = [word for name in WHEELS for word in ("--only-binary", name)]
    session.install("-e", ".[all]", "--resolution", RESOLUTIONS[versions], *wheels)
    session.install("-e", ".[all]", *TOOLS)
    session.run("python", "-c", "import torch, lightning; print(torch.__version__, lightning.__version__)")
    old = OLD if versions == "lowest" else ()
    session.run("pytest", "-n", "1", "-p", "no:cacheprovider", *old, *(session.posargs or ["tests/unit"]))
    session.chdir(session.create_tmp())
    session.run("lightning-compress", *DEMO)
