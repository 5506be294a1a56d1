"""The scripts of docs/your-model: short, shown, and of the recipes that there are; make docs-test runs all of them."""

from __future__ import annotations

import re

import pytest

from experiments.foreign.your_model import ROOT, SCRIPTS, run
from lightning_compress.recipes import recipe

FOLDER = ROOT / "docs/your-model"
PAGE = (FOLDER / "index.md").read_text()


def test_every_script_is_on_the_page() -> None:
    assert len(SCRIPTS) == 7
    assert sorted(re.findall(r'^--8<-- "your-model/(\w+)\.py"$', PAGE, re.MULTILINE)) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_short_and_of_a_recipe_that_the_page_names(script: str) -> None:
    text = (FOLDER / f"{script}.py").read_text()
    assert text.count("\n") < 40
    arguments = re.search(r"recipe\((.+?)\)", text)
    assert arguments
    name, *overrides = re.findall(r'"(.+?)"', arguments[1])
    assert recipe(name, *overrides)
    assert f"| `{name}` |" in PAGE


def test_script_of_plain_torch_runs() -> None:
    *_, missed = run("keyword_spotting")
    assert missed == []
