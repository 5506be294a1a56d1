"""docs/foreign.md and docs/support.md are of what the benchmark printed: all models, in versions that are pinned."""

from __future__ import annotations

import json
import re
from pathlib import Path

from experiments.foreign.models import MODELS
from experiments.foreign.page import page_of
from experiments.foreign.support import support_of

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "experiments/results/foreign.json").read_text())


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_document_is_that_of_the_result() -> None:
    assert (ROOT / "docs/foreign.md").read_text() == page_of(RESULT)


def test_support_matrix_is_that_of_the_result_and_of_the_formats() -> None:
    assert (ROOT / "docs/support.md").read_text() == support_of(RESULT)


def test_models_are_those_of_the_code() -> None:
    tried = {row["model"]: row["package"] for row in RESULT["rows"]}
    missing = {name: MODELS[name][0] for name in RESULT["missing"]}
    assert tried | missing == {name: package for name, (package, _) in MODELS.items()}
    assert not tried.keys() & missing.keys()


def test_versions_are_those_that_are_installed() -> None:
    lines = (ROOT / "experiments/foreign/requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {plain(name): number for name, number in pinned.items()}
    assert {plain(name): number for name, number in RESULT["versions"].items()}.items() <= versions.items()
    assert {plain(package) for package, _ in MODELS.values()} <= versions.keys()
